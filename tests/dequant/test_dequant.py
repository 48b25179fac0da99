"""quantkit dequant: bits compared with torch, the layout of the output directory, and resuming after an
interruption."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
import torch
from conftest import Run, Tools
from dequantizing import dequant, load, require_equal
from safetensors import safe_open
from safetensors.torch import save_file
from stopping import edit_head

from quantkit import kernels
from quantkit.base.errors import (
    KernelError,
    OutputError,
    QuantkitError,
    ResumeError,
    SourceError,
    UnsupportedError,
    WeightError,
)
from quantkit.base.folders import Folder
from quantkit.base.journal import Record, digest
from quantkit.dequant import DequantOptions, plan_dequant, prepare, run
from quantkit.dequant.decode import Decoder, Fp8Rows, Native, Torch
from quantkit.dequant.state import STATE, read_state
from quantkit.kernels import U8
from quantkit.model.sources.gguf_file import open_gguf
from quantkit.model.sources.safetensors_dir import open_checkpoint
from quantkit.model.sources.safetensors_header import DTYPE_BYTES

INDEX = "model.safetensors.index.json"
#: bytes of a record of the journal
SIZE = 40
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
CODES = [c for c in range(256) if c & 0x7F != 0x7F]


def reference(folder: Path, dtype: torch.dtype = torch.bfloat16, block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """Dequantize a checkpoint by torch: weight.float() * scale, rounded."""
    out = {}
    stored = load(folder)
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[name + "_scale_inv"].float()
            scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            out[name] = (tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]).to(dtype)
        else:
            out[name] = tensor
    return out


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_weight(
    folder: Path, codes: np.ndarray, scale: Any, block: tuple[int, int] = (128, 128), config: Mapping[str, Any] = {}
) -> Path:
    """Write a checkpoint of one FP8 weight `w` and its scales, a torch tensor or float32 values."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(scale, torch.Tensor):
        scale = torch.from_numpy(np.ascontiguousarray(scale, np.float32))
    weight = torch.from_numpy(np.ascontiguousarray(codes, np.uint8)).view(torch.float8_e4m3fn)
    save_file({"w": weight, "w_scale_inv": scale}, folder / "model.safetensors", {"format": "pt"})
    quant = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block), **config}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quant}))
    return folder


def says(call: Any, error: type[QuantkitError]) -> str:
    with pytest.raises(error) as e:
        call()
    return str(e.value)


# ---------------------------------------------------------------- the values


@pytest.mark.parametrize(
    ("dtype", "shard_size"), [("bf16", 5 * 10**9), ("bf16", 1_000_000), ("bf16", 1), ("f16", 10**9), ("f32", 2_000_000)]
)
def test_every_tensor_equals_torch(tiny_v3: Path, tmp_path: Path, dtype: str, shard_size: int) -> None:
    dst = dequant(tiny_v3, tmp_path / "out", dtype, shard_size)
    got = load(dst)
    require_equal(got, reference(tiny_v3, TORCH[dtype]))
    shards = sorted(dst.glob("*.safetensors"))
    if shard_size >= 10**9:
        assert [p.name for p in shards] == ["model.safetensors"]
        assert not (dst / INDEX).exists()
        return
    index = json.loads((dst / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in got.values())}
    assert list(index["weight_map"]) == sorted(got)
    for i, path in enumerate(shards):
        assert path.name == f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with safe_open(path, "pt") as f:
            names = list(f.keys())
            sizes = [f.get_tensor(n).nbytes for n in names]
        assert sum(sizes) <= shard_size or len(sizes) == 1
        assert {n for n, file in index["weight_map"].items() if file == path.name} == set(names)
    assert len(open_checkpoint(dst).tensors) == len(got)


def finite_scales(n: int) -> np.ndarray:
    """Scales of every magnitude, float32 [n, 1]: zero, subnormal, huge, negative; 448 of them stay finite in BF16."""
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 1 << 32, 4 * n, np.uint32)
    bits[: n // 4] &= 0x807FFFFF  # subnormal
    bits[n // 4 : n // 2] &= 0xFFFF8000  # few bits: products half-way between two BF16 values
    values = bits.view(np.float32)
    values = values[np.abs(values) < 3.3e38 / 448][:n]
    values[:4] = [0.0, -0.0, 1.0, 2.0**-149]
    return values.reshape(-1, 1)


@pytest.mark.parametrize("kernel", [*kernels.OWN, "ggml", "torch"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_all_codes_with_scales_of_every_magnitude(
    tmp_path: Path, kernel: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = finite_scales(6000)
    src = one_weight(tmp_path / "src", np.tile(np.array(CODES, np.uint8), (len(scale), 1)), scale, (1, 254))
    decoder: Decoder = Torch("cpu") if kernel == "torch" else Native()
    if kernel != "torch":
        monkeypatch.setenv("QUANTKIT_KERNELS", kernel)
    got = load(dequant(src, tmp_path / "out", dtype, decoder=decoder))
    require_equal(got, reference(src, TORCH[dtype], (1, 254)))


@pytest.mark.parametrize("kernel", [*kernels.OWN, "ggml", "torch"])
def test_all_codes_in_f16(tmp_path: Path, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # small values become subnormal or zero, as in torch; 448 * 146.24 is the largest finite product
    exponents = np.random.default_rng(6).uniform(-40, 7, (4000, 1))
    scale = np.concatenate([np.exp2(exponents), [[146.24]]]).astype(np.float32)
    src = one_weight(tmp_path / "src", np.tile(np.array(CODES, np.uint8), (len(scale), 1)), scale, (1, 254))
    decoder: Decoder = Torch("cpu") if kernel == "torch" else Native()
    if kernel != "torch":
        monkeypatch.setenv("QUANTKIT_KERNELS", kernel)
    require_equal(load(dequant(src, tmp_path / "out", "f16", decoder=decoder)), reference(src, torch.float16, (1, 254)))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((1, 1), (128, 128)),
        ((127, 129), (128, 128)),
        ((129, 127), (128, 128)),
        ((300, 1000), (128, 128)),
        ((5, 7), (2, 3)),
        ((64, 33), (7, 1 << 20)),
        ((3, 70000), (1 << 20, 64)),
    ],
)
@pytest.mark.parametrize("decoder", [Native(), Torch("cpu")], ids=["native", "torch"])
def test_partial_blocks_whatever_the_slab(
    tmp_path: Path, shape: tuple[int, int], block: tuple[int, int], decoder: Decoder
) -> None:
    rng = np.random.default_rng(prod(shape))
    codes = np.array(CODES, np.uint8)[rng.integers(0, len(CODES), shape)]
    scale = rng.lognormal(-6, 2, tuple(-(-n // b) for n, b in zip(shape, block, strict=True)))
    src = one_weight(tmp_path / "src", codes, scale, block)
    stored = load(src)
    want = (
        stored["w"].float()
        * stored["w_scale_inv"][torch.arange(shape[0])[:, None] // block[0], torch.arange(shape[1])[None] // block[1]]
    )

    class Small:
        slab_values = 100

        def __call__(self, rows: Fp8Rows, dtype: str, out: U8) -> None:
            decoder(rows, dtype, out)

    decoders: tuple[Decoder, ...] = (decoder, Small())
    for i, each in enumerate(decoders):
        got = load(dequant(src, tmp_path / f"out{i}", decoder=each))
        require_equal(got, {"w": want.bfloat16()})


def ue8m0(folder: Path, scale: np.ndarray, as_u8: bool) -> Path:
    """A weight of every code up to 1.0, with scales of these exponents, as F8_E8M0 or as plain bytes."""
    codes = np.array([c for c in CODES if c & 0x7F <= 0x38], np.uint8)
    scales = torch.from_numpy(scale.astype(np.uint8).reshape(-1, 1))
    if not as_u8:
        scales = scales.view(torch.float8_e8m0fnu)
    config = {"scale_fmt": "ue8m0"}
    return one_weight(folder, np.tile(codes, (len(scale), 1)), scales, (1, len(codes)), config)


@pytest.mark.parametrize("as_u8", [False, True])
def test_ue8m0_scales(tmp_path: Path, as_u8: bool) -> None:
    src = ue8m0(tmp_path / "src", np.arange(255), as_u8)
    stored = load(src)
    scale = stored["w_scale_inv"].view(torch.float8_e8m0fnu).float()
    assert scale[[0, 127, 254], 0].tolist() == [2.0**-127, 1.0, 2.0**127]
    require_equal(load(dequant(src, tmp_path / "out")), {"w": (stored["w"].float() * scale).bfloat16()})


@pytest.mark.parametrize("as_u8", [False, True])
def test_ue8m0_nan_is_refused(tmp_path: Path, as_u8: bool) -> None:
    src = ue8m0(tmp_path / "src", np.array([1, 255]), as_u8)
    said = says(lambda: dequant(src, tmp_path / "out"), WeightError)
    assert "'w', row 1, column 0 is nan (code 0x00 with the scale nan); the checkpoint is damaged" in said


def test_u8_scales_without_a_scale_fmt_are_refused(tmp_path: Path) -> None:
    src = one_weight(tmp_path / "src", np.zeros((2, 2)), torch.zeros((1, 1), dtype=torch.uint8))
    said = says(lambda: open_checkpoint(src), UnsupportedError)
    assert said.endswith("scale 'w_scale_inv' is U8; quantkit reads F32, BF16, F16, F8_E8M0")


@pytest.mark.parametrize("decoder", [Native(), Torch("cpu")], ids=["native", "torch"])
@pytest.mark.parametrize(
    ("dtype", "row", "column", "code", "scale", "words"),
    [
        ("bf16", 200, 3, 0x7F, 1.0, "is nan (code 0x7f with the scale 1); the checkpoint is damaged, download that"),
        ("f32", 0, 299, 0xFF, 1.0, "is nan (code 0xff with the scale 1); the checkpoint is damaged, download that"),
        ("bf16", 129, 128, 0x7E, 3e38, "is inf (code 0x7e with the scale 3e+38); the checkpoint is damaged"),
        ("bf16", 7, 0, 0x38, 3.4e38, ": 3.4e+38 is out of the range of BF16, which ends at 3.38953139e+38; choose"),
        ("f16", 255, 150, 0x7E, 146.5, ": 65632 is out of the range of F16, which ends at 65,504; choose another"),
        ("f16", 255, 150, 0xFE, 146.25, ": -65520 is out of the range of F16, which ends at 65,504; choose another"),
    ],
)
def test_what_is_not_finite_is_refused(
    tmp_path: Path, decoder: Decoder, dtype: str, row: int, column: int, code: int, scale: float, words: str
) -> None:
    codes = np.zeros((256, 300), np.uint8)
    codes[row, column] = code
    codes[255, 299] = 0x7F  # not the first
    src = one_weight(tmp_path / "src", codes, np.full((2, 3), scale))
    said = says(lambda: dequant(src, tmp_path / "out", dtype, decoder=decoder), WeightError)
    assert f"model.safetensors: 'w', row {row}, column {column}" in said
    assert words in said
    assert not (tmp_path / "out").exists()


def test_the_last_that_is_finite_is_not_refused(tmp_path: Path) -> None:
    one = np.full((1, 1), 0x38, np.uint8)
    for dtype, largest in (("f16", 65519.996), ("bf16", np.nextafter(np.float32(2**128 - 2**119), np.float32(0)))):
        src = one_weight(tmp_path / dtype, one, np.full((1, 1), largest))
        got = load(dequant(src, tmp_path / f"{dtype}-out", dtype))["w"]
        assert got.item() == torch.finfo(TORCH[dtype]).max


def test_other_tensors_are_carried_over_bit_by_bit(tmp_path: Path) -> None:
    """Tensors of every dtype, NaN payloads included; an odd number of BF16 values before F32, which must be aligned."""
    src = one_weight(tmp_path / "src", np.full((3, 3), 0x38), np.ones((1, 1)))
    odd = torch.tensor([0x7FC1, 0x7F80, -1], dtype=torch.int16).view(torch.bfloat16)
    others = {
        "norm": odd, "bias": torch.tensor([float("nan"), 1e-45]), "half": torch.ones(1, dtype=torch.float16),
        "ids": torch.tensor([1 << 40]), "mask": torch.tensor([True, False, True]), "scalar": torch.tensor(0.1),
        "empty": torch.empty((0, 4)),
    }  # fmt: skip
    save_file(load(src) | others, src / "model.safetensors", {"format": "pt"})
    want = reference(src)
    for dtype in ("bf16", "f32"):
        for size in (5 * 10**9, 16):
            dst = dequant(src, tmp_path / f"{dtype}{size}", dtype, size)
            require_equal(load(dst), want | {"w": want["w"].to(TORCH[dtype])})
            for shard in plan_dequant(open_checkpoint(src), DequantOptions(dtype, size)).shards:
                assert len(shard.header) % 8 == 0
                for t in shard.tensors:
                    assert t.offset % DTYPE_BYTES[t.dtype] == 0, t.source.name


def test_tensors_keep_the_order_of_the_source(tmp_path: Path) -> None:
    """By file, then by name, as safetensors and the converter list them, however the shards are cut."""
    src = factory.checkpoint(tmp_path / "src", n_shards=1)
    want = list(reference(src))
    for size in (700_000, 3_000_000):
        dst = dequant(src, tmp_path / str(size), shard_size=size)
        assert len(list(dst.glob("*.safetensors"))) > 3
        assert list(load(dst)) == want


def test_the_bytes_do_not_depend_on_threads_or_device(tiny_v3: Path, tmp_path: Path) -> None:
    one = snapshot(dequant(tiny_v3, tmp_path / "one", shard_size=2_000_000, threads=1))
    assert snapshot(dequant(tiny_v3, tmp_path / "seven", shard_size=2_000_000, threads=7)) == one
    assert snapshot(dequant(tiny_v3, tmp_path / "torch", shard_size=2_000_000, decoder=Torch("cpu"))) == one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_bytes(tiny_v3: Path, tmp_path: Path) -> None:
    for dtype in TORCH:
        native = dequant(tiny_v3, tmp_path / f"native-{dtype}", dtype)
        assert snapshot(dequant(tiny_v3, tmp_path / f"cuda-{dtype}", dtype, decoder=Torch("cuda"))) == snapshot(native)
    scale = finite_scales(6000)
    src = one_weight(tmp_path / "src", np.tile(np.array(CODES, np.uint8), (len(scale), 1)), scale, (1, 254))
    got = load(dequant(src, tmp_path / "out", decoder=Torch("cuda")))
    require_equal(got, reference(src, torch.bfloat16, (1, 254)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU")
def test_cuda_without_a_gpu(tiny_v3: Path, tmp_path: Path, quantkit: Run) -> None:
    assert "leave out --device cuda: the bytes are the same" in says(lambda: Torch("cuda"), KernelError)
    done = quantkit("dequant", tiny_v3, tmp_path / "out", "--device", "cuda")
    assert (done.returncode, list(tmp_path.iterdir())) == (9, [])


# ---------------------------------------------------------------- the directory


def test_config_and_other_files(v3: Path, tmp_path: Path) -> None:
    (v3 / "inference").mkdir()
    (v3 / "inference" / "model.py").write_text("import torch\n")
    (v3 / "modeling_deepseek.py").write_bytes(b"# code\r\n")
    (v3 / "LICENSE").write_text("MIT")
    (v3 / ".cache").mkdir()
    (v3 / ".cache" / "x.lock").touch()
    (v3 / ".gitattributes").touch()
    (v3 / "inference" / "old.pt").write_bytes(b"weights")
    (v3 / "README.md").symlink_to("LICENSE")
    factory.edit_json(v3 / "config.json", lambda c: c.update(name="ü", rope_theta=1e-06, dtype="bfloat16"))
    plan = plan_dequant(open_checkpoint(v3), DequantOptions("f16"))
    assert plan.left_out == ("inference/old.pt",)
    dst = dequant(v3, tmp_path / "out", "f16", 1_000_000)
    carried = ["LICENSE", "README.md", "generation_config.json", "inference/model.py", "modeling_deepseek.py",
               "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
    assert sorted(name for name, _ in plan.carried) == sorted(carried)
    made = [n for n in snapshot(dst) if not n.endswith(".safetensors")]
    assert sorted(made) == sorted([*carried, "config.json", INDEX])
    for name in carried:
        assert (dst / name).read_bytes() == (v3 / name).read_bytes()
        assert not (dst / name).is_symlink()
    before, after = (json.loads((p / "config.json").read_text("utf-8")) for p in (v3, dst))
    want = {k: v for k, v in before.items() if k != "quantization_config"}
    want |= {"torch_dtype": "float16", "dtype": "float16"}
    assert list(after.items()) == list(want.items())
    assert "ü" in (dst / "config.json").read_text("utf-8")


def test_a_config_without_a_dtype_gets_one(tmp_path: Path) -> None:
    src = one_weight(tmp_path / "src", np.zeros((1, 1)), np.ones((1, 1)))
    dst = dequant(src, tmp_path / "out", "f32")
    assert json.loads((dst / "config.json").read_text()) == {"torch_dtype": "float32"}


def test_mtp_is_dropped_on_request(tiny_v3: Path, tmp_path: Path) -> None:
    dst = dequant(tiny_v3, tmp_path / "out", mtp=False)
    every = reference(tiny_v3)
    main = {k: v for k, v in every.items() if not k.startswith("model.layers.3.")}
    assert 0 < len(main) < len(every)
    require_equal(load(dst), main)
    config = json.loads((dst / "config.json").read_text())
    assert (config["num_nextn_predict_layers"], config["num_hidden_layers"]) == (0, 3)
    kept = json.loads((dequant(tiny_v3, tmp_path / "kept") / "config.json").read_text())
    assert kept["num_nextn_predict_layers"] == 1


def test_mtp_cannot_be_dropped_without_a_layer_count(v3: Path, tmp_path: Path) -> None:
    factory.edit_json(v3 / "config.json", lambda c: c.pop("num_hidden_layers"))
    said = says(lambda: dequant(v3, tmp_path / "out", mtp=False), SourceError)
    assert "num_hidden_layers is None" in said
    assert "--mtp keep" in said


def test_a_checkpoint_that_is_not_fp8(tmp_path: Path) -> None:
    src = factory.checkpoint(tmp_path / "V2", factory.TINY_V2)
    said = says(lambda: dequant(src, tmp_path / "out"), SourceError)
    assert said == f"{src}: there is nothing to dequantize, its tensors are BF16; use it as it is"


def test_the_source_is_only_read(v3: Path, tmp_path: Path) -> None:
    before = snapshot(v3)
    dequant(v3, tmp_path / "out")
    assert snapshot(v3) == before


def test_places_that_cannot_be_written_to(v3: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    (tmp_path / "link").symlink_to(v3)
    before = snapshot(tmp_path)
    for dst, words in (
        (v3, "is the source, or inside it"),
        (tmp_path / "link", "is the source, or inside it"),
        (v3 / "bf16", "is the source, or inside it"),
        (full, "is not empty, and holds no unfinished run; choose another directory"),
        (tmp_path / "file", "is a file; give the name of the directory to make"),
        (tmp_path / "no" / "out", f"there is no directory {tmp_path / 'no'}; create it first"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        for restart in (False, True):
            assert words in says(lambda d=dst, r=restart: dequant(v3, d, restart=r), OutputError)
    assert snapshot(tmp_path) == before


def test_an_empty_directory_is_taken(tiny_v3: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    require_equal(load(dequant(tiny_v3, tmp_path / "out")), reference(tiny_v3))
    said = says(lambda: dequant(tiny_v3, tmp_path / "out"), OutputError)
    assert "is not empty" in said


def test_space_is_checked_first(tiny_v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = plan_dequant(open_checkpoint(tiny_v3), DequantOptions()).nbytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 7))
    said = says(lambda: dequant(tiny_v3, tmp_path / "out"), OutputError)
    assert f"{need:,} bytes are to be written, but {need - 7:,} are free; free 7 more" in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    dst = dequant(tiny_v3, tmp_path / "out")
    assert sum(len(data) for data in snapshot(dst).values()) == need


def test_a_write_that_fails(tiny_v3: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: the same call fails."""
    code = (
        "import resource, sys; n = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_FSIZE, (n, n));"
        "from quantkit.cli import main; main()"
    )
    for limit, kept in ((0, False), (100_000, False), (260_000, True)):
        dst = tmp_path / str(limit)
        command = [sys.executable, "-c", code, str(limit), "dequant", str(tiny_v3), str(dst), "-q", "--shard-size", "1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (7, 1), done.stderr
        assert "File too large; " in done.stderr
        assert done.stderr.endswith("run the same command again: finished shards are kept\n")
        assert bool(shards_of(dst)) == dst.exists() == kept
        assert not list(dst.glob(".*quantkit-part"))


# ---------------------------------------------------------------- the command


def test_the_command(tiny_v3: Path, tmp_path: Path, quantkit: Run) -> None:
    dst = tmp_path / "out"
    dry = quantkit("dequant", tiny_v3, dst, "--shard-size", "1M", "--mtp", "drop", "-n")
    assert (dry.returncode, dry.stderr, dst.exists()) == (0, "", False)
    plan = plan_dequant(open_checkpoint(tiny_v3), DequantOptions("bf16", 1_000_000, False))
    assert f"shards       {len(plan.shards)}, {plan.tensor_bytes:,} bytes of tensors" in dry.stdout
    assert f"dropped      {plan.n_dropped} weights of MTP layers" in dry.stdout
    assert dry.stdout.endswith("nothing was written\n")
    done = quantkit("dequant", tiny_v3, dst, "--shard-size", "1M", "--mtp", "drop", "-t", "1")
    assert done.returncode == 0, done.stderr
    assert f"{len(plan.shards)} shards, {plan.nbytes:,} bytes" in done.stdout
    assert sum(len(data) for data in snapshot(dst).values()) == plan.nbytes
    quiet = quantkit("dequant", tiny_v3, tmp_path / "quiet", "--shard-size", "1M", "--mtp", "drop", "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert snapshot(tmp_path / "quiet") == snapshot(dst)


def test_r1_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """671,026,419,200 weights and 13,463,426,304 of the MTP layer, two bytes each; 59 biases of 256 in F32."""
    import sparse_r1

    source = open_checkpoint(sparse_r1.make(tmp_path / "DeepSeek-R1"))
    main, mtp = 671_026_419_200, 13_463_426_304
    for keep, want in ((True, 2 * (main + mtp) + 2 * 59 * 256), (False, 2 * main + 2 * 58 * 256)):
        plan = plan_dequant(source, DequantOptions(keep_mtp=keep))
        assert plan.tensor_bytes == want
        assert json.loads(plan.index or b"")["metadata"]["total_size"] == want
        assert all(0 < shard.tensor_bytes <= 5 * 10**9 for shard in plan.shards)
        # no two adjacent shards would fit in one
        sizes = [shard.tensor_bytes for shard in plan.shards]
        assert min(a + b for a, b in itertools.pairwise(sizes)) > 5 * 10**9
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    said = says(lambda: prepare(source, tmp_path / "out", DequantOptions()), OutputError)
    assert re.search(r"1,368,989,\d{3},\d{3} bytes are to be written, but 1,000,000,000,000 are free", said)


@pytest.mark.tools
def test_the_converter_makes_the_same_gguf(tools: Tools, tiny_v3: Path, tiny_bf16: Path, tmp_path: Path) -> None:
    # the converter takes the model's name from the directory's
    dst = dequant(tiny_v3, tmp_path / tiny_v3.name, shard_size=1_000_000)
    made, want = (open_gguf(p) for p in (tools.convert(dst, tmp_path / "from-bf16.gguf"), tiny_bf16))
    # shards are cut elsewhere, so the converter meets the tensors in another order
    assert made.kvs == want.kvs
    assert made.tensors.keys() == want.tensors.keys()
    for name, tensor in want.tensors.items():
        got = made.tensor(name)
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        data = [np.empty(tensor.nbytes, np.uint8), np.empty(tensor.nbytes, np.uint8)]
        made.read(got, 0, data[0])
        want.read(tensor, 0, data[1])
        assert data[0].tobytes() == data[1].tobytes(), name


def test_memory_is_bounded(tmp_path: Path) -> None:
    """One weight of 96 MB and another tensor of 64 MB add only a few slabs to a process's memory."""
    codes = np.tile(np.array(CODES[:128], np.uint8), (12000, 64))
    src = one_weight(tmp_path / "src", codes, np.ones((94, 64)))
    save_file(
        load(src) | {"embed": torch.ones((4096, 8192), dtype=torch.bfloat16)},
        src / "model.safetensors",
        {"format": "pt"},
    )
    code = (
        "import sys; from pathlib import Path\n"
        "from quantkit.dequant import DequantOptions, prepare, run\n"
        "from quantkit.dequant.decode import Native\n"
        "from quantkit.model.sources.safetensors_dir import open_checkpoint\n"
        "def status(key): return int(Path('/proc/self/status').read_text().split(key)[1].split()[0]) * 1024\n"
        "job = prepare(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), DequantOptions())\n"
        "before = status('VmRSS:')\n"
        "run(job, Native(), 2, lambda name, done: None)\n"
        "print(status('VmHWM:') - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(src), str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 32 << 20
    require_equal(load(tmp_path / "out"), reference(src))


# ---------------------------------------------------------------- going on after an interruption

#: quantkit with a decoder that sends its own process a signal at the n-th slab
SIGNALLED = """
import itertools, os, sys, time
from quantkit.dequant import decode
from quantkit.cli import main
at, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
count = itertools.count(1)
class Signalled(decode.Native):
    def __call__(self, *args):
        if next(count) == at:
            os.kill(os.getpid(), number)
            time.sleep(0.5)
        return super().__call__(*args)
decode.Native = Signalled
main()
"""


def interrupted(src: Path, dst: Path, at: int, number: int, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SIGNALLED, str(at), str(int(number)), "dequant", str(src), str(dst)]
    command += ["-q", "-t", "1", "--shard-size", "1M", *options]
    # not in the repository, where `quantkit` would be the source folder without its compiled module
    return subprocess.run(command, cwd=src.parent, capture_output=True, text=True, timeout=120, check=False)


def shards_of(folder: Path) -> dict[str, tuple[int, int]]:
    """The inode and modification time of each finished shard."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(folder.glob("model-*.safetensors"))}


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGKILL, -9, ""),
        (signal.SIGINT, 130, "shards are finished and kept; run the same command again to continue\n"),
        (signal.SIGTERM, 143, "shards are finished and kept; run the same command again to continue\n"),
    ],
)
def test_goes_on_where_it_was(tiny_v3: Path, tmp_path: Path, quantkit: Run, number: int, code: int, words: str) -> None:
    dst = tmp_path / "out"
    whole = snapshot(dequant(tiny_v3, tmp_path / "whole", shard_size=1_000_000))
    done = interrupted(tiny_v3, dst, 40, number)
    assert (done.returncode, done.stderr.endswith(words)) == (code, True), done.stderr
    first = shards_of(dst)
    every = [n for n in whole if n.startswith("model-")]
    assert 0 < len(first) < len(every)
    parts = list(dst.glob(".*quantkit-part"))
    assert bool(parts) == (number == signal.SIGKILL)
    # no tool takes it for a checkpoint
    assert not (dst / "config.json").exists()
    assert not (dst / INDEX).exists()
    dry = quantkit("dequant", tiny_v3, dst, "--shard-size", "1M", "-n")
    assert f"finished     {len(first)} of the shards" in dry.stdout
    again = quantkit("dequant", tiny_v3, dst, "--shard-size", "1M", "-q")
    assert (again.returncode, again.stderr) == (0, "")
    assert snapshot(dst) == whole
    assert shards_of(dst).items() >= first.items()


def test_interrupted_before_the_first_shard_leaves_nothing(tiny_v3: Path, tmp_path: Path) -> None:
    done = interrupted(tiny_v3, tmp_path / "out", 1, signal.SIGINT)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted; nothing was left behind")
    assert not (tmp_path / "out").exists()


def half(src: Path, dst: Path) -> Path:
    assert interrupted(src, dst, 40, signal.SIGKILL).returncode == -9
    return dst


def test_with_other_settings_it_is_refused(v3: Path, tmp_path: Path, quantkit: Run) -> None:
    dst = half(v3, tmp_path / "out")
    before = snapshot(dst)
    first = f"{dst}: holds an unfinished run, "
    last = "; start again with --restart, or choose another directory"
    for options, words in (
        (("f16", 1_000_000, True), "whose --dtype was 'bf16' and now is 'f16'"),
        (("bf16", 2_000_000, True), "whose --shard-size was 1000000 and now is 2000000"),
        (("bf16", 1_000_000, False), "whose --mtp was 'keep' and now is 'drop'"),
    ):
        source = open_checkpoint(v3)
        assert (
            says(lambda s=source, o=options: prepare(s, dst, DequantOptions(*o)), ResumeError) == first + words + last
        )
    shard = v3 / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(0, 0))
    assert says(lambda: prepare(open_checkpoint(v3), dst, DequantOptions(shard_size=10**6)), ResumeError) == (
        f"{dst}: holds an unfinished run, since which {shard.name} of the source has another modification time{last}"
    )
    factory.edit_json(v3 / "config.json", lambda c: c.update(rope_theta=1))
    done = quantkit("dequant", v3, dst, "--shard-size", "1M")
    assert (done.returncode, "since which config.json of the source has another size" in done.stderr) == (13, True)
    assert snapshot(dst) == before
    # after a new start, nothing of the first run is left
    done = quantkit("dequant", v3, dst, "--shard-size", "3M", "--dtype", "f16", "--restart", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    assert snapshot(dst) == snapshot(dequant(v3, tmp_path / "other", "f16", 3_000_000))


def test_a_state_of_another_version(tiny_v3: Path, tmp_path: Path) -> None:
    dst = half(tiny_v3, tmp_path / "out")
    edit_head(dst / STATE, lambda head: head.update(quantkit="0.0.1"))
    said = says(lambda: dequant(tiny_v3, dst, shard_size=1_000_000), ResumeError)
    assert "whose quantkit's version was '0.0.1' and now is" in said


def test_an_unfinished_run_of_an_older_quantkit(tiny_v3: Path, tmp_path: Path) -> None:
    """It kept its state as JSON."""
    dst = tmp_path / "out"
    dst.mkdir()
    (dst / ".quantkit-dequant.json").write_text('{"source": {}, "makes": [], "finished": {}}')
    for restart in (False, True):
        assert says(lambda r=restart: dequant(tiny_v3, dst, restart=r), ResumeError) == (
            f"{dst / '.quantkit-dequant.json'}: is of an older quantkit and cannot be continued; remove {dst} to "
            "start again"
        )


@pytest.mark.parametrize("text", ["", "[]\n", "{}\n", "{}"])
def test_a_damaged_state(tiny_v3: Path, tmp_path: Path, text: str) -> None:
    dst = tmp_path / "out"
    dst.mkdir()
    (dst / STATE).write_text(text)
    for restart in (False, True):
        assert says(lambda r=restart: dequant(tiny_v3, dst, restart=r), ResumeError) == (
            f"{dst / STATE}: is damaged and cannot be continued; remove {dst} to start again"
        )


@pytest.mark.parametrize(
    "change",
    [{"source": []}, {"makes": {}}, {"makes": ["../../x"]}, {"makes": ["/x"]}, {"of": "build"}],
    ids=str,
)
def test_a_state_that_says_something_else(tiny_v3: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    dst = half(tiny_v3, tmp_path / "out")
    edit_head(dst / STATE, lambda head: head.update(change))
    for restart in (False, True):
        assert says(lambda r=restart: dequant(tiny_v3, dst, restart=r), ResumeError) == (
            f"{dst / STATE}: is damaged and cannot be continued; remove {dst} to start again"
        )


def test_a_finished_shard_that_is_not_as_it_was(tiny_v3: Path, tmp_path: Path) -> None:
    dst = half(tiny_v3, tmp_path / "out")
    shard = next(iter(sorted(dst.glob("model-*"))))
    whole = shard.read_bytes()
    for data, words in ((whole[:-1], f"is {len(whole) - 1:,} bytes, not {len(whole):,}"), (b"x" + whole[1:], "header")):
        shard.write_bytes(data)
        said = says(lambda: dequant(tiny_v3, dst, shard_size=1_000_000), ResumeError)
        assert said.startswith(f"{shard}: is not the shard that was finished here")
        assert words in said
    shard.unlink()
    require_equal(load(dequant(tiny_v3, dst, shard_size=1_000_000)), reference(tiny_v3))


def told_in(dst: Path) -> list[Record]:
    with Folder.hold(dst) as folder:
        told = read_state(folder)
    assert told is not None
    return told.records


def test_the_journal_tells_of_every_byte_of_each_finished_shard(tiny_v3: Path, tmp_path: Path) -> None:
    dst = half(tiny_v3, tmp_path / "out")
    names = [shard.name for shard in plan_dequant(open_checkpoint(tiny_v3), DequantOptions(shard_size=10**6)).shards]
    told = told_in(dst)
    there = shards_of(dst)
    # the last one may be recorded, but not have its name yet
    assert len({r.part for r in told}) - len(there) in (0, 1)
    for name in there:
        raw, end = (dst / name).read_bytes(), 0
        for r in sorted(r for r in told if r.part == names.index(name)):
            assert (r.start, r.digest) == (end, digest(raw[r.start : r.start + r.n]))
            end += r.n
        assert end == len(raw)


@pytest.mark.parametrize("where", ["first of the data", "in the middle", "last"])
def test_a_shard_damaged_since_is_written_again(tiny_v3: Path, tmp_path: Path, quantkit: Run, where: str) -> None:
    dst = half(tiny_v3, tmp_path / "out")
    plan = plan_dequant(open_checkpoint(tiny_v3), DequantOptions(shard_size=1_000_000))
    before = shards_of(dst)
    damaged = plan.shards[1]
    path = dst / damaged.name
    at = {"first of the data": len(damaged.header), "in the middle": damaged.nbytes // 2, "last": damaged.nbytes - 1}
    factory.flip(path, at[where])
    done = quantkit("dequant", tiny_v3, dst, "--shard-size", "1M")
    assert done.returncode == 0, done.stderr
    assert f"warning: {path}: was damaged after it was finished; it is written again\n" in done.stderr
    assert f"finished     {len(before)} of the shards, which are read back" in done.stdout
    assert snapshot(dst) == snapshot(dequant(tiny_v3, tmp_path / "whole", shard_size=1_000_000))
    after = shards_of(dst)
    assert [name for name in before if after[name] != before[name]] == [damaged.name]


def test_progress_counts_what_is_read_back_and_takes_back_what_is_damaged(tiny_v3: Path, tmp_path: Path) -> None:
    dst = half(tiny_v3, tmp_path / "out")
    job = prepare(open_checkpoint(tiny_v3), dst, DequantOptions(shard_size=1_000_000))
    damaged = job.done[0]
    factory.flip(dst / damaged.name, damaged.nbytes - 1)
    moved: dict[str, int] = {}

    def progress(name: str, n: int) -> None:
        moved[name] = moved.get(name, 0) + n

    assert run(job, Native(), 1, progress) == (damaged.name,)
    left = {s.name: len(s.header) if s is damaged else s.nbytes for s in job.done}
    assert {s.name: moved.pop(s.name) for s in job.done} == left
    assert sum(moved.values()) == sum(s.tensor_bytes for s in (damaged, *job.todo))


def test_a_shard_of_which_a_piece_is_not_told_is_not_finished(tiny_v3: Path, tmp_path: Path) -> None:
    dst = half(tiny_v3, tmp_path / "out")
    name = min(shards_of(dst))
    before = shards_of(dst)
    line, _, records = (dst / STATE).read_bytes().partition(b"\n")
    (dst / STATE).write_bytes(line + b"\n" + records[SIZE:])  # the first piece of the first shard
    dequant(tiny_v3, dst, shard_size=1_000_000)
    assert shards_of(dst)[name] != before[name]
    require_equal(load(dst), reference(tiny_v3))


def test_two_at_once_are_refused(tiny_v3: Path, tmp_path: Path) -> None:
    dst = half(tiny_v3, tmp_path / "out")
    held = os.open(dst, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        said = says(lambda: dequant(tiny_v3, dst, shard_size=1_000_000), ResumeError)
        assert said == f"{dst}: another quantkit is running there; wait for it"
    finally:
        os.close(held)
    require_equal(load(dequant(tiny_v3, dst, shard_size=1_000_000)), reference(tiny_v3))


def test_a_bad_weight_late_keeps_what_is_finished(v3: Path, tmp_path: Path) -> None:
    plan = plan_dequant(open_checkpoint(v3), DequantOptions("bf16", 1_000_000))
    last = [t for t in plan.tensors if t.source.dtype == "F8_E4M3"][-1].source
    factory.poke(v3, last.name, 5, b"\x7f")
    dst = tmp_path / "out"
    said = says(lambda: dequant(v3, dst, shard_size=1_000_000), WeightError)
    assert f"'{last.name}', row 0, column 5 is nan (code 0x7f" in said
    assert shards_of(dst)
    assert (dst / STATE).exists()
    assert not (dst / "config.json").exists()


def test_the_header_is_what_the_format_wants(tiny_v3: Path, tmp_path: Path) -> None:
    blob = (dequant(tiny_v3, tmp_path / "out") / "model.safetensors").read_bytes()
    (n,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + n])
    assert n % 8 == 0
    assert next(iter(header)) == "__metadata__"
    end = 0
    for name, info in header.items():
        if name != "__metadata__":
            assert info["data_offsets"][0] == end
            end = info["data_offsets"][1]
    assert 8 + n + end == len(blob)
