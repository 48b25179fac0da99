"""Which quantization for which machine: candidates (recipes, files, what a repository has), how each would run, what is
known of its quality, and their order."""
