"""The recipe language: schema, selectors, recipes by name or path, and the page that documents it. May import
imatrix, gguf and base; offers load.load and Recipe."""
