"""What results and unfinished work are of."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_builds import OPTIONS

from quantkit.base.errors import SourceError
from quantkit.lab.identity import of_model, of_run, of_tokens
from quantkit.model.catalogue import Catalogue
from quantkit.model.open import open_model


def opened(folder: Path) -> Catalogue:
    return open_model(str(folder), OPTIONS)


def test_a_model_is_known_by_its_weights(tiny_v3: Path, tmp_path: Path) -> None:
    """A copy is the same model; one with other weights in files of the same size is another, whatever its times say."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_v3, copy)
    assert of_model(opened(copy)) == of_model(opened(tiny_v3))
    file = sorted(copy.glob("*.safetensors"))[0]
    before = file.stat()
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert of_model(opened(copy)) != of_model(opened(tiny_v3))
    gone = opened(copy)
    file.unlink()
    with pytest.raises(SourceError) as e:
        of_model(gone)
    assert str(e.value) == f"{file}: cannot be read: No such file or directory"
    with pytest.raises(SourceError, match=r"^deepseek-r1: there are no weights here, only a config"):
        of_model(open_model("deepseek-r1"))


def test_tokens_and_runs(tiny_v3: Path, tmp_path: Path) -> None:
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    assert of_tokens(tokens) == of_tokens(tokens.copy(order="F"))
    assert (
        len({of_tokens(tokens), of_tokens(tokens.reshape(4, 8)), of_tokens(tokens, tokens), of_tokens(tokens + 1)}) == 4
    )
    copy = tmp_path / "copy"
    shutil.copytree(tiny_v3, copy)
    source = opened(copy).source
    assert source is not None
    before = of_run(source, tokens, ("f32",))
    assert before == of_run(source, tokens, ("f32",))
    assert before != of_run(source, tokens, ("bf16",))
    file = sorted(copy.glob("*.safetensors"))[0]
    os.utime(file, ns=(1, 1))
    assert of_run(source, tokens, ("f32",)) != before
