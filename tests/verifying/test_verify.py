"""`quantkit verify`: sound files of every maker pass, mismatches are reported, and tests of its parts."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import factory
import numpy as np
import pytest
import torch
from checking import DOWN, MIX, UP, Silent, assert_found, check, expert, poke, reshape, rewrite, rules, set_key
from conftest import Tools
from small_builds import OPTIONS, build, plan_of

from quantkit import kernels
from quantkit.base.errors import ImatrixError, KernelError, SourceError
from quantkit.building.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.building.engines.native import NativeEngine
from quantkit.gguf.header import STRING, U32, TensorInfo, kv, read_header
from quantkit.gguf.types import INTEGER_TYPES, QTYPES
from quantkit.imatrix.matrix import open_imatrix
from quantkit.llama_cpp import toolchain
from quantkit.llama_cpp.tensor_types import tensor_type_file
from quantkit.model.open import open_model
from quantkit.planning.plan import Plan, types_asked
from quantkit.recipe.load import load
from quantkit.verifying.against_plan import read_plan
from quantkit.verifying.derive import e4m3_values, to_bf16
from quantkit.verifying.ggml import Ggml
from quantkit.verifying.rederive import RowCheck, choose, parse_sample
from quantkit.verifying.run import Request, verify
from quantkit.verifying.scan import bad_blocks
from quantkit.verifying.verdict import KEPT, KEPT_EACH, Finding, Findings, Verdict

# ---------------------------------------------------------------- sound files


def test_a_sound_file_passes_every_level(sound: Path, sound_plan: Plan, tiny_imatrix: Path) -> None:
    verdict = check(sound, sound_plan, tiny_imatrix)
    assert verdict.findings.kept() == []
    n_rows = sum(t.n_rows for t in sound_plan.catalogue.tensors)
    assert verdict.checked == ["structure", "plan", "metadata", "scales", f"all {n_rows:,} rows"]
    assert verdict.line().startswith(
        f"OK: 1 file, {len(sound_plan.tensors)} tensors, {sound.stat().st_size:,} bytes; checked"
    )


@pytest.mark.parametrize("which", [0, 1, -1])
def test_sound_shards_pass_whichever_is_given(
    sound_set: Path, sound_plan: Plan, tiny_imatrix: Path, which: int
) -> None:
    paths = sorted(sound_set.glob("*.gguf"))
    assert len(paths) > 2
    verdict = check(paths[which], sound_plan, tiny_imatrix, "1%")
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
    # the same types from the original are other bytes: the comparison is with the source that was given
    original = plan_of(tiny_v3, second.recipe, None)
    tensors = {f.tensor.split(".")[-2] for f in check(again, original).findings.kept() if f.kind == "row"}
    assert "ffn_down_exps" in tensors


#: types that llama-quantize takes only as a base type, or not at all
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
    types.write_text(tensor_type_file(types_asked(made.tensors)))
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


# ---------------------------------------------------------------- what was given does not belong


def test_another_imatrix_is_caught(sound: Path, sound_plan: Plan, tiny_v3: Path, tmp_path: Path) -> None:
    other = factory.imatrix_for(sound_plan.catalogue, tmp_path / "imatrix.gguf", seed=12)
    verdict = check(sound, plan_of(tiny_v3, MIX, other), other, "1%")
    wrong = {f.tensor for f in verdict.findings.kept() if f.kind == "row"}
    assert DOWN in wrong
    assert "output_norm.weight" not in wrong


def test_an_imatrix_must_be_given_when_one_was_used(sound: Path, tiny_v3: Path) -> None:
    with pytest.raises(ImatrixError, match=r"was made with an importance matrix .*imatrix\.gguf"):
        check(sound, plan_of(tiny_v3, MIX, None))


def test_an_imatrix_of_another_model_is_refused(sound: Path, sound_plan: Plan, tmp_path: Path) -> None:
    entries = {DOWN: (1, np.ones(7, np.float32))}
    other = factory.legacy_imatrix(tmp_path / "other.dat", entries)
    with pytest.raises(ImatrixError, match=r"entry of 'blk\.1\.ffn_down_exps\.weight' does not fit its 4 x 256"):
        check(sound, sound_plan, other)


def test_another_checkpoint_is_caught_in_every_tensor(sound: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    other = factory.checkpoint(tmp_path / "Tiny-V3", seed=8)
    verdict = check(sound, plan_of(other, MIX, tiny_imatrix), tiny_imatrix, "100 rows")
    assert {f.kind for f in verdict.findings.kept()} == {"row"}
    quantized = {t.name for t in verdict_tensors(sound) if t.type not in ("F32",)}
    assert quantized <= {f.tensor for f in verdict.findings.kept()}


def verdict_tensors(path: Path) -> list[TensorInfo]:
    return list(read_header(path).tensors)


def test_without_a_plan_the_files_own_types_are_derived(
    sound: Path, copied: Path, sound_plan: Plan, tiny_imatrix: Path
) -> None:
    assert sound_plan.catalogue.source is not None
    weights = open_imatrix(str(tiny_imatrix))
    rows = RowCheck(sound_plan.catalogue, sound_plan.catalogue.source, weights, Ggml(None), parse_sample("1%"), 0)
    outcome = verify(Request(sound, imatrix=weights, rows=rows), Silent())
    assert outcome.verdict.findings.kept() == []
    assert "names and shapes of the source" in outcome.verdict.checked
    rewrite(copied, reshape("blk.0.attn_output.weight", (256, 128)))
    verdict = verify(Request(copied, imatrix=weights, rows=rows), Silent()).verdict
    assert_found(verdict, "plan", r"attn_output\.weight: shape: expected 128x256, found 256x128")


def test_a_key_can_be_left_out(copied: Path, sound_plan: Plan, tiny_imatrix: Path) -> None:
    rewrite(copied, lambda kvs, _i: set_key(kvs, kv("general.name", STRING, "Renamed")))
    verdict = check(copied, sound_plan, tiny_imatrix, None)
    assert [str(f) for f in verdict.findings.kept()] == [
        f"tiny.gguf: key 'general.name': expected str 'Tiny V3', found str 'Renamed' (byte {key_offset(copied)})"
    ]
    assert check(copied, sound_plan, tiny_imatrix, None, ignored_keys=("general.name",)).ok


def key_offset(path: Path) -> int:
    return path.read_bytes().index(struct.pack("<Q", 12) + b"general.name")


def test_a_plan_from_a_config_alone_checks_what_it_knows(
    sound: Path, copied: Path, tiny_v3: Path, tiny_imatrix: Path
) -> None:
    config = plan_of(tiny_v3 / "config.json", MIX, tiny_imatrix)
    verdict = check(sound, config, tiny_imatrix)
    assert verdict.findings.kept() == []
    assert "only the config is known" in verdict.notes[0]
    rewrite(copied, lambda kvs, _i: set_key(kvs, kv("deepseek2.block_count", U32, 4)))
    assert_found(
        check(copied, config, tiny_imatrix), "metadata", r"deepseek2\.block_count': expected u32 3, found u32 4"
    )


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
    """Two bytes of a block at a time are set to a float16 NaN, a bfloat16 NaN or an E8M0 NaN: exactly the places that
    ggml refuses are found."""
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


def test_each_expert_is_sampled(sound: Path, copied: Path, sound_plan: Plan, tiny_imatrix: Path) -> None:
    for i in range(4):
        at, n = expert(copied, UP, i)
        poke(copied, at, bytes(n))
    verdict = check(copied, sound_plan, tiny_imatrix, "1 rows")
    assert sorted(f.row // 256 for f in verdict.findings.kept() if f.row is not None) == [0, 1, 2, 3]


def test_samples_are_read() -> None:
    assert parse_sample("1%").of(10**6) == 0.01
    assert parse_sample("0.1 %").of(10**6) == pytest.approx(0.001)
    assert parse_sample("ALL").of(10**6) == 1
    assert parse_sample("500").of(1000) == 0.5
    assert parse_sample("500 rows").of(100) == 1
    for wrong in ("", "0%", "101%", "-1", "1.5", "some", "%", "0"):
        with pytest.raises(ValueError, match="is not a sample such as"):
            parse_sample(wrong)


@pytest.mark.parametrize("seed", range(3))
def test_which_findings_are_kept_does_not_depend_on_the_order_in_which_they_are_found(seed: int) -> None:
    found = [Finding("row", "f", "x", f"t{t}", offset=100_000 * t + i, row=i) for t in range(900) for i in range(30)]
    due = [f for f in found if f.row is not None and f.row < KEPT_EACH][:KEPT]
    random.Random(seed).shuffle(found)
    findings = Findings()
    for f in found:
        findings.add(f)
    assert (findings.count, findings.kept()) == (27_000, due)
    assert len(due) == KEPT


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


def test_every_prefix_of_a_header_is_a_finding(sound: Path, tmp_path: Path) -> None:
    blob = sound.read_bytes()
    end = read_header(sound).data_offset
    path = tmp_path / "x.gguf"
    for n in (*range(0, 400, 7), *range(400, end, 1009)):
        path.write_bytes(blob[:n])
        assert not check(path).ok


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"tensors": []}', b'{"tensors": [{"name": 1}]}'])
def test_what_is_no_plan_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(raw)
    with pytest.raises(SourceError, match=r"is not a plan|the plan has no tensors"):
        read_plan(tmp_path / "p.json")
