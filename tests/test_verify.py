"""`quantkit verify`: planted damage is caught and named, sound files of every maker pass."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
import torch
from conftest import Run, Tools

from quantkit import build as builds
from quantkit import kernels, toolchain
from quantkit.arch.options import Options
from quantkit.engines import Engine
from quantkit.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.engines.native import NativeEngine
from quantkit.errors import ImatrixError, KernelError, SourceError
from quantkit.exchange import tensor_type_file
from quantkit.gguf_format import BOOL, KV, STRING, U16, U32, TensorInfo, header_bytes, kv, read_header
from quantkit.imatrix import open_imatrix
from quantkit.models import open_model
from quantkit.plan import Plan, make_plan
from quantkit.qtypes import INTEGER_TYPES, QTYPES
from quantkit.recipe import Recipe, load, parse
from quantkit.verify import attestation, manifest
from quantkit.verify.against_plan import expected_of, read_plan
from quantkit.verify.derive import e4m3_values, to_bf16
from quantkit.verify.ggml import Ggml
from quantkit.verify.rederive import Rows, choose, parse_sample
from quantkit.verify.run import Outcome, Request, verify
from quantkit.verify.scan import bad_blocks
from quantkit.verify.verdict import KEPT_EACH, Finding, Findings, Verdict

OPTIONS = Options(pre="deepseek-v3")


def rules(*lines: str) -> Recipe:
    head = "name: r\narch: [deepseek2, llama, qwen2]\nfile_type: Q4_K_M\nrules:\n"
    return parse(head + "".join(f"  - {{{line}, optional: true, why: t}}\n" for line in lines), "r.yaml")


#: types with one, two and no scales, at the start and at the end of a block; floats; a fallback (attn_k_b)
MIX = rules(
    'match: "*ffn_down_exps*", type: IQ2_XXS',
    'match: "*ffn_gate_exps*", type: Q2_K',
    'match: "*ffn_up_exps*", type: Q2_K',
    'match: "token_embd.weight", type: F16',
    'match: "output.weight", type: Q6_K',
    'match: "*attn_kv_a*", type: BF16',
    'match: "*attn_output*", type: Q8_0',
    'match: "*", type: Q4_K',
)


MINE = """name: mine
arch: [deepseek2]
file_type: Q8_0
rules:
  - {match: "*", type: Q8_0, why: t}
"""


class Silent:
    """Progress that nobody sees."""

    def start(self, stage: str, total: int, unit: str) -> None:
        pass

    def advance(self, n: int) -> None:
        pass


def plan_of(source: Path, recipe: Recipe, imatrix: Path | None, options: Options = OPTIONS) -> Plan:
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    return make_plan(open_model(str(source), options), recipe, weights)


def build(
    plan: Plan, out: Path, imatrix: Path | None = None, split: int | None = None, engine: Engine | None = None,
    allow_requantize: bool = False,
) -> Path:  # fmt: skip
    """Build, and return the file or the first shard."""
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    ready = builds.prepare(plan, out, weights, split, allow_requantize=allow_requantize)
    builds.run(ready, engine or NativeEngine(), 2, lambda _name, _n: None)
    return ready.files[0][0]


def check(
    out: Path, plan: Plan | None = None, imatrix: Path | None = None, sample: str | None = "all",
    pinned: Path | None = None, **more: Any,
) -> Verdict:  # fmt: skip
    return outcome_of(out, plan, imatrix, sample, pinned, **more).verdict


def outcome_of(
    out: Path, plan: Plan | None = None, imatrix: Path | None = None, sample: str | None = "all",
    pinned: Path | None = None, **more: Any,
) -> Outcome:  # fmt: skip
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    rows = None
    if plan is not None and sample is not None and plan.catalogue.source is not None:
        rows = Rows(plan.catalogue, plan.catalogue.source, weights, Ggml(pinned), parse_sample(sample), 0)
    expected = None if plan is None else expected_of(plan)
    return verify(Request(out, expected, plan, weights, rows=rows, n_threads=2, **more), Silent())


# ---------------------------------------------------------------- sound files


@pytest.fixture(scope="module")
def made(tiny_v3: Path, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound build of tiny_v3 with MIX; read it, do not change it."""
    out = tmp_path_factory.mktemp("made") / "tiny.gguf"
    return build(plan_of(tiny_v3, MIX, tiny_imatrix), out, tiny_imatrix)


@pytest.fixture(scope="module")
def split(tiny_v3: Path, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards: a folder."""
    out = tmp_path_factory.mktemp("split") / "tiny.gguf"
    return build(plan_of(tiny_v3, MIX, tiny_imatrix), out, tiny_imatrix, split=500_000).parent


@pytest.fixture(scope="module")
def plan(tiny_v3: Path, tiny_imatrix: Path) -> Plan:
    return plan_of(tiny_v3, MIX, tiny_imatrix)


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` to damage."""
    return Path(shutil.copy(made, tmp_path / "tiny.gguf"))


@pytest.fixture
def shards(split: Path, tmp_path: Path) -> list[Path]:
    """A copy of `split` to damage."""
    return sorted(Path(shutil.copytree(split, tmp_path / "split")).glob("*.gguf"))


def test_a_sound_file_passes_every_level(made: Path, plan: Plan, tiny_imatrix: Path) -> None:
    verdict = check(made, plan, tiny_imatrix)
    assert verdict.findings.kept() == []
    n_rows = sum(t.n_rows for t in plan.catalogue.tensors)
    assert verdict.checked == ["structure", "plan", "metadata", "scales", f"all {n_rows:,} rows"]
    assert verdict.line().startswith(f"OK: 1 file, {len(plan.tensors)} tensors, {made.stat().st_size:,} bytes; checked")


@pytest.mark.parametrize("which", [0, 1, -1])
def test_sound_shards_pass_whichever_is_given(split: Path, plan: Plan, tiny_imatrix: Path, which: int) -> None:
    paths = sorted(split.glob("*.gguf"))
    assert len(paths) > 2
    verdict = check(paths[which], plan, tiny_imatrix, "1%")
    assert verdict.findings.kept() == []
    assert [name for name, _ in verdict.files] == [p.name for p in paths]


SOURCES: dict[str, Callable[[Path], Path]] = {
    "v2": lambda d: factory.checkpoint(d / "V2", factory.TINY_V2),
    "llama, all dtypes": lambda d: factory.dense_checkpoint(
        d / "L", factory.TINY_LLAMA, ("bfloat16", "float16", "float32")
    ),
    "qwen2": lambda d: factory.dense_checkpoint(d / "Q", factory.TINY_QWEN2),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sound_files_of_other_sources_pass(source: str, tmp_path: Path) -> None:
    made = plan_of(SOURCES[source](tmp_path), rules('match: "*attn_*", type: Q8_0', 'match: "*", type: Q4_K'), None)
    verdict = check(build(made, tmp_path / "out.gguf"), made)
    assert verdict.findings.kept() == []
    assert verdict.checked[-1].startswith("all ")


def test_a_sound_file_of_the_kv_b_layout_passes(tiny_v3: Path, tmp_path: Path) -> None:
    made = plan_of(tiny_v3, rules('match: "*", type: Q5_K'), None, OPTIONS._replace(layout="kv_b"))
    assert check(build(made, tmp_path / "out.gguf"), made).ok


def test_a_gguf_source_is_derived_too_copied_and_quantized_again(tiny_v3: Path, tmp_path: Path) -> None:
    first = rules('match: "*_exps*", type: Q8_0', 'match: "*attn*", type: Q6_K', 'match: "*", type: BF16')
    q8 = build(plan_of(tiny_v3, first, None), tmp_path / "q8.gguf")
    second = plan_of(
        q8, rules('match: "*_exps*", type: Q4_0', 'match: "*attn*", type: Q6_K', 'match: "*", type: F16'), None
    )
    again = build(second, tmp_path / "again.gguf", allow_requantize=True)
    assert check(again, second).findings.kept() == []
    # the same types from the original are other bytes: what is compared is the source that was given
    original = plan_of(tiny_v3, second.recipe, None)
    tensors = {f.tensor.split(".")[-2] for f in check(again, original).findings.kept() if f.kind == "row"}
    assert "ffn_down_exps" in tensors


#: what llama-quantize takes as a base type only, or not at all
NOT_BY_RULE = ("MXFP4", "NVFP4", "Q1_0", "Q2_0")
ALL_TYPES = [n for n in QTYPES if n not in INTEGER_TYPES]


@pytest.mark.tools
@pytest.mark.parametrize("engine", ["native", "llama-quantize"])
def test_every_type_of_either_engine_passes(
    tools: Tools, engine: str, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    pinned = toolchain.ggml_library()
    names = [n for n in ALL_TYPES if n != "F32" and (engine == "native" or n not in NOT_BY_RULE)]
    matrices = [
        t.name for t in open_model(str(tiny_v3), OPTIONS).tensors
        if t.quantizable and t.layer is not None and t.n_cols % 256 == 0
    ]  # fmt: skip
    assert len(matrices) >= len(names)
    lines = [f'match: "{tensor}", type: {name}' for name, tensor in zip(names, matrices, strict=False)]
    made = plan_of(tiny_v3, rules(*lines, 'match: "*", type: Q8_0'), tiny_imatrix)
    assert set(names) <= set(made.types())
    runner = NativeEngine() if engine == "native" else LlamaQuantizeEngine(tools.quantize)
    out = build(made, tmp_path / "out.gguf", tiny_imatrix, engine=runner)
    assert check(out, made, tiny_imatrix, pinned=pinned).findings.kept() == []


@pytest.mark.tools
def test_what_llama_quantize_itself_makes_passes(
    tools: Tools, tiny_bf16: Path, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    made = plan_of(tiny_v3, load("UD-IQ1_S"), tiny_imatrix)
    types = tmp_path / "types"
    types.write_text(tensor_type_file(made.tensors))
    out = tmp_path / "out.gguf"
    subprocess.run(
        [tools.quantize, "--imatrix", tiny_imatrix, "--tensor-type-file", types, tiny_bf16, out, "IQ1_S"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert check(out, made, tiny_imatrix).findings.kept() == []
    # and as shards of llama-gguf-split
    subprocess.run([tools.gguf_split, "--split-max-tensors", "9", out, tmp_path / "s"], check=True, capture_output=True)
    verdict = check(tmp_path / "s-00001-of-00006.gguf", made, tiny_imatrix, "1%")
    assert (len(verdict.files), verdict.findings.kept()) == (6, [])


# ---------------------------------------------------------------- planted damage


def poke(path: Path, at: int, raw: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(raw)


def flip(path: Path, at: int, bit: int = 0) -> None:
    blob = path.read_bytes()
    poke(path, at, bytes([blob[at] ^ 1 << bit]))


def info_of(path: Path, name: str) -> TensorInfo:
    return next(t for t in read_header(path).tensors if t.name == name)


def swap(path: Path, a: TensorInfo | tuple[int, int], b: TensorInfo | tuple[int, int]) -> None:
    """Exchange two stretches (offset, bytes) of a file."""
    (p, n), (q, m) = ((x.offset, x.nbytes) if isinstance(x, TensorInfo) else x for x in (a, b))
    assert n == m
    blob = path.read_bytes()
    poke(path, p, blob[q : q + n])
    poke(path, q, blob[p : p + n])


Infos = list[tuple[str, tuple[int, ...], str, int]]


def rewrite(path: Path, change: Callable[[list[KV], Infos], Any]) -> None:
    """Write a header anew after `change` of its keys and tensors (name, shape, type, offset); the data stay."""
    h = read_header(path)
    kvs = list(h.kvs)
    infos: Infos = [(t.name, t.shape, t.type, t.offset - h.data_offset) for t in h.tensors]
    change(kvs, infos)
    path.write_bytes(header_bytes(kvs, infos) + path.read_bytes()[h.data_offset :])


def entry(path: Path, name: str) -> int:
    """Where the header's entry of a tensor begins."""
    raw = name.encode()
    return path.read_bytes().index(struct.pack("<Q", len(raw)) + raw)


def after_name(path: Path, name: str, field: str) -> int:
    """Where a field of a tensor's entry is."""
    at = entry(path, name) + 8 + len(name)
    n = struct.unpack_from("<I", path.read_bytes(), at)[0]
    return {"dims": at, "shape": at + 4, "type": at + 4 + 8 * n, "offset": at + 8 + 8 * n}[field]


def padded(path: Path) -> TensorInfo:
    return next(t for t in read_header(path).tensors if t.nbytes % 32)


def set_key(kvs: list[KV], item: KV) -> None:
    i = next(i for i, have in enumerate(kvs) if have.key == item.key)
    kvs[i] = item


GATE, UP, DOWN = (f"blk.1.ffn_{x}_exps.weight" for x in ("gate", "up", "down"))


def insert(path: Path, at: int, raw: bytes) -> None:
    blob = path.read_bytes()
    path.write_bytes(blob[:at] + raw + blob[at:])


def exchange_names(kvs: list[KV], infos: Infos) -> None:
    i, j = (next(k for k, t in enumerate(infos) if t[0] == n) for n in (GATE, UP))
    infos[i], infos[j] = (UP, *infos[i][1:]), (GATE, *infos[j][1:])


def exchange_offsets(kvs: list[KV], infos: Infos) -> None:
    i, j = (next(k for k, t in enumerate(infos) if t[0] == n) for n in (GATE, UP))
    infos[i], infos[j] = (*infos[i][:3], infos[j][3]), (*infos[j][:3], infos[i][3])


def retype(name: str, type_: str) -> Callable[[list[KV], Infos], None]:
    def change(_kvs: list[KV], infos: Infos) -> None:
        i = next(k for k, t in enumerate(infos) if t[0] == name)
        infos[i] = (name, infos[i][1], type_, infos[i][3])

    return change


def reshape(name: str, shape: tuple[int, ...]) -> Callable[[list[KV], Infos], None]:
    def change(_kvs: list[KV], infos: Infos) -> None:
        i = next(k for k, t in enumerate(infos) if t[0] == name)
        infos[i] = (name, shape, *infos[i][2:])

    return change


def move(name: str, by: int) -> Callable[[list[KV], Infos], None]:
    def change(_kvs: list[KV], infos: Infos) -> None:
        i = next(k for k, t in enumerate(infos) if t[0] == name)
        infos[i] = (*infos[i][:3], infos[i][3] + by)

    return change


def drop_last_tensor(path: Path) -> None:
    n = read_header(path).tensors[-1].nbytes
    rewrite(path, lambda _kvs, infos: infos.pop())
    path.write_bytes(path.read_bytes()[: -(n + -n % 32)])


def shift_rows(path: Path, name: str) -> None:
    """Each row of a tensor one place further, the last one first."""
    t = info_of(path, name)
    n_rows = int(np.prod(t.shape[1:]))
    rows = np.frombuffer(path.read_bytes()[t.offset : t.offset + t.nbytes], np.uint8).reshape(n_rows, -1)
    poke(path, t.offset, np.roll(rows, 1, axis=0).tobytes())


def zero_row(path: Path, name: str, row: int) -> None:
    t = info_of(path, name)
    n = t.nbytes // int(np.prod(t.shape[1:]))
    poke(path, t.offset + row * n, bytes(n))


def expert(path: Path, name: str, i: int) -> tuple[int, int]:
    t = info_of(path, name)
    n = t.nbytes // t.shape[2]
    return t.offset + i * n, n


def token_changed(path: Path) -> None:
    raw = b"<t9>" if b"<t9>" in path.read_bytes() else None
    item = next(i for i in read_header(path).kvs if i.key == "tokenizer.ggml.tokens")
    at = path.read_bytes().index(item.payload)
    assert raw is None or at
    # the first byte of the first token's text: 4 element type, 8 count, 8 length
    flip(path, at + 20, 1)


def key_twice(path: Path) -> None:
    h = read_header(path)
    kvs = [*h.kvs, h.kvs[0]]
    infos = [(t.name, t.shape, t.type, t.offset - h.data_offset) for t in h.tensors]
    path.write_bytes(header_bytes(kvs, infos) + path.read_bytes()[h.data_offset :])


def assert_found(verdict: Verdict, kind: str, says: str) -> None:
    """Not OK, and a finding of that kind says what the pattern does."""
    assert not verdict.ok
    assert verdict.line().startswith("DAMAGED: ")
    assert any(f.kind == kind and re.search(says, str(f)) for f in verdict.findings.kept()), verdict.text(50)


#: what is done to a sound file -> (how, the kind of a finding, what it says)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a bit of a 2-bit grid block": (
        lambda p: flip(p, expert(p, DOWN, 2)[0] + 66 * 17 + 30, 3),
        "row",
        r"blk\.1\.ffn_down_exps\.weight: row 529 \(expert 2, its row 17\), block 0 of 1: IQ2_XXS bytes",
    ),
    "a bit of a K-quant": (
        lambda p: flip(p, info_of(p, "blk.0.ffn_up.weight").offset + 144 * 3 + 50),
        "row",
        r"blk\.0\.ffn_up\.weight: row 3, block 0",
    ),
    "a bit of a norm": (
        lambda p: flip(p, info_of(p, "output_norm.weight").offset + 4 * 7),
        "row",
        r"output_norm\.weight: row 0, column 7",
    ),
    "a bit of an F16 value": (
        lambda p: flip(p, info_of(p, "token_embd.weight").offset + 2 * 300),
        "row",
        r"token_embd\.weight: row 1, column 44",
    ),
    "a bit of a BF16 value": (
        lambda p: flip(p, info_of(p, "blk.2.attn_kv_a_mqa.weight").offset),
        "row",
        r"attn_kv_a_mqa\.weight: row 0, column 0",
    ),
    "a bit of a transposed tensor": (
        lambda p: flip(p, info_of(p, "blk.0.attn_k_b.weight").offset + 5, 2),
        "row",
        r"blk\.0\.attn_k_b\.weight: row 0 \(matrix 0",
    ),
    "the last bit of the last tensor": (
        lambda p: flip(p, read_header(p).tensors[-1].offset + read_header(p).tensors[-1].nbytes - 1, 7),
        "row",
        r"blk\.2\.",
    ),
    "two tensors exchanged": (
        lambda p: swap(p, info_of(p, GATE), info_of(p, UP)),
        "row",
        r"blk\.1\.ffn_(gate|up)_exps",
    ),
    "two names exchanged": (lambda p: rewrite(p, exchange_names), "plan", r"comes after .* not before it"),
    "two offsets exchanged": (
        lambda p: rewrite(p, exchange_offsets),
        "layout",
        r"data are not in the order of the header: expected 'blk\.1\.ffn_gate_exps",
    ),
    "two experts exchanged": (
        lambda p: swap(p, expert(p, UP, 1), expert(p, UP, 3)),
        "row",
        r"ffn_up_exps\.weight: row 256 \(expert 1, its row 0\)",
    ),
    "rows shifted by one": (
        lambda p: shift_rows(p, "blk.2.attn_q_b.weight"),
        "row",
        r"blk\.2\.attn_q_b\.weight: row 0",
    ),
    "a row of zeros": (lambda p: zero_row(p, "output.weight", 5), "row", r"output\.weight: row 5, block 0.*found 0000"),
    "padding of a tensor": (
        lambda p: poke(p, padded(p).offset + padded(p).nbytes, b"\7"),
        "padding",
        r"after 'blk.* not zero: expected 00, found 07",
    ),
    "padding of the header": (
        lambda p: poke(p, read_header(p).data_offset - 1, b"\1"),
        "padding",
        r"after the header not zero",
    ),
    "a byte less": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "length", r"the file is too short"),
    "half of the file": (
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "layout",
        r"lies beyond the end of the file",
    ),
    "bytes behind the end": (
        lambda p: p.write_bytes(p.read_bytes() + bytes(32)),
        "length",
        r"bytes behind the last tensor",
    ),
    "the magic": (lambda p: poke(p, 0, b"GGML"), "header", r"expected b'GGUF', found b'GGML'"),
    "an interrupted llama-quantize": (lambda p: poke(p, 0, bytes(4096)), "header", r"interrupted llama-quantize"),
    "the version": (lambda p: poke(p, 4, b"\4"), "header", r"version: expected 3, found 4"),
    "an older version": (lambda p: poke(p, 4, b"\2"), "header", r"version: expected 3, found 2"),
    "one tensor more": (
        lambda p: poke(p, 8, struct.pack("<Q", len(read_header(p).tensors) + 1)),
        "header",
        r"the (length of the )?name of tensor",
    ),
    "one key less": (
        lambda p: poke(p, 16, struct.pack("<Q", len(read_header(p).kvs) - 1)),
        "header",
        r"has \d[\d,]* dimensions|the length of|dimensions of|not printable|is said to have",
    ),
    "a tensor of another type of that size": (
        lambda p: rewrite(p, retype("token_embd.weight", "BF16")),
        "plan",
        r"token_embd\.weight: type: expected F16, found BF16",
    ),
    "a type that there is not": (
        lambda p: poke(p, after_name(p, GATE, "type"), struct.pack("<I", 99)),
        "header",
        r"ffn_gate_exps\.weight: ggml has no such type: found 99",
    ),
    "a shape of as many values": (
        lambda p: rewrite(p, reshape(GATE, (256, 512, 2))),
        "plan",
        r"ffn_gate_exps\.weight: shape: expected 256x256x4, found 256x512x2",
    ),
    "a shape of other rows": (
        lambda p: poke(p, after_name(p, GATE, "shape"), struct.pack("<Q", 250)),
        "header",
        r"rows do not divide into Q2_K blocks",
    ),
    "a shape of 2^64 values": (
        lambda p: poke(p, after_name(p, GATE, "shape"), struct.pack("<QQ", 1 << 40, 1 << 40)),
        "header",
        r"impossible shape",
    ),
    "an offset that is not aligned": (
        lambda p: rewrite(p, move(GATE, 8)),
        "layout",
        r"is not aligned: expected a multiple of 32",
    ),
    "an offset into the tensor before": (
        lambda p: rewrite(p, move(GATE, -32)),
        "layout",
        r"ffn_gate_exps\.weight: overlaps",
    ),
    "an offset of 2^63": (
        lambda p: poke(p, after_name(p, GATE, "offset"), struct.pack("<Q", 1 << 63)),
        "layout",
        r"lies beyond the end",
    ),
    "a tensor twice": (
        lambda p: rewrite(p, lambda _k, infos: infos.__setitem__(1, (infos[0][0], *infos[1][1:]))),
        "header",
        r"is there twice",
    ),
    "a tensor missing": (drop_last_tensor, "plan", r"blk\.2\..*: is missing: expected"),
    "a tensor that is not in the plan": (
        lambda p: rewrite(p, lambda _k, infos: infos.__setitem__(0, ("extra.weight", *infos[0][1:]))),
        "plan",
        r"the plan has no such tensor",
    ),
    "another file type": (
        lambda p: rewrite(p, lambda kvs, _i: set_key(kvs, kv("general.file_type", U32, 7))),
        "metadata",
        r"key 'general\.file_type': expected u32 15, found u32 7",
    ),
    "a value of another type": (
        lambda p: rewrite(p, lambda kvs, _i: set_key(kvs, kv("deepseek2.block_count", BOOL, True))),
        "metadata",
        r"key 'deepseek2\.block_count': expected u32 3, found bool 1",
    ),
    "a key missing": (
        lambda p: rewrite(
            p, lambda kvs, _i: kvs.pop(next(i for i, x in enumerate(kvs) if x.key.endswith("freq_base")))
        ),
        "metadata",
        r"key 'deepseek2\.rope\.freq_base' is missing",
    ),
    "a key too many": (
        lambda p: rewrite(p, lambda kvs, _i: kvs.append(kv("general.author", STRING, "me"))),
        "metadata",
        r"key 'general\.author' is not in the plan",
    ),
    "keys in another order": (
        lambda p: rewrite(p, lambda kvs, _i: kvs.reverse()),
        "metadata",
        r"the order of the keys",
    ),
    "a key twice": (
        key_twice,
        "header",
        r"key 'general\.architecture' is there twice",
    ),
    "no architecture": (
        lambda p: rewrite(p, lambda kvs, _i: kvs.pop(0)),
        "header",
        r"general\.architecture: expected a string, found nothing",
    ),
    "a token's text": (token_changed, "metadata", r"key 'tokenizer\.ggml\.tokens'"),
    "an alignment of 7": (
        lambda p: rewrite(p, lambda kvs, _i: kvs.append(kv("general.alignment", U32, 7))),
        "header",
        r"general\.alignment",
    ),
    "a scale that is NaN": (
        lambda p: poke(p, info_of(p, DOWN).offset + 66 * 300, b"\0\x7e"),
        "scale",
        r"ffn_down_exps\.weight: row 300 \(expert 1, its row 44\), block 0: NaN or Inf in IQ2_XXS",
    ),
    "a dmin that is Inf": (
        lambda p: poke(p, info_of(p, "blk.0.ffn_up.weight").offset + 2, b"\0\x7c"),
        "scale",
        r"ffn_up\.weight: row 0, block 0: NaN or Inf in Q4_K",
    ),
    "a scale at the end of a block": (
        lambda p: poke(p, info_of(p, "output.weight").offset + 210 * 9 + 208, b"\xff\xff"),
        "scale",
        r"output\.weight: row 9, block 0: NaN or Inf in Q6_K",
    ),
    "a norm that is Inf": (
        lambda p: poke(p, info_of(p, "output_norm.weight").offset + 4, struct.pack("<f", float("inf"))),
        "scale",
        r"output_norm\.weight: row 0, column 1: NaN or Inf in F32",
    ),
    "a BF16 value that is NaN": (
        lambda p: poke(p, info_of(p, "blk.2.attn_kv_a_mqa.weight").offset + 6, b"\xc0\x7f"),
        "scale",
        r"row 0, column 3: NaN or Inf in BF16",
    ),
    "32 bytes between two tensors": (
        lambda p: insert(p, info_of(p, GATE).offset, bytes(32)),
        "length",
        r"bytes behind the last tensor",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_planted_damage_is_caught_and_named(what: str, out: Path, plan: Plan, tiny_imatrix: Path) -> None:
    damage, kind, says = DAMAGE[what]
    before = out.read_bytes()
    damage(out)
    assert out.read_bytes() != before
    verdict = check(out, plan, tiny_imatrix, "all" if kind == "row" else None)
    assert_found(verdict, kind, says)


# ---------------------------------------------------------------- shards


def split_key(path: Path, item: KV) -> None:
    rewrite(path, lambda kvs, _infos: set_key(kvs, item))


def exchange_files(a: Path, b: Path) -> None:
    raw = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(raw)


def other_build(shards: list[Path], tmp_path: Path, seed: int, split: int) -> list[Path]:
    """The shards of a build of other weights, or otherwise split."""
    folder = tmp_path / f"other-{seed}-{split}"
    source = factory.checkpoint(folder / "Tiny-V3", seed=seed)
    catalogue = open_model(str(source), OPTIONS)
    imatrix = factory.imatrix_for(catalogue, folder / "imatrix.gguf")
    return sorted(build(plan_of(source, MIX, imatrix), folder / "tiny.gguf", imatrix, split).parent.glob("tiny-*.gguf"))


SHARD_DAMAGE: dict[str, tuple[Callable[[list[Path]], Any], str, str]] = {
    "a shard missing": (
        lambda s: s[1].unlink(),
        "shards",
        r"tiny-00002-of-\d{5}\.gguf missing: expected \d shards",
    ),
    "two shards exchanged": (
        lambda s: exchange_files(s[1], s[2]),
        "shards",
        r"00002-of-.*split\.no: expected u16 1, found u16 2",
    ),
    "a wrong split.no": (
        lambda s: split_key(s[1], kv("split.no", U16, 9)),
        "shards",
        r"split\.no: expected u16 1, found u16 9",
    ),
    "a wrong split.count": (
        lambda s: split_key(s[0], kv("split.count", U16, 2)),
        "shards",
        r"00001-of-.*split\.count: expected u16 \d, found u16 2",
    ),
    "split.count of another type": (
        lambda s: split_key(s[0], kv("split.count", U32, 4)),
        "shards",
        r"split\.count: expected u16 \d, found u32 4",
    ),
    "no split keys": (
        lambda s: rewrite(s[1], lambda kvs, _i: kvs.clear()),
        "shards",
        r"split\.tensors\.count: expected i32 \d+, found nothing",
    ),
    "a truncated shard": (
        lambda s: s[1].write_bytes(s[1].read_bytes()[:-40]),
        "length",
        r"00002-of-.*: the file is too short",
    ),
    "a shard whose header is gone": (lambda s: poke(s[1], 0, bytes(64)), "header", r"00002-of-.*zeros in place"),
    "a tensor in two shards": (
        lambda s: rewrite(
            s[2], lambda _k, infos: infos.__setitem__(0, (read_header(s[1]).tensors[0].name, *infos[0][1:]))
        ),
        "shards",
        r"is in tiny-00002-of-\d{5}\.gguf too",
    ),
    "one shard by its keys, none by its name": (
        lambda s: [s[0].rename(s[0].with_name("tiny.gguf"))] and s.__setitem__(0, s[0].with_name("tiny.gguf")),
        "shards",
        r"tiny\.gguf: is one shard of several by its keys",
    ),
    "a shard beyond the last": (
        lambda s: shutil.copy(s[1], s[1].with_name(s[1].name.replace("00002-of", "00099-of"))),
        "shards",
        r"00099-of-.*is beyond the last",
    ),
    "the model's keys in a later shard": (
        lambda s: rewrite(s[1], lambda kvs, _i: kvs.append(kv("general.name", STRING, "x"))),
        "metadata",
        r"key 'general\.name' belongs in the first shard",
    ),
}


@pytest.mark.parametrize("what", SHARD_DAMAGE)
def test_damage_of_a_set_is_caught_and_named(what: str, shards: list[Path], plan: Plan, tiny_imatrix: Path) -> None:
    damage, kind, says = SHARD_DAMAGE[what]
    damage(shards)
    assert_found(check(shards[0], plan, tiny_imatrix, None), kind, says)


def test_a_shard_of_another_split_is_caught(shards: list[Path], plan: Plan, tiny_imatrix: Path, tmp_path: Path) -> None:
    other = other_build(shards, tmp_path, 7, 700_000)
    assert len(other) != len(shards)
    shutil.copy(other[1], shards[1])
    verdict = check(shards[0], plan, tiny_imatrix, None)
    assert_found(verdict, "shards", r"split\.count: expected")
    assert_found(verdict, "shards", r"split\.tensors\.count: expected")


def test_a_shard_of_other_weights_is_caught(shards: list[Path], plan: Plan, tiny_imatrix: Path, tmp_path: Path) -> None:
    sums = outcome_of(shards[0], hashing=True)
    given = manifest.make(sums.files.files, sums.digests)
    other = other_build(shards, tmp_path, 8, 500_000)
    shutil.copy(other[1], shards[1])
    # to its structure it is as good as the right one
    assert check(shards[0], plan, tiny_imatrix, None).ok
    names = {t.name for t in read_header(shards[1]).tensors}
    verdict = check(shards[0], plan, tiny_imatrix, "0.1%")
    assert_found(verdict, "row", shards[1].name)
    assert {f.tensor for f in verdict.findings.kept()} <= names
    assert_found(check(shards[0], manifest=given), "manifest", rf"{shards[1].name}: SHA-256: expected")


# ---------------------------------------------------------------- what was given does not belong


def test_another_imatrix_is_caught(made: Path, plan: Plan, tiny_v3: Path, tmp_path: Path) -> None:
    other = factory.imatrix_for(plan.catalogue, tmp_path / "imatrix.gguf", seed=12)
    verdict = check(made, plan_of(tiny_v3, MIX, other), other, "1%")
    wrong = {f.tensor for f in verdict.findings.kept() if f.kind == "row"}
    assert DOWN in wrong
    assert "output_norm.weight" not in wrong


def test_an_imatrix_must_be_given_when_one_was_used(made: Path, tiny_v3: Path) -> None:
    with pytest.raises(ImatrixError, match=r"was made with an importance matrix .*imatrix\.gguf"):
        check(made, plan_of(tiny_v3, MIX, None))


def test_an_imatrix_of_another_model_is_refused(made: Path, plan: Plan, tmp_path: Path) -> None:
    entries = {DOWN: (1, np.ones(7, np.float32))}
    other = factory.legacy_imatrix(tmp_path / "other.dat", entries)
    with pytest.raises(ImatrixError, match=r"entry of 'blk\.1\.ffn_down_exps\.weight' does not fit its 4 x 256"):
        check(made, plan, other)


def test_another_checkpoint_is_caught_in_every_tensor(made: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    other = factory.checkpoint(tmp_path / "Tiny-V3", seed=8)
    verdict = check(made, plan_of(other, MIX, tiny_imatrix), tiny_imatrix, "100 rows")
    assert {f.kind for f in verdict.findings.kept()} == {"row"}
    quantized = {t.name for t in verdict_tensors(made) if t.type not in ("F32",)}
    assert quantized <= {f.tensor for f in verdict.findings.kept()}


def verdict_tensors(path: Path) -> list[TensorInfo]:
    return list(read_header(path).tensors)


def test_without_a_plan_the_files_own_types_are_derived(made: Path, out: Path, plan: Plan, tiny_imatrix: Path) -> None:
    assert plan.catalogue.source is not None
    weights = open_imatrix(str(tiny_imatrix))
    rows = Rows(plan.catalogue, plan.catalogue.source, weights, Ggml(None), parse_sample("1%"), 0)
    outcome = verify(Request(made, imatrix=weights, rows=rows), Silent())
    assert outcome.verdict.findings.kept() == []
    assert "names and shapes of the source" in outcome.verdict.checked
    rewrite(out, reshape("blk.0.attn_output.weight", (256, 128)))
    verdict = verify(Request(out, imatrix=weights, rows=rows), Silent()).verdict
    assert_found(verdict, "plan", r"attn_output\.weight: shape: expected 128x256, found 256x128")


def test_a_key_can_be_left_out(out: Path, plan: Plan, tiny_imatrix: Path) -> None:
    rewrite(out, lambda kvs, _i: set_key(kvs, kv("general.name", STRING, "Renamed")))
    verdict = check(out, plan, tiny_imatrix, None)
    assert [str(f) for f in verdict.findings.kept()] == [
        f"tiny.gguf: key 'general.name': expected str 'Tiny V3', found str 'Renamed' (byte {key_offset(out)})"
    ]
    assert check(out, plan, tiny_imatrix, None, ignored_keys=("general.name",)).ok


def key_offset(path: Path) -> int:
    return path.read_bytes().index(struct.pack("<Q", 12) + b"general.name")


def test_a_plan_from_a_config_alone_checks_what_it_knows(
    made: Path, out: Path, tiny_v3: Path, tiny_imatrix: Path
) -> None:
    config = plan_of(tiny_v3 / "config.json", MIX, tiny_imatrix)
    verdict = check(made, config, tiny_imatrix)
    assert verdict.findings.kept() == []
    assert "only the config is known" in verdict.notes[0]
    rewrite(out, lambda kvs, _i: set_key(kvs, kv("deepseek2.block_count", U32, 4)))
    assert_found(check(out, config, tiny_imatrix), "metadata", r"deepseek2\.block_count': expected u32 3, found u32 4")


def test_iq1_m_is_not_compared_with_the_wheels_ggml(tiny_v3: Path, tiny_imatrix: Path) -> None:
    with pytest.raises(KernelError, match="rows of IQ1_M can only be compared with the ggml of the pinned"):
        Ggml(None).require("IQ1_M")


# ---------------------------------------------------------------- the pieces


def test_e4m3_is_that_of_torch() -> None:
    want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(e4m3_values(), want)
    np.testing.assert_array_equal(np.signbit(e4m3_values()[~np.isnan(want)]), np.signbit(want[~np.isnan(want)]))


def test_bfloat16_is_rounded_as_torch_does() -> None:
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2**32, 1 << 16, np.uint64).astype(np.uint32).view(np.float32)
    ties = (np.arange(1 << 15, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([values, ties])
    values = values[np.isfinite(values)]
    want = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(to_bf16(values).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("name", ALL_TYPES)
def test_scales_are_where_ggml_looks_for_them(name: str) -> None:
    """Two bytes of a block at a time are set to what a float16 NaN, a bfloat16 NaN or an E8M0 NaN is: of all
    places, exactly those that ggml refuses are found."""
    qt = QTYPES[name]
    nans = [b"\xff\xff", b"\x00\x7c", b"\x80\x7f", b"\x00\xfc"]
    n_found = 0
    for at in range(qt.block_bytes - 1):
        for nan in nans:
            blocks = np.zeros((3, qt.block_bytes), np.uint8)
            blocks[1, at : at + 2] = np.frombuffer(nan, np.uint8)
            refused = not kernels.is_valid(blocks, name)
            assert bad_blocks(blocks.reshape(-1), qt).tolist() == ([1] if refused else []), (at, nan)
            n_found += refused
    if name == "IQ1_M":  # its scale is in four places
        whole = np.full((1, qt.block_bytes), 0xFF, np.uint8)
        assert not kernels.is_valid(whole, name)
        assert bad_blocks(whole.reshape(-1), qt).tolist() == [0]
    elif name != "NVFP4":
        assert n_found > 0


@pytest.mark.parametrize(("n_rows", "fraction"), [(1, 0.01), (7, 0.5), (256, 0.01), (1000, 0.1), (5, 1.0)])
def test_chosen_rows_are_spread_and_seeded(n_rows: int, fraction: float) -> None:
    rows = choose(n_rows, fraction, 0, "t", 0)
    assert len(rows) == max(1, round(n_rows * fraction))
    stretch = n_rows / len(rows)
    assert all(int(i * stretch) <= row < (i + 1) * stretch for i, row in enumerate(rows.tolist()))
    assert rows.tolist() == choose(n_rows, fraction, 0, "t", 0).tolist()
    if n_rows == 1000:
        others = [choose(n_rows, fraction, *other).tolist() for other in ((1, "t", 0), (0, "u", 0), (0, "t", 1))]
        assert rows.tolist() not in others


def test_each_expert_is_sampled(made: Path, out: Path, plan: Plan, tiny_imatrix: Path) -> None:
    for i in range(4):
        at, n = expert(out, UP, i)
        poke(out, at, bytes(n))
    verdict = check(out, plan, tiny_imatrix, "1 rows")
    assert sorted(f.row // 256 for f in verdict.findings.kept() if f.row is not None) == [0, 1, 2, 3]


def test_samples_are_read() -> None:
    assert parse_sample("1%").of(10**6) == 0.01
    assert parse_sample("0.1 %").of(10**6) == pytest.approx(0.001)
    assert parse_sample("ALL").of(10**6) == 1
    assert parse_sample("500").of(1000) == 0.5
    assert parse_sample("500 rows").of(100) == 1
    for wrong in ("", "0%", "101%", "-1", "1.5", "some", "%", "0"):
        with pytest.raises(ValueError, match="is no sample such as"):
            parse_sample(wrong)


def test_many_findings_are_counted_and_few_are_kept() -> None:
    findings = Findings()
    for i in range(1000):
        findings.add(Finding("row", "f", "x", "t", row=i))
    findings.add(Finding("scale", "f", "x", "t"), times=50)
    assert (findings.count, len(findings.kept())) == (1050, KEPT_EACH + 1)
    verdict = Verdict([("f", 10)], 1, findings, ["structure"])
    assert verdict.text(3).splitlines()[-2:] == [
        "… and 1,047 more",
        "DAMAGED: 1,050 findings (50 scale, 1,000 row) in 1 file, 1 tensors, 10 bytes; checked structure",
    ]


HOSTILE = {
    "empty": b"",
    "a count of 2^63": b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 0),
    "a key of 2^63 bytes": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 63) + bytes(64),
    "an array of 2^63 strings": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + struct.pack("<Q", 1)
    + b"k"
    + struct.pack("<IIQ", 9, 8, 1 << 63)
    + bytes(64),
    "an array of 2^62 floats": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + struct.pack("<Q", 1)
    + b"k"
    + struct.pack("<IIQ", 9, 6, 1 << 62)
    + bytes(64),
    "arrays in arrays": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + struct.pack("<Q", 1)
    + b"k"
    + struct.pack("<I", 9)
    + struct.pack("<IQ", 9, 1) * 2000
    + bytes(64),
    "an unknown value type": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + b"\x63" + bytes(64),
    "a bool of 2": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + b"\7\0\0\0\2" + bytes(64),
    "a tensor without dimensions": b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"t" + bytes(64),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_a_finding(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[what])
    verdict = check(path)
    assert verdict.findings.counts().keys() == {"header"}
    assert verdict.n_tensors == 0


def test_every_prefix_of_a_header_is_a_finding(made: Path, tmp_path: Path) -> None:
    blob = made.read_bytes()
    end = read_header(made).data_offset
    path = tmp_path / "x.gguf"
    for n in (*range(0, 400, 7), *range(400, end, 1009)):
        path.write_bytes(blob[:n])
        assert not check(path).ok


# ---------------------------------------------------------------- manifests and attestations


def test_a_manifest_finds_what_differs(made: Path, out: Path, tmp_path: Path) -> None:
    sums = outcome_of(made, hashing=True)
    given = manifest.make(sums.files.files, sums.digests)
    t = read_header(made).tensors[3]
    assert given["tensors"][3] == {
        "name": t.name, "file": made.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes,
        "sha256": sha256(made.read_bytes()[t.offset : t.offset + t.nbytes]),
    }  # fmt: skip
    assert given["files"] == [{"name": made.name, "bytes": made.stat().st_size, "sha256": sha256(made.read_bytes())}]
    manifest.write_json(tmp_path / "m.json", given)
    given = manifest.read(tmp_path / "m.json")
    assert check(out, manifest=given).ok
    renamed = out.rename(out.with_name("renamed.gguf"))
    assert check(renamed, manifest=given).ok
    flip(renamed, t.offset + 1)
    verdict = check(renamed, manifest=given)
    assert [(f.kind, f.tensor, f.text) for f in verdict.findings.kept()] == [
        ("manifest", "", "SHA-256"), ("manifest", t.name, "SHA-256"),
    ]  # fmt: skip


def sha256(raw: bytes) -> str:
    import hashlib

    return hashlib.sha256(raw).hexdigest()


def attest(plan: Plan, imatrix: Path | None, out: Path, whole: bool = False) -> dict[str, Any]:
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    text = 'name: r\narch: [deepseek2, llama, qwen2]\nfile_type: Q4_K_M\nrules:\n  - {match: "*", type: Q8_0, why: t}\n'
    asked = attestation.Asked("dir/r.yaml", text, pre="deepseek-v3")
    versions = {"ggml": toolchain.GGML_VERSION}
    return attestation.statement(plan, weights, asked, [out], versions, Silent(), whole)


@pytest.mark.parametrize("whole", [False, True])
def test_an_attestation_names_what_was_built_from_what(
    whole: bool, made: Path, out: Path, plan: Plan, v3: Path, tiny_imatrix: Path, tmp_path: Path
) -> None:
    value = attest(plan, tiny_imatrix, made, whole)
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["subject"] == [{"name": made.name, "digest": {"sha256": sha256(made.read_bytes())}}]
    built = value["predicate"]["buildDefinition"]
    by_name = {d["name"]: d for d in built["resolvedDependencies"]}
    assert by_name["imatrix.gguf"]["digest"] == {"sha256": sha256(tiny_imatrix.read_bytes())}
    assert by_name["config.json"]["digest"] == {"sha256": sha256((v3 / "config.json").read_bytes())}
    shard = by_name["model-00001-of-00002.safetensors"]
    raw = (v3 / shard["name"]).read_bytes()
    n = 8 + int.from_bytes(raw[:8], "little")
    assert shard["digest"] == {"headerSha256": sha256(raw[:n])} | ({"sha256": sha256(raw)} if whole else {})
    manifest.write_json(tmp_path / "a.json", value)
    attested = attestation.read(tmp_path / "a.json")
    assert (attested.asked.recipe_name, attested.asked.pre) == ("r.yaml", "deepseek-v3")
    verdict = check(out, plan, tiny_imatrix, None, attested=attested)
    assert verdict.findings.kept() == []
    assert verdict.checked[-3:] == ["attested digests", "attested plan", "attested sources"]
    # one value of the source is another
    factory.poke(v3, "model.norm.weight", 0, b"\x11")
    other = plan_of(v3, MIX, tiny_imatrix)
    assert check(out, other, tiny_imatrix, None, attested=attested).ok
    says = r"safetensors: sha256: expected [0-9a-f]{64}, found" if whole else r"expected none: it was not hashed whole"
    verdict = check(out, other, tiny_imatrix, None, attested=attested, hash_source=True)
    assert_found(verdict, "attestation", says)
    assert verdict.findings.count == (1 if whole else 2)
    # and of the output
    flip(out, info_of(out, GATE).offset + 20)
    assert_found(check(out, attested=attested), "attestation", r"tiny\.gguf: SHA-256: expected")


def test_an_attestation_of_something_else_is_caught(
    made: Path, plan: Plan, tiny_v3: Path, tiny_imatrix: Path, v3: Path, tmp_path: Path
) -> None:
    manifest.write_json(tmp_path / "a.json", attest(plan, tiny_imatrix, made))
    attested = attestation.read(tmp_path / "a.json")
    other = plan_of(tiny_v3, rules('match: "*", type: Q8_0'), tiny_imatrix)
    assert_found(check(made, other, tiny_imatrix, None, attested=attested), "attestation", "the plan made now is not")
    factory.edit_json(v3 / "generation_config.json", lambda c: c.update(top_p=0.5)) if (
        v3 / "generation_config.json"
    ).exists() else factory.edit_json(v3 / "config.json", lambda c: c.update(transformers_version="0"))
    changed = plan_of(v3, MIX, tiny_imatrix)
    assert_found(
        check(made, changed, tiny_imatrix, None, attested=attested),
        "attestation",
        r"config\.json: (bytes|sha256): expected",
    )
    imatrix = factory.imatrix_for(plan.catalogue, tmp_path / "other.gguf", seed=1)
    assert_found(check(made, plan, imatrix, None, attested=attested), "attestation", r"imatrix\.gguf: sha256: expected")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(_type="x"), "is no in-toto statement of a build"),
        (lambda v: v["predicate"]["buildDefinition"].update(buildType="x"), "attests another kind of build"),
        (lambda v: v.update(subject=[]), "attests no file"),
        (lambda v: v["predicate"].clear(), "malformed at 'buildDefinition'"),
        (
            lambda v: v["predicate"]["buildDefinition"]["externalParameters"]["recipe"].update(text="name: x\n"),
            "it was edited",
        ),
    ],
)
def test_an_edited_attestation_is_refused(
    change: Callable[[Any], Any], says: str, made: Path, plan: Plan, tiny_imatrix: Path, tmp_path: Path
) -> None:
    value = attest(plan, tiny_imatrix, made)
    change(value)
    manifest.write_json(tmp_path / "a.json", value)
    with pytest.raises(SourceError, match=says):
        attestation.read(tmp_path / "a.json")


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'{"quantkit_manifest": 1, "files": [1], "tensors": []}', b"[" * 9999]
)
def test_what_is_no_manifest_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_bytes(raw)
    with pytest.raises(SourceError, match="is not a manifest"):
        manifest.read(tmp_path / "m.json")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"tensors": []}', b'{"tensors": [{"name": 1}]}'])
def test_what_is_no_plan_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(raw)
    with pytest.raises(SourceError, match=r"is no plan|the plan has no tensors"):
        read_plan(tmp_path / "p.json")


# ---------------------------------------------------------------- the command line


def test_the_command_line(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    """Build, verify by recipe, by plan and by manifest; then with a flipped bit."""
    out, written = tmp_path / "out.gguf", tmp_path / "m.json"
    common = ("-r", "Q4_K_M", "--pre", "deepseek-v3")
    done = quantkit("build", tiny_v3, "-o", out, "-q", *common)
    assert done.returncode == 0, done.stderr
    done = quantkit("verify", out, "-s", tiny_v3, *common, "--write-manifest", written, "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        r"note: wrote the manifest .*\nOK: 1 file, 52 tensors, [\d,]+ bytes; checked structure, plan, metadata, "
        r"scales, \d+ of [\d,]+ rows \(seed 0\)\n",
        done.stdout,
    ), done.stdout
    plan = tmp_path / "plan.json"
    plan.write_text(quantkit("plan", tiny_v3, *common, "--json").stdout)
    at = info_of(out, "blk.1.attn_output.weight").offset + 60
    flip(out, at)
    done = quantkit("verify", out, "--plan", plan, "--manifest", written, "--json", "-q")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict["ok"], verdict["counts"]) == (12, False, {"manifest": 2})
    assert {f.get("tensor") for f in verdict["findings"]} == {None, "blk.1.attn_output.weight"}
    again = tmp_path / "again.json"
    done = quantkit("verify", out, "-s", tiny_v3, *common, "--sample", "all", "-q", "--write-manifest", again)
    assert done.returncode == 12
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("DAMAGED: 1 finding (1 row) in 1 file")
    assert re.search(r"blk\.1\.attn_output\.weight: row 0, block 2 of 4: Q5_0 bytes are not what ggml", lines[-2])
    assert f"(byte {at:,})" in lines[-2]
    assert not again.exists()


def test_build_attests_and_verify_derives_again_from_that(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(MINE.replace("type: Q8_0,", "type: $down,") + "vars: {down: Q8_0}\n")
    out, file = tmp_path / "out.gguf", tmp_path / "a.json"
    common = ("-r", recipe, "--set", "down=Q5_K", "--pre", "deepseek-v3")
    done = quantkit("build", tiny_v3, "-o", out, *common, "--attest", file, "--split-max-size", "1M", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    statement = json.loads(file.read_text())
    assert len(statement["subject"]) == 3
    assert statement["predicate"]["runDetails"]["builder"]["version"].keys() == {"quantkit", "ggml"}
    recipe.unlink()
    first = tmp_path / "out-00001-of-00003.gguf"
    done = quantkit("verify", first, "--attestation", file, "-s", tiny_v3, "-q")
    assert done.returncode == 0, done.stdout
    assert re.search(
        r"^OK: 3 files, .*plan, metadata, .* rows .*attested digests, attested plan, attested sources$", done.stdout
    )
    last = tmp_path / "out-00003-of-00003.gguf"
    flip(last, last.stat().st_size - 1)
    done = quantkit("verify", first, "--attestation", file, "-q")
    assert done.returncode == 12
    assert "out-00003-of-00003.gguf: SHA-256: expected" in done.stdout


@pytest.mark.parametrize(
    ("attest", "says"),
    [("out.gguf", "is an output of this build"), ("none/a.json", "there is no directory"), (".", "is a directory")],
)
def test_an_attestation_that_cannot_be_written_is_found_before_the_build(
    quantkit: Run, tiny_v3: Path, tmp_path: Path, attest: str, says: str
) -> None:
    common = ("-r", "Q8_0", "--pre", "deepseek-v3", "-o", "out.gguf", "--attest", attest)
    done = quantkit("build", tiny_v3, *common, cwd=tmp_path)
    assert done.returncode == 7
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("-r", "Q4_K_M"), 2, "--recipe needs --source"),
        (("--sample", "1%"), 2, "--sample needs --source"),
        (("-s", "deepseek-r1", "--sample", "half"), 2, "'half' is no sample such as 1%"),
        (("-s", "deepseek-r1", "--sample", "1%"), 4, "rows can only be compared with weights"),
        (("--hash-source",), 2, "--hash-source needs --attestation"),
        (("--manifest", "nowhere.json"), 4, "nowhere.json: cannot be read"),
    ],
)
def test_wrong_usage(quantkit: Run, made: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = quantkit("verify", made, *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_there_is_an_error_not_a_finding(quantkit: Run, tmp_path: Path) -> None:
    assert quantkit("verify", tmp_path / "none.gguf").returncode == 4
    assert "is a directory" in quantkit("verify", tmp_path).stderr
