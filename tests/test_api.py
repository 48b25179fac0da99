"""`import quantkit`: what it offers a script, that it is lazy, and that it does what the commands do."""

from __future__ import annotations

import doctest
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Run

import quantkit as qk
from quantkit import api
from quantkit.base import errors

#: types come from __init__.pyi, which has no list
PUBLIC: list[str] = vars(qk)["__all__"]
DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_what_is_public() -> None:
    every_error = {n for n, e in vars(errors).items() if inspect.isclass(e) and issubclass(e, errors.QuantkitError)}
    assert {name for name in PUBLIC if name.endswith("Error")} == every_error
    for name in set(PUBLIC) - {"__version__"}:
        thing = getattr(qk, name)
        if inspect.ismodule(thing):  # a room, public as it is
            assert inspect.getdoc(thing), name
            public = {f"{name}.{each}": getattr(thing, each) for each in thing.__all__}
        else:
            public = {name: thing}
        for each, one in public.items():
            assert inspect.isclass(one) or inspect.isfunction(one), each
            assert inspect.getdoc(one), each
    own = {n for n, f in vars(api).items() if inspect.isfunction(f) and f.__module__ == api.__name__ and n[0] != "_"}
    assert own <= set(PUBLIC)
    assert set(PUBLIC) <= set(dir(qk))
    stub = (Path(qk.__file__).with_suffix(".pyi")).read_text()
    assert set(re.findall(r" as (\w+)", stub)) == set(PUBLIC)
    with pytest.raises(AttributeError, match=r"^module 'quantkit' has no attribute 'quantise'$"):
        _ = getattr(qk, "quantise")  # noqa: B009, a type checker refuses the plain spelling


def test_nothing_is_imported_before_it_is_used(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import sys, quantkit; quantkit.QuantkitError; print(*sys.modules)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert not {"numpy", "torch", "pydantic", "yaml", "gguf", "click", "quantkit.api"} & set(said)


def test_examples_of_docstrings() -> None:
    found = doctest.testmod(api)
    assert found.failed == 0
    assert found.attempted > 10


def test_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = doctest.testfile(str(DOCS / "api.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted > 20


def test_a_build_is_the_command_s(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, quantkit: Run) -> None:
    model = qk.open_model(tiny_v3, pre="deepseek-v3")
    plan = qk.plan(model, "UD-IQ1_S", str(tiny_imatrix))
    seen: dict[str, int] = {}

    def progress(name: str, n: int) -> None:
        seen[name] = seen.get(name, 0) + n

    made = qk.build(plan, tmp_path / "api.gguf", threads=1, progress=progress)
    assert made.files == (tmp_path / "api.gguf",)
    assert made.nbytes == made.files[0].stat().st_size
    assert (made.n_values, made.n_kept, made.warning) == (plan.n_elements, 0, "")
    assert sum(seen.values()) == plan.n_elements
    done = quantkit(
        "build", tiny_v3, "-o", tmp_path / "cli.gguf", "-r", "UD-IQ1_S", "--imatrix", tiny_imatrix, "-q",
        "--pre", "deepseek-v3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cli.gguf").read_bytes() == made.files[0].read_bytes()
    assert qk.verify(made.files[0], plan=plan, sample="all").ok
    with pytest.raises(qk.OutputError, match="exists"):
        qk.build(plan, tmp_path / "api.gguf")


def test_a_verdict_has_what_is_wrong(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    plan = qk.plan(qk.open_model(tiny_v3, pre="deepseek-v3"), "UD-IQ1_S", tiny_imatrix)
    other = plan.with_types({"output.weight": "Q8_0"})
    made = qk.build(other, tmp_path / "o.gguf", options=qk.BuildOptions(split_max_size=500_000))
    assert len(made.files) > 1
    verdict = qk.verify(made.files[0], plan=plan, sample="none")
    assert not verdict.ok
    assert [(f.tensor, f.expected, f.found) for f in verdict.findings.kept() if f.text == "type"] == [
        ("output.weight", "Q6_K", "Q8_0")
    ]


def test_types_are_changed_and_priced_again() -> None:
    plan = qk.plan("deepseek-r1", "UD-IQ1_S")
    globs = {"blk.*.attn_output.weight": "Q5_K", "blk.{3,4}.attn_*.weight": "Q8_0", "blk.*.attn_k_b.weight": "Q2_K"}
    other = plan.with_types(globs)
    changed = {t.tensor.name for t, u in zip(plan.tensors, other.tensors, strict=True) if t.type != u.type}
    assert {"blk.3.attn_output.weight", "blk.60.attn_output.weight", "blk.4.attn_q_a.weight"} <= changed
    # the first glob that matches counts, and shapes that a type cannot have fall back
    assert other["blk.3.attn_output.weight"].type == "Q5_K"
    assert other["blk.3.attn_q_a.weight"].rule == "with_types['blk.{3,4}.attn_*.weight']"
    assert (other["blk.5.attn_k_b.weight"].requested, other["blk.5.attn_k_b.weight"].type) == ("Q2_K", "Q4_0")
    assert other.tensor_bytes - plan.tensor_bytes == sum(
        u.nbytes - t.nbytes for t, u in zip(plan.tensors, other.tensors, strict=True)
    )
    again = other.with_types({"blk.*.attn_output.weight": "Q4_K"})
    assert again["blk.3.attn_output.weight"].type == "Q4_K"
    assert again["blk.3.attn_q_a.weight"].type == "Q8_0"
    assert plan.with_types({}) == plan


@pytest.mark.parametrize(
    ("types", "sentence"),
    [
        ({"blk.*.attn_outptu.weight": "Q4_K"}, "with_types['blk.*.attn_outptu.weight']: 'blk.*.attn_outptu.weight' "
         "matches no tensor (did you mean blk.*.attn_output.weight?)"),
        ({"output.weight": "Q4_L"}, "with_types['output.weight']: unknown type 'Q4_L' (did you mean IQ4_NL?)"),
        ({"[": "Q4_K"}, "with_types['[']: '[' has a '[' without its ']'"),
        ({"*": "Q4_K", "output.weight": "Q6_K"}, "with_types['output.weight']: the only tensor it matches is already "
         "taken by with_types['*']"),
    ],
)  # fmt: skip
def test_types_that_cannot_be(types: dict[str, str], sentence: str) -> None:
    with pytest.raises(qk.RecipeError) as e:
        qk.plan("deepseek-r1", "UD-IQ1_S").with_types(types)
    assert str(e.value) == sentence


def test_a_tensor_that_is_not_there() -> None:
    with pytest.raises(
        KeyError, match=r"no tensor 'blk\.3\.ffn_down_exp\.weight' \(did you mean blk\.3\.ffn_down_exps"
    ):
        _ = qk.plan("deepseek-r1", "UD-IQ1_S")["blk.3.ffn_down_exp.weight"]


def test_rows_there_and_back() -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((3, 512), np.float32)
    blocks = qk.quantize(rows, "iq2_xxs", rng.random(512, np.float32))
    assert (blocks.dtype.name, blocks.shape) == ("uint8", (3, 132))
    back = qk.dequantize(blocks, "IQ2_XXS", 512)
    assert (back.dtype.name, back.shape) == ("float32", (3, 512))
    assert float(np.corrcoef(rows.ravel(), back.ravel())[0, 1]) > 0.8
    with pytest.raises(qk.KernelError):
        qk.quantize(rows, "IQ2_XXS")


def test_a_recipe_from_its_text() -> None:
    text = "name: mine\nbase: UD-IQ1_S\nrules:\n- {match: output.weight, type: Q8_0, why: to see}\n"
    assert qk.plan("deepseek-r1", text)["output.weight"].type == "Q8_0"
    with pytest.raises(qk.RecipeError, match=r"^recipe:2 "):
        qk.load_recipe("name: mine\nbsae: UD-IQ1_S\n")


def test_a_plan_as_json_has_a_version(quantkit: Run) -> None:
    said = json.loads(quantkit("plan", "deepseek-v2-lite", "-r", "Q4_K_M", "--json").stdout)
    assert said["quantkit_plan"] == 1
