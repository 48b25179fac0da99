"""What a model is: a catalogue of tensors by GGUF name, with the source rows they are made from, read from a
checkpoint, a GGUF or only a config. May import gguf and base; offers open.open_model and Catalogue."""
