"""llama.cpp's own mixtures, against llama-quantize --dry-run on header-only files of real model shapes."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import Tools

from quantkit import demo
from quantkit.arch.options import Options
from quantkit.catalogue import Catalogue
from quantkit.errors import RecipeError
from quantkit.gguf_format import header_bytes, pad
from quantkit.mixtures import BASE_TYPES, facts, mixture_types
from quantkit.models import open_model
from quantkit.plan import make_plan
from quantkit.qtypes import FILE_TYPES, QTYPES, fit
from quantkit.recipe import parse

MODELS = [("deepseek-r1", "k_b+v_b"), ("deepseek-r1", "kv_b"), ("deepseek-v2-lite", "k_b+v_b"), ("deepseek-v2", "kv_b")]


def header_only(c: Catalogue, path: Path) -> Path:
    """The model's BF16 GGUF with a hole for data: terabytes by name, kilobytes on disk."""
    infos, at = [], 0
    for t in c.tensors:
        infos.append((t.name, t.shape, t.source_type, at))
        at += pad(QTYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows)
    header = header_bytes(c.kvs, infos)
    with open(path, "wb") as f:
        f.write(header)
        f.truncate(len(header) + at)
    return path


def dry_run(tools: Tools, model: Path, file_type: str, imatrix: Path | None) -> dict[str, str]:
    """The type that llama-quantize gives each tensor, shape fallback included."""
    command = [
        str(tools.quantize),
        "--dry-run",
        *(["--imatrix", str(imatrix)] if imatrix else []),
        str(model),
        file_type,
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    line = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[[^\]]*\], type =\s*(\S+),.*?(?:\((\w+)\))?$", re.M)
    return {m[1]: (m[3] or m[2]).upper() for m in line.finditer(done.stdout + done.stderr)}


def our_types(c: Catalogue, file_type: str, has_imatrix: bool, version: str = "current") -> dict[str, str]:
    types = mixture_types(file_type, c.tensors, facts(c, has_imatrix, version))
    asked = {t.name: next(types) if t.quantizable else t.source_type for t in c.tensors}
    return {t.name: fit(QTYPES[asked[t.name]], t.n_cols).name for t in c.tensors}


@pytest.mark.tools
@pytest.mark.parametrize(("model", "layout"), MODELS)
def test_every_mixture_is_llama_quantizes_own(tools: Tools, tmp_path: Path, model: str, layout: str) -> None:
    c = open_model(model, Options(layout))
    file = header_only(c, tmp_path / "model.gguf")
    imatrix = tmp_path / "imatrix.gguf"
    demo.make_imatrix(imatrix, {"blk.0.some.weight": (32,)})
    for file_type in BASE_TYPES:
        for given in (None, imatrix):
            theirs = dry_run(tools, file, file_type, given)
            assert len(theirs) == len(c.tensors)
            assert our_types(c, file_type, given is not None) == theirs, (file_type, given)


def test_every_file_type_is_a_mixture() -> None:
    assert BASE_TYPES.keys() == FILE_TYPES.keys()


#: types that logs of published files show, made from early 2025 to early 2026
PUBLISHED = [
    ("deepseek-r1", "kv_b", "BF16", {"F32": 361, "BF16": 664}),
    ("deepseek-r1", "kv_b", "Q8_0", {"F32": 361, "Q8_0": 664}),
    ("deepseek-r1", "kv_b", "Q4_K_M", {"F32": 361, "Q4_K": 606, "Q6_K": 58}),
    ("deepseek-v3", "kv_b", "Q3_K_M", {"F32": 361, "Q3_K": 483, "Q4_K": 177, "Q5_K": 3, "Q6_K": 1}),
    ("deepseek-r1", "k_b+v_b", "Q4_K_M", {"F32": 361, "Q5_0": 61, "Q4_K": 606, "Q6_K": 58}),
    ("deepseek-v2-lite", "kv_b", "Q4_K_M", {"F32": 108, "Q5_0": 14, "Q8_0": 13, "Q4_K": 229, "Q6_K": 13}),
]


@pytest.mark.parametrize(("model", "layout", "file_type", "types"), PUBLISHED)
def test_published_files_have_the_types_of_2025(model: str, layout: str, file_type: str, types: dict[str, int]) -> None:
    assert Counter(our_types(open_model(model, Options(layout)), file_type, False, "2025").values()) == types


def test_an_unknown_mixture() -> None:
    c = open_model("deepseek-v2-lite")
    with pytest.raises(RecipeError) as e:
        list(mixture_types("Q4_K_X", c.tensors, facts(c, False)))
    assert str(e.value).startswith("unknown mixture 'Q4_K_X' (did you mean Q4_K_S?); there are F32, F16, BF16, ")


def test_otherwise() -> None:
    """Rules take theirs, the mixture the rest, as if the rules were not there."""
    c = open_model("deepseek-r1")
    text = (
        "name: r\narch: [deepseek2]\nfile_type: Q4_K_M\notherwise: mixture Q4_K_M\n"
        'rules:\n  - {match: "*_exps.weight", type: Q2_K, why: small}\n'
    )
    plan = make_plan(c, parse(text, "r.yaml"))
    mixture = our_types(c, "Q4_K_M", False)
    for t in plan.tensors:
        assert t.type == ("Q2_K" if "_exps" in t.tensor.name else mixture[t.tensor.name])
    by = {t.tensor.name: t for t in plan.tensors}["output.weight"]
    assert (by.rule, by.why) == ("r.yaml:4 otherwise", "llama-quantize's own choice")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Q4_K", "r.yaml:4 otherwise: 'Q4_K' is not 'mixture NAME', such as mixture Q2_K"),
        ("mixture Q4_KM", "r.yaml:4 otherwise: unknown mixture 'Q4_KM' (did you mean Q4_K_M?)"),
    ],
)
def test_otherwise_that_is_wrong(value: str, message: str) -> None:
    with pytest.raises(RecipeError) as e:
        parse(f"name: r\narch: [deepseek2]\nfile_type: Q4_K_M\notherwise: {value}\nrules: []\n", "r.yaml")
    assert str(e.value) == message
