"""What a model is: a catalogue of tensors by GGUF name with the source rows they are made from, out of a checkpoint,
a GGUF or a config alone. May import gguf and base; offers open.open_model and Catalogue."""
