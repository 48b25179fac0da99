"""Where weights come from: a safetensors directory, or a GGUF file. Headers are checked, data stays put."""
