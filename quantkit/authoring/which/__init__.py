"""Which quantization suits a machine: candidates (recipes, files, a repository's files), how each would run, what is
known about its quality, and their order."""
