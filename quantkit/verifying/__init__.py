"""Checks a finished GGUF independently: structure, scales, plan, metadata, sampled rows, manifest, attestation.

Shares nothing with the code that writes files: a checker that shares the writer's code shares its mistakes. It has a
second reader of the format (gguf.py) and a second path from a source's bytes to float32 (derive.py), and ggml's own
quantizer tells what the bytes must be (ggml.py). It takes as given the plan, and which source rows each tensor is made
of. import-linter enforces this (pyproject.toml).

    gguf.py          reads a header and checks every claim in it
    structure.py     checks the headers of a file, or of all its shards; padding, lengths
    scan.py          reads every byte once: scales that are NaN or Inf, SHA-256 of files and tensors
    against_plan.py  compares names, types, shapes, bytes and keys with a plan
    derive.py        rows of a source as float32
    rederive.py      quantizes sampled rows again by ggml, and compares them bit for bit
    manifest.py      writes the hashes, and compares them
    attestation.py   an in-toto statement of what was built from what
    verdict.py       findings and the verdict
"""
