"""For running finished GGUFs: command lines of programs that run them, and Modelfiles for Ollama. May import planning,
text and what is below."""
