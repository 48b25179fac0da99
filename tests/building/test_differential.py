"""quantkit against the real tools: convert_hf_to_gguf.py, llama-quantize, llama-gguf-split, llama-perplexity.

Bytes are compared; whole files if the tools make whole files. The rules given to llama-quantize are written here by
hand or tensor by tensor, not by the engine under test.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import factory
import numpy as np
import pytest
from conftest import Run, Tools
from small_builds import data, fields, llama_quantize, uniform

from quantkit.base.errors import ToolError
from quantkit.building import run as builds
from quantkit.building.engines import Engine
from quantkit.building.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.building.engines.native import NativeEngine
from quantkit.gguf.types import QTYPES
from quantkit.imatrix.matrix import open_imatrix
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan, make_plan
from quantkit.recipe.load import Recipe, load, parse

pytestmark = pytest.mark.tools

#: the policy of UD-IQ1_S as unanchored regular expressions, as a person would give it to llama-quantize
UD_IQ1_S = r"""
^token_embd\.weight$=q4_K
^output\.weight$=q6_K
attn_kv_a_mqa\.weight$=q6_K
attn_(kv_b|k_b|v_b)\.weight$=q6_K
attn_(q|q_a|q_b|output)\.weight$=q4_K
ffn_(gate|up)\.weight$=q4_K
ffn_down\.weight$=q6_K
ffn_(gate|up)_shexp\.weight$=q5_K
ffn_down_shexp\.weight$=q6_K
ffn_down_exps\.weight$=iq2_xxs
ffn_(gate|up|down)_exps\.weight$=iq1_s
"""


def build(
    source: Path,
    out: Path,
    recipe: Recipe,
    imatrix: Path | None = None,
    engine: Engine | None = None,
    n_threads: int = 2,
    split: int | None = None,
    allow_requantize: bool = False,
    layout: str = "k_b+v_b",
) -> Plan:
    """`quantkit build` in this process, where ggml sorts its grids only once for all tests."""
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    plan = make_plan(open_model(str(source), Options(layout, "deepseek-v3")), recipe, weights)
    ready = builds.prepare(plan, out, weights, split, allow_requantize=allow_requantize)
    builds.run(ready, engine or NativeEngine(), n_threads, lambda _name, _n: None)
    return plan


@pytest.fixture(scope="module")
def stock(tools: Tools, tiny_bf16: Path, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: UD-IQ1_S by the converter and llama-quantize."""
    out = tmp_path_factory.mktemp("stock") / "stock.gguf"
    return llama_quantize(tools, tiny_bf16, out, UD_IQ1_S, "IQ1_S", tiny_imatrix)


# ---------------------------------------------------------------- against the converter


def test_bf16_equals_the_converter(tiny_v3: Path, tiny_bf16: Path, tmp_path: Path) -> None:
    out = tmp_path / "bf16.gguf"
    build(tiny_v3, out, uniform("BF16", "BF16"))
    assert data(out) == data(tiny_bf16)
    assert fields(out) == fields(tiny_bf16)


def test_v2_lite_equals_the_converter(tools: Tools, tmp_path: Path) -> None:
    """No q_lora, softmax gating, BF16 weights; with a model card and sampling defaults."""
    model = factory.checkpoint(tmp_path / "Tiny-V2-Lite-Chat", factory.TINY_V2, n_shards=1)
    (model / "README.md").write_text(
        "---\nlicense: mit\ntags: [moe]\nlanguage: [en]\nbase_model: org/Base-7B\n---\n# Tiny\n"
    )
    (model / "generation_config.json").write_text('{"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.1}')
    stock = tools.convert(model, tmp_path / "stock.gguf", "deepseek-llm")
    out = tmp_path / "ours.gguf"
    plan = make_plan(open_model(str(model), Options(pre="deepseek-llm")), uniform("BF16", "BF16"))
    builds.run(builds.prepare(plan, out), NativeEngine(), 2, lambda _name, _n: None)
    assert data(out) == data(stock)
    assert fields(out) == fields(stock)


@pytest.mark.parametrize(
    "post",
    [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
                {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<｜begin▁of▁sentence｜>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [
                        {"SpecialToken": {"id": "<｜begin▁of▁sentence｜>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"SpecialToken": {"id": "<｜begin▁of▁sentence｜>", "type_id": 0}},
                        {"Sequence": {"id": "B", "type_id": 1}},
                    ],
                    "special_tokens": {
                        "<｜begin▁of▁sentence｜>": {
                            "id": "<｜begin▁of▁sentence｜>",
                            "ids": [0],
                            "tokens": ["<｜begin▁of▁sentence｜>"],
                        }
                    },
                },
            ],
        },
    ],
    ids=["byte-level", "template"],
)
def test_tokenizer_keys_equal_the_converter(tools: Tools, v3: Path, tmp_path: Path, post: Mapping[str, object]) -> None:
    factory.edit_json(v3 / "tokenizer.json", lambda t: t.update(post_processor=post))
    stock = tools.convert(v3, tmp_path / "stock.gguf")
    ours = {item.key: item for item in open_model(str(v3), Options(pre="deepseek-v3")).kvs}
    theirs = fields(stock)
    assert list(ours) == list(theirs)
    out = tmp_path / "ours.gguf"
    build(v3, out, uniform("BF16", "BF16"))
    assert fields(out) == theirs


# ---------------------------------------------------------------- against llama-quantize


def test_fp8_equals_converter_and_llama_quantize(
    stock: Path, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ours.gguf"
    build(tiny_v3, out, load("UD-IQ1_S"), tiny_imatrix)
    assert out.read_bytes() == stock.read_bytes()


@pytest.mark.parametrize(("n_threads", "slab_values"), [(1, 1 << 20), (2, 1 << 20), (3, 5000), (2, 256)])
def test_gguf_source_equals_llama_quantize(
    stock: Path, tiny_bf16: Path, tiny_imatrix: Path, tmp_path: Path, n_threads: int, slab_values: int
) -> None:
    out = tmp_path / "ours.gguf"
    build(tiny_bf16, out, load("UD-IQ1_S"), tiny_imatrix, NativeEngine(slab_values), n_threads)
    assert out.read_bytes() == stock.read_bytes()


@pytest.mark.parametrize("source", ["fp8", "gguf"])
def test_engine_llama_quantize(
    tools: Tools, stock: Path, tiny_v3: Path, tiny_bf16: Path, tiny_imatrix: Path, tmp_path: Path, source: str
) -> None:
    out = tmp_path / "ours.gguf"
    engine = LlamaQuantizeEngine(tools.quantize)
    build(tiny_v3 if source == "fp8" else tiny_bf16, out, load("UD-IQ1_S"), tiny_imatrix, engine)
    assert out.read_bytes() == stock.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["ours.gguf"]


def test_engine_llama_quantize_one_tensor_a_run(
    tools: Tools, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    recipe = load("UD-Q2_K_XL")
    build(tiny_v3, tmp_path / "native.gguf", recipe, tiny_imatrix)
    build(tiny_v3, tmp_path / "driven.gguf", recipe, tiny_imatrix, LlamaQuantizeEngine(tools.quantize, batch_bytes=1))
    assert (tmp_path / "native.gguf").read_bytes() == (tmp_path / "driven.gguf").read_bytes()


#: as many types as the model has kinds of tensors, so that every kernel is compared in a whole file
ZOO = {
    "token_embd": "Q4_0", "output": "Q8_0", "attn_k_b": "Q5_K", "attn_v_b": "IQ2_S", "attn_kv_a_mqa": "Q5_1",
    "attn_q_a": "IQ4_XS", "attn_q_b": "IQ3_S", "attn_output": "Q3_K", "ffn_gate": "IQ4_NL", "ffn_up": "Q4_1",
    "ffn_down": "Q5_0", "ffn_gate_shexp": "IQ2_XS", "ffn_up_shexp": "IQ3_XXS", "ffn_down_shexp": "TQ2_0",
    "ffn_gate_exps": "Q2_K", "ffn_up_exps": "IQ1_M", "ffn_down_exps": "TQ1_0",
}  # fmt: skip


def zoo(types: Mapping[str, str], file_type: str) -> Recipe:
    # `*output.weight` would match attn_output too
    rules = [(("" if k == "output" else "*") + f"{k}.weight", v) for k, v in types.items()]
    rows = "".join(f'  - {{match: "{match}", type: {v}, why: t}}\n' for match, v in rules)
    return parse(f"name: zoo\narch: [deepseek2]\nfile_type: {file_type}\nrules:\n{rows}", "zoo.yaml")


def regexes(types: Mapping[str, str]) -> str:
    return "".join(rf"{'^' if k == 'output' else '(^|[.])'}{k}\.weight$={v.lower()}" + "\n" for k, v in types.items())


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_every_type_with_an_imatrix(
    tools: Tools, tiny_bf16: Path, tiny_imatrix: Path, tmp_path: Path, form: str
) -> None:
    imatrix = tiny_imatrix
    if form == "dat":
        whole = open_imatrix(str(tiny_imatrix))
        rng = np.random.default_rng(3)
        values = {n: (37, rng.lognormal(0, 2, e.n_values).astype(np.float32)) for n, e in whole.entries.items()}
        imatrix = factory.legacy_imatrix(tmp_path / "imatrix.dat", values)
    stock = llama_quantize(tools, tiny_bf16, tmp_path / "stock.gguf", regexes(ZOO), "Q2_K", imatrix)
    out = tmp_path / "ours.gguf"
    plan = build(tiny_bf16, out, zoo(ZOO, "Q2_K"), imatrix)
    assert {t.requested for t in plan.tensors if t.rule} == set(ZOO.values())
    assert out.read_bytes() == stock.read_bytes()


def test_without_an_imatrix(tools: Tools, tiny_bf16: Path, tmp_path: Path) -> None:
    plain = {k: v if not QTYPES[v].needs_imatrix else "Q6_K" for k, v in ZOO.items()}
    stock = llama_quantize(tools, tiny_bf16, tmp_path / "stock.gguf", regexes(plain), "Q4_K_M")
    out = tmp_path / "ours.gguf"
    build(tiny_bf16, out, zoo(plain, "Q4_K_M"))
    assert out.read_bytes() == stock.read_bytes()


@pytest.mark.parametrize("base", ["F16", "F32"])
def test_float_sources(tools: Tools, tiny_bf16: Path, tmp_path: Path, base: str) -> None:
    """From F16 and F32 files that llama-quantize made of the BF16 one."""
    source = llama_quantize(tools, tiny_bf16, tmp_path / "source.gguf", "", base)
    stock = llama_quantize(tools, source, tmp_path / "stock.gguf", ".*=q4_K", "Q4_K_S")
    out = tmp_path / "ours.gguf"
    build(source, out, uniform("Q4_K", "Q4_K_S"))
    assert out.read_bytes() == stock.read_bytes()


@pytest.mark.parametrize("type_", ["F16", "F32"])
def test_float_types(tools: Tools, tiny_bf16: Path, tmp_path: Path, type_: str) -> None:
    stock = llama_quantize(tools, tiny_bf16, tmp_path / "stock.gguf", "", type_)
    for engine in (NativeEngine(), LlamaQuantizeEngine(tools.quantize)):
        out = tmp_path / f"{engine.name}.gguf"
        build(tiny_bf16, out, uniform(type_, type_), engine=engine)
        assert out.read_bytes() == stock.read_bytes()


def test_requantize(tools: Tools, tiny_bf16: Path, tmp_path: Path) -> None:
    """From Q8_0 to a mix that includes Q8_0: some tensors are copied, others dequantized first."""
    source = llama_quantize(tools, tiny_bf16, tmp_path / "source.gguf", ".*=q8_0", "Q8_0")
    stock = llama_quantize(
        tools, source, tmp_path / "stock.gguf", "exps=q4_K\n.*=q8_0", "Q4_K_S", None, "--allow-requantize"
    )
    text = '  - {match: "*exps*", type: Q4_K, why: t}\n  - {match: "*", type: Q8_0, why: t}\n'
    recipe = parse(f"name: z\narch: [deepseek2]\nfile_type: Q4_K_S\nrules:\n{text}", "z.yaml")
    for engine in (NativeEngine(), LlamaQuantizeEngine(tools.quantize)):
        out = tmp_path / f"{engine.name}.gguf"
        build(source, out, recipe, engine=engine, allow_requantize=True)
        assert out.read_bytes() == stock.read_bytes()


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("engine", ["native", "llama-quantize"])
@pytest.mark.parametrize("limit", [1_000_000, 100_000_000])
def test_shards_equal_llama_gguf_split(
    tools: Tools, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, limit: int, engine: str
) -> None:
    recipe = load("UD-Q2_K_XL")
    build(tiny_v3, tmp_path / "whole.gguf", recipe, tiny_imatrix)
    command = [str(tools.gguf_split), "--split", "--split-max-size", f"{limit // 1_000_000}M"]
    subprocess.run([*command, str(tmp_path / "whole.gguf"), str(tmp_path / "stock")], check=True, capture_output=True)
    (tmp_path / "ours").mkdir()
    chosen = NativeEngine() if engine == "native" else LlamaQuantizeEngine(tools.quantize)
    build(tiny_v3, tmp_path / "ours" / "stock.gguf", recipe, tiny_imatrix, chosen, split=limit)
    theirs = {p.name: p.read_bytes() for p in tmp_path.glob("stock-*.gguf")}
    ours = {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()}
    assert ours == theirs
    assert len(ours) >= (1 if limit > 10_000_000 else 2)


def test_split_source(tools: Tools, tiny_bf16: Path, tiny_imatrix: Path, stock: Path, tmp_path: Path) -> None:
    command = [str(tools.gguf_split), "--split", "--split-max-tensors", "10", str(tiny_bf16), str(tmp_path / "bf16")]
    subprocess.run(command, check=True, capture_output=True)
    first = sorted(tmp_path.glob("bf16-00001-of-*.gguf"))[0]
    for engine in (NativeEngine(), LlamaQuantizeEngine(tools.quantize)):
        out = tmp_path / f"{engine.name}.gguf"
        build(first, out, load("UD-IQ1_S"), tiny_imatrix, engine)
        assert out.read_bytes() == stock.read_bytes()


# ---------------------------------------------------------------- what llama.cpp makes of it


def perplexity(tools: Tools, model: Path, folder: Path) -> float:
    text = folder / "text.txt"
    text.write_text("The bits go where they matter, and every token passes through the shared expert. " * 80)
    command = [str(tools.perplexity), "-m", str(model), "-f", str(text), "-c", "128", "--chunks", "8", "-t", "2"]
    for _ in range(5):  # it loses the end of its output on a busy machine; one chunk of eight is enough
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        m = re.search(r"\[4\]([0-9.]+),", done.stdout + done.stderr)
        if m:
            return float(m[1])
    raise AssertionError(done.stdout[-500:])


@pytest.mark.parametrize("layout", ["k_b+v_b", "kv_b"])
def test_llama_cpp_runs_it(tools: Tools, tiny_v3: Path, tiny_bf16: Path, tmp_path: Path, layout: str) -> None:
    """Both layouts of MLA give the same model as the converter's file."""
    out = tmp_path / "ours.gguf"
    build(tiny_v3, out, uniform("BF16", "BF16"), layout=layout)
    # the layouts order the same sums differently, and round keys and values to F16 in different places
    assert perplexity(tools, out, tmp_path) == pytest.approx(perplexity(tools, tiny_bf16, tmp_path), rel=0.01)


#: in sh, for a fake binary: answers --help
ITS_HELP = '[ "$1" = --help ] && echo --tensor-type-file && exit 1'
#: in sh: find the files that llama-quantize would read and write
FILES = "for a; do case $a in *piece.gguf|*bf16.gguf) in=$a;; *made.gguf|*.whole) out=$a;; esac; done"


@pytest.mark.parametrize("source", ["checkpoint", "gguf"])
@pytest.mark.parametrize(
    ("does", "what"),
    [
        ("exit 0", "{} ended without an error, but made no file; is it a llama-quantize?"),
        ("echo no > $out", "{} ended without an error, but made no sound GGUF ("),
        ("cp $in $out", "llama-quantize made BF16 of "),
        ("kill -9 $$", "{} was ended by SIGKILL; it said nothing"),
    ],
)
def test_a_binary_that_gives_something_else(
    tiny_v3: Path, tiny_bf16: Path, tmp_path: Path, source: str, does: str, what: str
) -> None:
    fake = tmp_path / "fake"
    fake.write_text(f"#!/bin/sh\n{ITS_HELP}\n{FILES}\n{does}\n")
    fake.chmod(0o755)
    given = tmp_path / "bf16.gguf"
    given.symlink_to(tiny_bf16)
    with pytest.raises(ToolError) as e:
        build(
            tiny_v3 if source == "checkpoint" else given, tmp_path / "o.gguf", uniform("Q4_K", "Q4_K_M"),
            engine=LlamaQuantizeEngine(fake),
        )  # fmt: skip
    assert str(e.value).startswith(what.format(fake))
    assert not (tmp_path / "o.gguf").exists()


def test_failure_of_the_binary_is_reported(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    fake = tmp_path / "llama-quantize"
    fake.write_text(
        f"#!/bin/sh\n{ITS_HELP}\necho 'main: build = 1'\necho 'something went wrong with tensor x' >&2\nexit 7\n"
    )
    fake.chmod(0o755)
    recipe = tmp_path / "r.yaml"
    recipe.write_text('name: all\narch: [deepseek2]\nfile_type: Q4_K_M\nrules:\n  - {match: "*", type: Q4_K, why: t}\n')
    args = ["build", tiny_v3, "-o", tmp_path / "o.gguf", "--recipe", recipe, "--pre", "deepseek-v3", "-q"]
    done = quantkit(*args, "--engine", "llama-quantize", "--llama-quantize", fake)
    assert done.returncode == 10
    last_words = "  main: build = 1\n  something went wrong with tensor x\n"
    assert done.stderr == f"error: {fake} failed with exit code 7; its last words:\n{last_words}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama-quantize", "r.yaml"]


def test_a_binary_that_does_something_else_is_caught(
    quantkit: Run, tools: Tools, tiny_v3: Path, tmp_path: Path
) -> None:
    """A llama-quantize that ignores its rules: the result is checked against the plan."""
    fake = tmp_path / "llama-quantize"
    fake.write_text(f'#!/bin/sh\n{ITS_HELP}\nexec {tools.quantize} --tensor-type output=q5_0 "$@"\n')
    fake.chmod(0o755)
    recipe = tmp_path / "r.yaml"
    recipe.write_text('name: all\narch: [deepseek2]\nfile_type: Q4_K_M\nrules:\n  - {match: "*", type: Q4_K, why: t}\n')
    args = ["build", tiny_v3, "-o", tmp_path / "o.gguf", "--recipe", recipe, "--pre", "deepseek-v3", "-q"]
    done = quantkit(*args, "--engine", "llama-quantize", "--llama-quantize", fake)
    assert done.returncode == 10
    assert "llama-quantize made Q5_0 of" in done.stderr
    assert "for 'output.weight', but the plan says Q4_K of" in done.stderr
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize("engine", ["native", "llama-quantize"])
def test_metadata_of_a_recipe_equals_override_kv(tools: Tools, tiny_bf16: Path, tmp_path: Path, engine: str) -> None:
    """New keys, and an existing one, which moves to the end."""
    overrides = {
        "general.author": "str:somebody: her work",
        "general.name": "str:Another",
        "x.int": "int:7",
        "x.float": "float:0.1",
        "x.bool": "bool:true",
    }
    lines = "".join(f"  {k}: '{v}'\n" for k, v in overrides.items())
    text = f"name: r\narch: [deepseek2]\nfile_type: Q4_K_M\nmetadata:\n{lines}otherwise: mixture Q4_K_M\n"
    options = [word for k, v in overrides.items() for word in ("--override-kv", f"{k}={v}")]
    stock = tmp_path / "stock.gguf"
    command = [str(tools.quantize), *options, str(tiny_bf16), str(stock), "Q4_K_M", "2"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "ours.gguf"
    driver = NativeEngine() if engine == "native" else LlamaQuantizeEngine(tools.quantize)
    build(tiny_bf16, out, parse(text, "r.yaml"), engine=driver)
    assert out.read_bytes() == stock.read_bytes()
