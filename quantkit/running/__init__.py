"""A finished GGUF at work: the command lines of programs that run it, and a Modelfile for Ollama. May import planning,
text and what is below."""
