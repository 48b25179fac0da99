"""The recipe language: its schema, its selectors, recipes by name or path, the page that documents it. May import
imatrix, gguf and base; offers load.load and Recipe."""
