"""A finished GGUF checked cold: structure, scales, plan, metadata, sampled rows, manifest, attestation.

Nothing here is shared with what writes files: a checker that shares the writer's code shares its mistakes.
The format is read a second time (gguf.py), the way from a source's bytes to float32 is gone a second
time (derive.py), and ggml's own quantizer says what the bytes must be (ggml.py). The plan, and which
source rows each tensor is made of, are taken as given. import-linter holds this (pyproject.toml).

    gguf.py          a header, read with every claim checked
    structure.py     what the headers of a file, or of all its shards, must be; padding, lengths
    scan.py          every byte once: scales that are NaN or Inf, SHA-256 of files and tensors
    against_plan.py  names, types, shapes, bytes and keys against a plan
    derive.py        rows of a source as float32
    rederive.py      sampled rows quantized again by ggml and compared bit for bit
    manifest.py      the hashes, written and compared
    attestation.py   an in-toto statement of what was built from what
    verdict.py       findings, and what they come to
"""
