"""The tools of llama.cpp: found, built from the pinned sdist, and spoken to in their own words. May import base and
gguf."""
