"""Names of pre-tokenizers: which the real llama.cpp loads, and the messages about others; and options of a checkpoint's
conversion that are given for a GGUF."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import factory
import pytest
from conftest import Run, Tools
from small_builds import NAMED, build, build_named, data, fields, llama_quantize, mixture

from quantkit.base.errors import RecipeError, SourceError, UnsupportedError
from quantkit.building.engines import Engine
from quantkit.building.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.gguf.header import STRING, decode, header_bytes, kv, read_header
from quantkit.gguf.pre_tokenizers import PRE_KEY, PRE_NAMES, unknown_pre
from quantkit.llama_cpp import toolchain
from quantkit.model.families.options import Options
from quantkit.model.families.tokenizer import PRE_TOKENIZERS
from quantkit.model.open import open_model
from quantkit.recipe.load import parse

#: loads files with the library of the tools, and reports for each whether it loaded
_LOAD = """
import ctypes, sys
class Params(ctypes.Structure):  # larger than llama_model_params: only what is passed on is read
    _fields_ = [("raw", ctypes.c_byte * 1024)]
llama = ctypes.CDLL(sys.argv[1])
llama.llama_model_default_params.restype = Params
llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Params]
llama.llama_model_load_from_file.restype = ctypes.c_void_p
llama.llama_model_free.argtypes = [ctypes.c_void_p]
llama.llama_backend_init()
for path in sys.argv[2:]:
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    print(int(bool(model)), flush=True)
    if model:
        llama.llama_model_free(model)
"""


def with_pre(path: Path, out: Path, pre: str) -> Path:
    """Copy a GGUF with another pre-tokenizer."""
    header = read_header(path)
    kvs = [kv(PRE_KEY, STRING, pre) if item.key == PRE_KEY else item for item in header.kvs]
    infos = [(t.name, t.shape, t.type, t.offset - header.data_offset) for t in header.tensors]
    out.write_bytes(header_bytes(kvs, infos) + path.read_bytes()[header.data_offset :])
    return out


@pytest.mark.tools
def test_llama_cpp_loads_these_and_no_others(tools: Tools, tmp_path: Path) -> None:
    """Every known name, every name that the converter writes, and some unknown ones, by the library itself."""
    small = {**factory.TINY_LLAMA, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = build_named(factory.dense_checkpoint(tmp_path / "m", small), tmp_path / "m.gguf", mixture("Q8_0"))
    (_, script), _ = toolchain.converter_command()
    converter = (Path(script).parent / "conversion" / "base.py").read_text("utf-8")
    written = set(re.findall(r'^\s*res = "([^"]+)"', converter, re.MULTILINE))
    assert len(written) > 60
    names = sorted(PRE_NAMES | written | {"deepseek-v3.1", "deepseek", "llama", "Qwen2", "deepseek-v3 "})
    files = [with_pre(model, tmp_path / f"{i}.gguf", name) for i, name in enumerate(names)]
    library = tools.quantize.resolve().parent / "libllama.so"
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(library), *map(str, files)],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {name for name, says in zip(names, done.stdout.split(), strict=True) if says == "1"}
    assert loaded == PRE_NAMES
    assert set(re.findall(r"unknown pre-tokenizer type: '(.*)'", done.stderr)) == set(names) - PRE_NAMES


def test_the_recognized_names_are_known() -> None:
    assert set(PRE_TOKENIZERS.values()) <= PRE_NAMES


NEAR = "llama.cpp knows no pre-tokenizer called 'deepseek-v3.1' (did you mean deepseek-v3?) and would not load the file"


def test_what_is_said_of_others() -> None:
    assert unknown_pre("deepseek-v3") is None
    assert unknown_pre("deepseek-v3.1") == NEAR
    far = unknown_pre("(not recognized)")
    assert far == (
        "llama.cpp knows no pre-tokenizer called '(not recognized)' and would not load the file; it knows "
        + ", ".join(sorted(PRE_NAMES))
    )


@pytest.mark.parametrize("source", ["deepseek-r1", "checkpoint", "gguf"])
def test_for_every_kind_of_source(v3: Path, sound: Path, source: str) -> None:
    path = {"checkpoint": str(v3), "gguf": str(sound)}.get(source, source)
    with pytest.raises(SourceError) as e:
        open_model(path, Options(pre="deepseek-v3.1"))
    assert str(e.value) == f"--pre: {NEAR}"


def test_in_every_command(quantkit: Run, v3: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    for command in (
        ("build", v3, "-o", out, "-r", "Q8_0"),
        ("plan", v3, "-r", "Q8_0"),
        ("inspect", v3),
        ("verify", tmp_path / "x.gguf", "-r", "Q8_0", "--source", v3),
    ):
        done = quantkit(*command, "--pre", "deepseek-v3.1")
        assert (done.returncode, done.stderr) == (4, f"error: --pre: {NEAR}\n"), command
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(("value", "says"), [("str:deepseek-v3.1", NEAR), ("int:3", "is int, not str")])
def test_in_a_recipe(value: str, says: str) -> None:
    head = "name: r\narch: [deepseek2]\nfile_type: Q8_0\nmetadata:\n"
    text = f"{head}  {PRE_KEY}: {value}\notherwise: mixture Q8_0\nrules: []\n"
    with pytest.raises(RecipeError) as e:
        parse(text, "r.yaml")
    assert str(e.value) == f"r.yaml:4 metadata: {PRE_KEY}: {says}"
    parse(text.replace(value, "str:deepseek-llm"), "r.yaml")


# ---------------------------------------------------------------- options of a conversion, for a GGUF


PAD = "tokenizer.ggml.padding_token_id"


@pytest.mark.tools
def test_a_gguf_gets_another_pre_tokenizer_and_padding(tools: Tools, tiny_bf16: Path, tmp_path: Path) -> None:
    """Both engines make the same file: llama-quantize's of the source, except for these keys."""
    options = Options(pre="deepseek-llm", pad_token="<think>")
    made = open_model(str(tiny_bf16), options)
    values = {item.key: decode(item) for item in made.kvs if item.key in (PRE_KEY, PAD)}
    assert values == {PRE_KEY: "deepseek-llm", PAD: 382}
    assert [i.key for i in made.kvs] == [i.key for i in open_model(str(tiny_bf16)).kvs]
    from quantkit.building.engines.native import NativeEngine
    from quantkit.planning.plan import make_plan

    files = []
    engines: tuple[Engine, ...] = (NativeEngine(), LlamaQuantizeEngine(tools.quantize))
    for i, engine in enumerate(engines):
        out = tmp_path / f"{i}.gguf"
        plan = make_plan(made, mixture("Q8_0"))
        files.append(build(plan, out, engine=engine))
    assert files[0].read_bytes() == files[1].read_bytes()
    stock = llama_quantize(tools, tiny_bf16, tmp_path / "stock.gguf", "", "Q8_0")
    assert data(files[0]) == data(stock)
    ours, theirs = fields(files[0]), fields(stock)
    assert {k for k in theirs if ours[k] != theirs[k]} == {PRE_KEY, PAD}


def test_on_the_command_line_too(quantkit: Run, sound: Path, tmp_path: Path) -> None:
    for command, *arguments in (("plan", "-r", "Q8_0"), ("fit", "--vram", "24")):
        done = quantkit(command, sound, *arguments, "--layout", "kv_b")
        assert (done.returncode, done.stderr) == (
            4,
            f"error: {sound}: --layout kv_b cannot be had from a GGUF, whose tensors stay as they are (here: k_b+v_b); "
            "leave it out, or give the checkpoint\n",
        )
    done = quantkit("build", sound, "-o", tmp_path / "o.gguf", "-r", "Q8_0", "--layout", "kv_b")
    assert done.returncode == 4
    assert not list(tmp_path.iterdir())
    explained = quantkit("recipe", "explain", "Q8_0", "output.weight", "--model", sound, "--layout", "kv_b")
    assert explained.returncode == 4
    # its own layout may be given, and the default need not be
    assert quantkit("fit", sound, "--vram", "24", "--layout", "k_b+v_b").returncode == 0
    # for models known only by their arch there is no layout to choose
    assert quantkit("recipe", "lint", "Q8_0", "--layout", "kv_b").returncode == 0


def test_a_layout_where_there_is_but_one(quantkit: Run) -> None:
    done = quantkit("plan", "deepseek-r1-distill-llama-8b", "-r", "Q8_0", "--layout", "kv_b")
    assert (done.returncode, done.stderr) == (
        5,
        "error: deepseek-r1-distill-llama-8b: --layout kv_b is of models with MLA (DeepSeek); llama has one layout "
        "only: leave it out\n",
    )
    with pytest.raises(UnsupportedError):
        open_model("deepseek-r1-distill-qwen-7b", Options("kv_b", layout_given=True))


def test_a_gguf_without_a_tokenizer(tmp_path: Path) -> None:
    path = factory.gguf_file(tmp_path / "x.gguf", {"token_embd.weight": ((32, 2), "F32", bytes(256))})
    for options, says in (
        (Options(pre="qwen2"), "--pre qwen2 means nothing here: it has no tokenizer; leave it out"),
        (Options(pad_token="2"), "--pad-token '2' means nothing here: it has no tokenizer; leave it out"),
    ):
        with pytest.raises(SourceError) as e:
            open_model(str(path), options)
        assert str(e.value) == f"{path}: {says}"


def test_a_gguf_of_sentencepiece(tmp_path: Path) -> None:
    kvs = [kv("general.architecture", STRING, "llama"), kv("tokenizer.ggml.model", STRING, "llama")]
    path = factory.gguf_file(tmp_path / "x.gguf", {"token_embd.weight": ((32, 2), "F32", bytes(256))}, kvs)
    with pytest.raises(SourceError) as e:
        open_model(str(path), Options(pre="qwen2"))
    assert str(e.value) == (
        f"{path}: --pre qwen2 means nothing here: its tokenizer, 'llama', has no pre-tokenizer; leave it out"
    )


def test_a_padding_token_that_a_gguf_has_not(sound: Path) -> None:
    with pytest.raises(SourceError) as e:
        open_model(str(sound), Options(pad_token="<nobody>"))
    assert str(e.value) == f"{sound}: --pad-token '<nobody>' is neither a token nor an id below 384"


def test_a_gguf_with_a_name_that_llama_cpp_does_not_know(sound: Path, tmp_path: Path) -> None:
    path = with_pre(sound, tmp_path / "x.gguf", "deepseek-v3.1")
    assert open_model(str(path)).notes == (f"{PRE_KEY} is 'deepseek-v3.1': {NEAR}; --pre names another",)
    assert open_model(str(path), Options(pre="deepseek-v3")).notes == ()


def test_a_config_alone_has_no_tokenizer(tmp_path: Path) -> None:
    notes = open_model("deepseek-r1", Options(pre="deepseek-v3", pad_token="2")).notes
    assert notes[1:] == ("--pre and --pad-token will count with the checkpoint: config.json alone has no tokenizer",)
    (tmp_path / "config.json").write_text(json.dumps(factory.TINY_LLAMA))
    assert open_model(str(tmp_path / "config.json"), NAMED).notes == (
        "--pre will count with the checkpoint: config.json alone has no tokenizer",
    )
