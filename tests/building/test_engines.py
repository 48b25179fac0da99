"""The native engine: how work is cut, that the cut does not affect the bytes, and how it fails.

Its output is compared with the real llama.cpp tools in test_differential.py.
"""

from __future__ import annotations

import errno
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_builds import OPTIONS, rules

from quantkit import kernels
from quantkit.base.errors import KernelError, OutputError, QuantkitError, WeightError
from quantkit.building import run as builds
from quantkit.building.engines.llama_quantize import _batches
from quantkit.building.engines.native import NativeEngine, Slab
from quantkit.building.engines.native import slabs as slabs_of
from quantkit.building.shard_order import pieces_of
from quantkit.gguf.header import STRING, U32, kv, read_header
from quantkit.gguf.types import QTYPES
from quantkit.imatrix.matrix import open_imatrix
from quantkit.kernels import own
from quantkit.llama_cpp.tensor_types import tensor_type_file
from quantkit.model.catalogue import Part, Role, Tensor
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.planning.plan import ImatrixStatus, Plan, Planned, make_plan, types_asked
from quantkit.recipe.load import Recipe

#: a type that uses an imatrix and one that does not, floats, a fallback (attn_k_b), and the routed experts' type
MIX = rules(
    'match: "*_exps.weight", type: IQ2_XXS',
    'match: "{token_embd,output}.weight", type: F16',
    'match: "*attn_kv_a*", type: BF16',
    'match: "*attn_output*", type: Q8_0',
    'match: "*", type: Q4_K',
)


def quiet(_name: str, _n: int) -> None:
    pass


def build(
    source: Path,
    out: Path,
    recipe: Recipe = MIX,
    imatrix: Path | None = None,
    slab_values: int = 1 << 20,
    n_threads: int = 1,
    progress: Callable[[str, int], None] = quiet,
    layout: str = "k_b+v_b",
    **more: Any,
) -> Plan:
    weights = None if imatrix is None else open_imatrix(str(imatrix))
    options = OPTIONS._replace(layout=layout) if source.is_dir() else Options()
    plan = make_plan(open_model(str(source), options), recipe, weights)
    ready = builds.prepare(plan, out, weights, **more)
    builds.run(ready, NativeEngine(slab_values), n_threads, progress)
    return plan


def data_of(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a GGUF."""
    blob = path.read_bytes()
    return {t.name: blob[t.offset : t.offset + t.nbytes] for t in read_header(path).tensors}


# ---------------------------------------------------------------- slabs


def slabs(planned: Planned, *slab_values: int) -> list[Slab]:
    """The slabs of all parts of a tensor."""
    return [slab for piece in pieces_of([planned]) for slab in slabs_of(piece, *slab_values)]


def planned(shape: tuple[int, ...], parts: tuple[Part, ...], type_: str = "F32") -> Planned:
    t = Tensor("t", shape, Role.OTHER, None, True, "BF16", parts)
    return Planned(t, type_, type_, QTYPES[type_].row_bytes(shape[0]) * t.n_rows, "", "", ImatrixStatus.USED)


@st.composite
def stacked(draw: st.DrawFn) -> Planned:
    """A tensor of one to three dimensions, whose rows come from parts that need not end where experts do."""
    n_cols, n_dims = draw(st.integers(1, 50)), draw(st.integers(1, 3))
    shape = (n_cols, *(draw(st.integers(1, 20)) for _ in range(n_dims - 1)))
    left = math.prod(shape[1:])
    parts: list[Part] = []
    while left:
        n = draw(st.integers(1, left))
        row = draw(st.integers(0, 9))
        name = f"s{len(parts)}"
        if n_dims == 1:
            parts.append(Part(name, (n_cols,), 0, 1))
        elif draw(st.booleans()):
            # a rectangle of n_cols rows whose n columns are the part's rows
            parts.append(Part(name, (row + n_cols, n), row, n_cols, transposed=True))
        else:
            parts.append(Part(name, (row + n, n_cols), row, n))
        left -= n
    return planned(shape, tuple(parts))


@settings(max_examples=400)
@given(work=stacked(), slab_values=st.integers(1, 1000))
def test_slabs_cover_every_row_once(work: Planned, slab_values: int) -> None:
    tensor = work.tensor
    cut = slabs(work, slab_values)
    rows = [(part.source, row) for part in tensor.parts for row in range(part.out_rows)]
    assert [(s.part.source, s.row + i) for s in cut for i in range(s.n_rows)] == rows
    assert [s.out_row + i for s in cut for i in range(s.n_rows)] == list(range(tensor.n_rows))
    for s in cut:
        assert s.planned == work
        assert s.part in tensor.parts
        # at least one row, and at most slab_values unless a single row is longer
        assert 1 <= s.n_rows <= max(1, slab_values // tensor.n_cols)
        if len(tensor.shape) == 3:
            assert s.out_row // tensor.shape[1] == (s.out_row + s.n_rows - 1) // tensor.shape[1]


@settings(max_examples=400)
@given(work=stacked(), slab_values=st.integers(1, 1000))
def test_slabs_are_as_large_as_they_may_be(work: Planned, slab_values: int) -> None:
    """Each slab ends because of its size, its part, or its expert."""
    tensor = work.tensor
    step = max(1, slab_values // tensor.n_cols)
    for s in slabs(work, slab_values):
        ends_part = s.row + s.n_rows == s.part.out_rows
        ends_expert = len(tensor.shape) > 1 and (s.out_row + s.n_rows) % tensor.shape[1] == 0
        assert s.n_rows == step or ends_part or ends_expert


def test_slabs_of_r1() -> None:
    """An expert's down_proj is 7168 rows of 2048; a slab is at most 2^20 values, so 512 rows."""
    parts = tuple(Part(f"e{e}", (7168, 2048), 0, 7168) for e in range(256))
    cut = slabs(planned((2048, 7168, 256), parts, "IQ1_S"))
    assert len(cut) == 256 * 14
    assert {s.n_rows for s in cut} == {512}
    assert (cut[14].part.source, cut[14].row, cut[14].out_row) == ("e1", 0, 7168)


# ---------------------------------------------------------------- the bytes


@pytest.fixture(scope="module")
def made(tiny_v3: Path, tiny_imatrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "m.gguf"
    build(tiny_v3, out, imatrix=tiny_imatrix)
    return out


@pytest.mark.parametrize(("slab_values", "n_threads"), [(1 << 20, 2), (70_000, 3), (1, 5)])
def test_the_bytes_do_not_depend_on_slabs_or_threads(
    tiny_v3: Path, tiny_imatrix: Path, made: Path, tmp_path: Path, slab_values: int, n_threads: int
) -> None:
    out = tmp_path / "m.gguf"
    build(tiny_v3, out, imatrix=tiny_imatrix, slab_values=slab_values, n_threads=n_threads)
    assert out.read_bytes() == made.read_bytes()


def test_shards_hold_the_same_bytes(tiny_v3: Path, tiny_imatrix: Path, made: Path, tmp_path: Path) -> None:
    build(tiny_v3, tmp_path / "m.gguf", imatrix=tiny_imatrix, n_threads=2, split_max_size=200_000)
    shards = sorted(tmp_path.iterdir())
    assert len(shards) > 3
    assert [p.name for p in shards] == [f"m-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))]
    together: dict[str, bytes] = {}
    for path in shards:
        together |= data_of(path)
    assert list(together.items()) == list(data_of(made).items())


def stored(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, read by safetensors."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def weight(tensors: dict[str, Any], name: str) -> npt.NDArray[np.float32]:
    """A weight as a converter stores it, by torch: float32, through BF16."""
    w = tensors[name].float()
    scale = tensors.get(name + "_scale_inv")
    if scale is not None:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
        w = (w * scale).bfloat16().float()
    return np.ascontiguousarray(w.numpy())


def test_every_tensor_is_made_of_its_weights(tiny_v3: Path, tiny_imatrix: Path, made: Path) -> None:
    """Assembled from the checkpoint in the simplest way, tensor by tensor."""
    tensors, got = stored(tiny_v3), data_of(made)
    imatrix = open_imatrix(str(tiny_imatrix))
    rotary = "model.layers.1.self_attn."
    assert got["token_embd.weight"] == kernels.quantize(weight(tensors, "model.embed_tokens.weight"), "F16").tobytes()
    assert got["output_norm.weight"] == weight(tensors, "model.norm.weight").tobytes()
    assert got["blk.1.ffn_gate_inp.weight"] == weight(tensors, "model.layers.1.mlp.gate.weight").tobytes()
    assert got["blk.1.exp_probs_b.bias"] == tensors["model.layers.1.mlp.gate.e_score_correction_bias"].numpy().tobytes()
    kv_a = torch.from_numpy(weight(tensors, rotary + "kv_a_proj_with_mqa.weight")).bfloat16()
    assert got["blk.1.attn_kv_a_mqa.weight"] == kv_a.view(torch.uint8).numpy().tobytes()
    assert (
        got["blk.1.attn_output.weight"] == kernels.quantize(weight(tensors, rotary + "o_proj.weight"), "Q8_0").tobytes()
    )
    for kind in ("gate", "up", "down"):
        name = f"blk.2.ffn_{kind}_exps.weight"
        experts = b"".join(
            kernels.quantize(
                weight(tensors, f"model.layers.2.mlp.experts.{e}.{kind}_proj.weight"), "IQ2_XXS",
                imatrix.weights(name, e, 256),
            ).tobytes()
            for e in range(4)
        )  # fmt: skip
        assert got[name] == experts
    # kv_b, [heads * (64 nope + 64 v), 256], is split by head; the k half is transposed
    heads = weight(tensors, rotary + "kv_b_proj.weight").reshape(2, 128, 256)
    k_b = np.ascontiguousarray(heads[:, :64].transpose(0, 2, 1))
    # one count for all heads, but each has its own part of the entry
    each = [imatrix.weights("blk.1.attn_k_b.weight", h, 64) for h in range(2)]
    assert got["blk.1.attn_k_b.weight"] == b"".join(
        kernels.quantize(k_b[h], "Q5_0", each[h]).tobytes() for h in range(2)
    )
    v_b = np.ascontiguousarray(heads[:, 64:])
    each = [imatrix.weights("blk.1.attn_v_b.weight", h, 256) for h in range(2)]
    assert got["blk.1.attn_v_b.weight"] == b"".join(
        kernels.quantize(v_b[h], "Q4_K", each[h]).tobytes() for h in range(2)
    )


def test_without_an_imatrix_none_is_used(tiny_v3: Path, tmp_path: Path) -> None:
    build(tiny_v3, tmp_path / "m.gguf", rules('match: "*", type: Q4_K'), layout="kv_b")
    whole = weight(stored(tiny_v3), "model.layers.0.self_attn.kv_b_proj.weight")
    assert data_of(tmp_path / "m.gguf")["blk.0.attn_kv_b.weight"] == kernels.quantize(whole, "Q4_K").tobytes()


ALREADY = rules('match: "blk.*", type: Q4_K', 'match: "output.weight", type: Q6_K', 'match: "*", type: Q8_0')


def gguf_source(path: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """A GGUF with already quantized tensors, one of random blocks with a finite scale."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((64, 256)).astype(np.float32)
    random = rng.integers(0, 256, (64, 210), dtype=np.uint8)
    random[:, 208:] = (0x00, 0x3C)
    blobs = {
        "token_embd.weight": kernels.quantize(rows, "Q8_0"),
        "output.weight": random,
        "blk.0.attn_q.weight": kernels.quantize(rows, "Q8_0"),
        "blk.0.attn_norm.weight": rows[0].view(np.uint8),
    }
    kinds = {"token_embd.weight": "Q8_0", "output.weight": "Q6_K", "blk.0.attn_q.weight": "Q8_0"}
    factory.gguf_file(
        path,
        {
            n: ((256,) if n not in kinds else (256, 64), kinds.get(n, "F32"), b.tobytes()) for n, b in blobs.items()
        },
        [kv("general.architecture", STRING, "deepseek2"), kv("deepseek2.block_count", U32, 1)],
    )  # fmt: skip
    return blobs


@pytest.mark.parametrize("slab_values", [1 << 20, 1000])
def test_a_tensor_that_has_its_type_already_is_copied(tmp_path: Path, slab_values: int) -> None:
    """Even blocks that no quantizer would make are copied; the others are dequantized and quantized again."""
    blobs = gguf_source(tmp_path / "in.gguf")
    build(tmp_path / "in.gguf", tmp_path / "out.gguf", ALREADY, slab_values=slab_values, allow_requantize=True)
    got = data_of(tmp_path / "out.gguf")
    for name in ("token_embd.weight", "output.weight", "blk.0.attn_norm.weight"):
        assert got[name] == blobs[name].tobytes()
    rows = kernels.dequantize(blobs["blk.0.attn_q.weight"], "Q8_0", 256)
    assert got["blk.0.attn_q.weight"] == kernels.quantize(rows, "Q4_K").tobytes()


def test_blocks_that_are_not_valid_are_not_copied(tmp_path: Path) -> None:
    gguf_source(tmp_path / "in.gguf")
    blob = bytearray((tmp_path / "in.gguf").read_bytes())
    info = next(t for t in read_header(tmp_path / "in.gguf").tensors if t.name == "output.weight")
    blob[info.offset + 41 * 210 + 209] = 0x7C  # the scale of row 41 becomes Inf
    (tmp_path / "in.gguf").write_bytes(blob)
    with pytest.raises(WeightError) as e:
        build(tmp_path / "in.gguf", tmp_path / "out.gguf", ALREADY, slab_values=2560, allow_requantize=True)
    assert str(e.value) == (
        f"{tmp_path / 'in.gguf'}: 'output.weight' has Q6_K blocks whose scale is NaN or Inf in rows 40 to 49; the file "
        "is damaged, get it again"
    )
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("n_threads", [1, 4])
def test_progress_counts_every_element_once(tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, n_threads: int) -> None:
    done: Counter[str] = Counter()
    lock = threading.Lock()

    def progress(name: str, n: int) -> None:
        with lock:
            done[name] += n

    plan = build(
        tiny_v3, tmp_path / "m.gguf", imatrix=tiny_imatrix, slab_values=9000, n_threads=n_threads, progress=progress
    )
    assert done == {t.tensor.name: t.tensor.n_elements for t in plan.tensors}


# ---------------------------------------------------------------- failures


def fails(source: Path, folder: Path, error: type[QuantkitError], **more: Any) -> str:
    """The error message of a failing build; nothing is left of it except what the next build resumes from."""
    (folder / "out").mkdir()
    with pytest.raises(error) as e:
        build(source, folder / "out" / "m.gguf", **more)
    kept = getattr(e.value, "kept", None)
    assert [p.name for p in (folder / "out").iterdir()] == (["m.gguf.partial"] if kept else [])
    assert [t.name for t in threading.enumerate() if t.name.startswith("quantkit-")] == []
    return str(e.value)


DAMAGED = "llama-quantize refuses such weights too: the checkpoint is damaged, download that shard again"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
KV_B = "model.layers.2.self_attn.kv_b_proj.weight"

NOT_FINITE = [
    # stored tensor, byte, value written there; output tensor, row and column of the stored one, value
    pytest.param(EXPERT, 7 * 256 + 9, b"\x7f", "blk.1.ffn_up_exps.weight", 7, 9, "nan", id="FP8, an expert"),
    pytest.param(EXPERT, 256 * 256 - 1, b"\xff", "blk.1.ffn_up_exps.weight", 255, 255, "nan", id="FP8, the last value"),
    pytest.param(KV_B, 3 * 256 + 200, b"\x7f", "blk.2.attn_k_b.weight", 3, 200, "nan", id="FP8, transposed"),
    pytest.param(KV_B, 227 * 256 + 5, b"\x7f", "blk.2.attn_v_b.weight", 227, 5, "nan", id="FP8, second head's v"),
    pytest.param(
        "model.embed_tokens.weight", 2 * (383 * 256 + 17), b"\x80\xff", "token_embd.weight", 383, 17, "-inf", id="BF16"
    ),
    pytest.param(
        "model.layers.0.input_layernorm.weight",
        2 * 100,
        b"\xc0\x7f",
        "blk.0.attn_norm.weight",
        0,
        100,
        "nan",
        id="norm",
    ),
    pytest.param(
        EXPERT + "_scale_inv", 4, b"\x00\x00\x80\x7f", "blk.1.ffn_up_exps.weight", 0, 128, "", id="an infinite scale"
    ),
]


@pytest.mark.parametrize(("name", "at", "raw", "tensor", "row", "column", "value"), NOT_FINITE)
def test_nan_and_inf_name_tensor_and_row(
    v3: Path, tmp_path: Path, name: str, at: int, raw: bytes, tensor: str, row: int, column: int, value: str
) -> None:
    factory.poke(v3, name, at, raw)
    shard = factory.shard_of(v3, name).name
    all_q8_0 = rules('match: "*", type: Q8_0')
    message = fails(v3, tmp_path, WeightError, recipe=all_q8_0, slab_values=5000, n_threads=2)
    place = f"'{tensor}' (from {shard}: '{name.removesuffix('_scale_inv')}'), row {row}, column {column} is "
    if value:
        assert message == f"{place}{value}; {DAMAGED}"
    else:
        assert re.fullmatch(re.escape(place) + r"-?(inf|nan); " + re.escape(DAMAGED), message)


@pytest.mark.parametrize(("slab_values", "n_threads"), [(1 << 20, 1), (256, 3)])
def test_the_row_does_not_depend_on_slabs(v3: Path, tmp_path: Path, slab_values: int, n_threads: int) -> None:
    factory.poke(v3, EXPERT, 201 * 256 + 9, b"\x7f")
    all_q8_0 = rules('match: "*", type: Q8_0')
    message = fails(v3, tmp_path, WeightError, recipe=all_q8_0, slab_values=slab_values, n_threads=n_threads)
    assert message == (
        f"'blk.1.ffn_up_exps.weight' (from {factory.shard_of(v3, EXPERT).name}: '{EXPERT}'), row 201, column 9 is nan; "
        f"{DAMAGED}"
    )


def test_weights_out_of_a_types_range_name_tensor_and_rows(v3: Path, tmp_path: Path) -> None:
    """3e38 is finite, but no float16 scale can hold it."""
    factory.poke(v3, "model.embed_tokens.weight", 2 * 256 * 300, b"\x62\x7f")
    message = fails(v3, tmp_path, WeightError, recipe=rules('match: "*", type: Q4_K'), slab_values=256 * 100)
    assert message == (
        "'token_embd.weight', rows 300 to 383: weights out of the range of Q4_K: a block's scale is not valid"
    )


def test_what_no_float16_holds_names_tensor_and_rows(v3: Path, tmp_path: Path) -> None:
    factory.poke(v3, "model.embed_tokens.weight", 2 * 256 * 300, b"\x62\x7f")
    message = fails(v3, tmp_path, WeightError, recipe=rules('match: "*", type: F16'), slab_values=256 * 100)
    assert message == (
        "'token_embd.weight', rows 300 to 383: weights out of the range of F16: one would be stored as Inf"
    )


def test_a_missing_kernel_names_tensor_and_rows(
    tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "no toolchain here"))
    monkeypatch.setattr(own, "OWN", {})
    recipe = rules('match: "blk.1.ffn_up_exps.weight", type: IQ1_M', 'match: "*", type: Q8_0')
    message = fails(tiny_v3, tmp_path, KernelError, recipe=recipe, imatrix=tiny_imatrix)
    assert message.startswith(("'blk.1.ffn_up_exps.weight', rows 0 to 255: IQ1_M needs the ggml of", "IQ1_M needs"))
    assert message.endswith("; run: quantkit toolchain install")


def test_a_full_disk_is_an_error_of_ours(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, Counter[str]()

    def full(fd: int, data: Any, offset: int) -> int:
        calls["n"] += 1
        if calls["n"] == 7:  # after the lock, the journal, the header and the earlier contents of the file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    message = fails(tiny_v3, tmp_path, OutputError, recipe=rules('match: "*", type: Q8_0'))
    assert re.fullmatch(
        r"\S+/m\.gguf: writing 'blk\.0\.attn_k_b\.weight' at [0-9,]+ failed: No space left on device; free some "
        r"space and build again",
        message,
    )


def test_short_writes_are_continued(
    tiny_v3: Path, tiny_imatrix: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: max(1, len(data) // 3)], offset))
    build(tiny_v3, tmp_path / "m.gguf", imatrix=tiny_imatrix, n_threads=2)
    assert (tmp_path / "m.gguf").read_bytes() == made.read_bytes()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_progress_raises_ends_the_build(tiny_v3: Path, tmp_path: Path, error: type[BaseException]) -> None:
    def progress(_name: str, _n: int) -> None:
        raise error("enough")

    with pytest.raises(error, match=r"^enough$"):
        build(tiny_v3, tmp_path / "m.gguf", rules('match: "*", type: Q8_0'), n_threads=3, progress=progress)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf.partial"]
    assert [t.name for t in threading.enumerate() if t.name.startswith("quantkit-")] == []


# ---------------------------------------------------------------- what llama-quantize is told


def of(name: str, type_: str, quantizable: bool = True, shape: tuple[int, ...] = (256, 2)) -> Planned:
    return Planned(
        Tensor(name, shape, Role.OTHER, None, quantizable, "BF16"), type_, type_, 0, "", "", ImatrixStatus.USED
    )


def test_tensor_type_file() -> None:
    tensors = [
        of("output.weight", "Q6_K"),
        of("output_norm.weight", "F32", quantizable=False),
        of("blk.3.ffn_down_exps.weight", "IQ2_XXS"),
        of("blk.13.attn_k_b.weight", "BF16"),
        of(r"a+b*c?(d)[e]{f}|g^h$i\j.weight", "Q8_0"),
    ]
    assert tensor_type_file(types_asked(tensors)) == (
        r"^output\.weight$=q6_k" "\n"
        r"^blk\.3\.ffn_down_exps\.weight$=iq2_xxs" "\n"
        r"^blk\.13\.attn_k_b\.weight$=bf16" "\n"
        r"^a\+b\*c\?\(d\)\[e\]\{f\}\|g\^h\$i\\j\.weight$=q8_0" "\n"
    )  # fmt: skip


@given(
    names=st.lists(
        st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9), unique=True, min_size=1
    )
)
def test_each_rule_of_a_tensor_type_file_matches_its_tensor_only(names: list[str]) -> None:
    lines = tensor_type_file((name, "Q4_K") for name in names).splitlines()
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        assert line.endswith("=q4_k")
        pattern = re.compile(line.removesuffix("=q4_k"))
        assert [n for n in [*names, name + "x", "x" + name, "x" + name + "x"] if pattern.search(n)] == [name]


def test_every_quantizable_tensor_of_r1_has_its_rule() -> None:
    plan = make_plan(open_model("deepseek-r1"), rules('match: "*", type: Q4_K'))
    lines = tensor_type_file(types_asked(plan.tensors)).splitlines()
    assert len(lines) == len(set(lines)) == 725
    assert Counter(line.partition("=")[2] for line in lines) == {"q4_k": 664, "q5_0": 61}


@given(rows=st.lists(st.integers(1, 30), max_size=20), limit=st.integers(1, 20_000))
def test_batches_are_consecutive_and_within_their_limit(rows: list[int], limit: int) -> None:
    work = [of(f"t{i}", "Q4_K", shape=(256, n)) for i, n in enumerate(rows)]
    batches = list(_batches(work, limit))
    assert [p for batch in batches for p in batch] == work
    sizes = [[512 * p.tensor.n_rows for p in batch] for batch in batches]
    for i, size in enumerate(sizes):
        assert len(size) == 1 or sum(size) <= limit
        assert i + 1 == len(sizes) or sum(size) + sizes[i + 1][0] > limit
