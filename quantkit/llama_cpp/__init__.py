"""The tools of llama.cpp: finding them, building them from the pinned sdist, and using their notation. May import base
and gguf."""
