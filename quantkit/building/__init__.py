"""Turns a plan into files: engines quantize rows, an unfinished build keeps what is durable, and a cache keeps tensors
between builds. May import planning and what is below; offers run.prepare and run.run."""
