"""`quantkit.forward.run`: what scripts call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from passing import logits_of, model_of, random_tokens

import quantkit as qk
from quantkit.base.errors import KernelError

TOKENS = random_tokens(384, 2, 12)


def test_whatever_a_model_is_given_as(tiny_v3: Path, sound: Path) -> None:
    catalogue = qk.open_model(tiny_v3, pre="deepseek-v3")
    want = [logits_of(model_of(tiny_v3), TOKENS), logits_of(model_of(sound), TOKENS)]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def see(chunk: int, model: int, logits: torch.Tensor) -> None:
        found[model, chunk] = logits.clone()

    options = qk.forward.Options(n_threads=1)
    nbytes = qk.forward.run([catalogue, qk.forward.Model(catalogue), sound], TOKENS, on_logits=see, options=options)
    for model, logits in enumerate([want[0], want[0], want[1]]):
        assert torch.equal(torch.stack([found[model, 0], found[model, 1]]), logits)
    one = qk.forward.run(str(sound), TOKENS[0].tolist(), on_logits=see, logits_from=4, options=options)
    assert found[0, 0].shape == (8, 384)
    assert 0 < one < nbytes


def test_what_the_room_offers() -> None:
    assert {"Model", "Options", "Quantized", "run"} == set(vars(qk.forward)["__all__"])
    with pytest.raises(AttributeError, match=r"^module 'quantkit.forward' has no attribute 'Nothing'$"):
        getattr(qk.forward, "Nothing")  # noqa: B009


def test_torch_is_imported_when_something_is_computed(tmp_path: Path) -> None:
    code = "import sys, quantkit as qk; qk.forward.run; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_without_torch(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    code = (
        "import quantkit as qk\n"
        "for use in (lambda: qk.forward.run('x.gguf', [1]), lambda: qk.forward.Model):\n"
        "    try: use()\n"
        "    except qk.QuantkitError as e: print(type(e).__name__, e)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    line = f"{KernelError.__name__} torch, which computes models, is not installed; run: pip install 'quantkit[lab]'\n"
    assert done.stdout == line * 2


def test_fewer_threads_than_none(tiny_v3: Path) -> None:
    with pytest.raises(KernelError) as e:
        qk.forward.run(qk.open_model(tiny_v3, pre="deepseek-v3"), TOKENS, options=qk.forward.Options(n_threads=-1))
    assert str(e.value) == "-1 threads cannot compute; give 1 or more, or 0 for all processors"
