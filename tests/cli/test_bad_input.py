"""Bad input from end to end: through the command line, each thing that can be wrong with weights, files, matrix,
recipe, output and disk gives its sentence on standard error and its exit code, with no traceback, and the output's
folder is as it was. What needs a disturbed system (a full disk, no permission) is tried on the functions as well."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from factory import TINY_V3, checkpoint, edit_json, edit_safetensors, gguf_file, legacy_imatrix, shard_of

from quantkit.base import errors
from quantkit.base.errors import OutputError, QuantkitError
from quantkit.building import run as builds
from quantkit.building.engines.native import NativeEngine
from quantkit.model.families.options import Options
from quantkit.model.open import open_model
from quantkit.model.sources.safetensors_dir import open_checkpoint
from quantkit.planning.plan import Plan, make_plan
from quantkit.recipe.load import load, parse

RECIPE = """\
name: Small
arch: [deepseek2]
file_type: Q4_K_M
rules:
  - {match: "*.weight", type: Q4_K, why: "quick to make"}
"""
NEEDY = RECIPE.replace("Q4_K,", "IQ2_S,")
AGAIN = "; llama-quantize refuses such weights too: the checkpoint is damaged, download that shard again"


class Place:
    """A recipe, an empty folder for the output, and the command that builds there."""

    def __init__(self, run: Run, tmp_path: Path) -> None:
        self.run = run
        self.recipe = tmp_path / "small.yaml"
        self.recipe.write_text(RECIPE)
        self.folder = tmp_path / "out"
        self.folder.mkdir()
        self.out = self.folder / "m.gguf"
        self.journal = self.folder / "m.gguf.partial" / "journal"
        self.begun = 0
        """bytes of a journal that tells of no rows"""

    def build(self, source: Path | str, *options: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["build", source, "-o", self.out, "-r", self.recipe, "-q", "-t", "2"]
        # a GGUF has its own
        pre = [] if Path(source).suffix == ".gguf" else ["--pre", "deepseek-v3"]
        return self.run(*command, *pre, *options)

    def fails(self, code: int, says: str, source: Path | str, *options: str | Path) -> None:
        """Build, and see nothing but this sentence, this exit code, and the folder as it was."""
        before = snapshot(self.folder)
        done = self.build(source, *options)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", f"error: {says}\n")
        assert snapshot(self.folder) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    """What is in a folder: every name with its content."""
    return {p.name: p.read_bytes() if p.is_file() else b"" for p in folder.iterdir()}


@pytest.fixture
def place(quantkit: Run, tmp_path: Path) -> Place:
    return Place(quantkit, tmp_path)


def poke(folder: Path, name: str, at: int, raw: bytes) -> Path:
    """Overwrite bytes of a stored tensor; the shard they are in."""
    c = open_checkpoint(folder)
    scale = name.endswith("_scale_inv")
    t = c.scales[name.removesuffix("_scale_inv")] if scale else c.tensors[name]
    with t.file.open("r+b") as f:
        f.seek(t.offset + at)
        f.write(raw)
    return t.file


def test_the_undamaged_checkpoint_builds(place: Place, v3: Path) -> None:
    done = place.build(v3)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p.name for p in place.folder.iterdir()] == ["m.gguf"]


def test_every_error_has_an_exit_code_of_its_own() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, QuantkitError)]
    codes = {c.exit_code: c.__name__ for c in classes}
    assert len(codes) == len(classes)
    assert not codes.keys() & {0, 2, 130, 143}
    said = dict(re.findall(r"(\w+Error) +(\d+)", errors.__doc__ or ""))
    assert {name: int(code) for name, code in said.items()} == {name: code for code, name in codes.items()}


# ---------------------------------------------------------------- weights

NAN32, INF32 = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
KV_B = "model.layers.0.self_attn.kv_b_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"

BAD_WEIGHTS: list[tuple[str, str, int, bytes, str]] = [
    # test id, tensor, byte, bytes, the sentence with {shard}
    (
        "nan_in_fp8",
        EXPERT,
        5 * 256 + 7,
        b"\x7f",
        f"'blk.1.ffn_up_exps.weight' (from {{shard}}: '{EXPERT}'), row 5, column 7 is nan",
    ),
    (
        "negative_nan_in_fp8",
        EXPERT,
        255 * 256 + 255,
        b"\xff",
        f"'blk.1.ffn_up_exps.weight' (from {{shard}}: '{EXPERT}'), row 255, column 255 is nan",
    ),
    # the first weight of the block that the scale at (1, 0) is of
    (
        "nan_in_a_scale",
        EXPERT + "_scale_inv",
        2 * 4,
        NAN32,
        f"'blk.1.ffn_up_exps.weight' (from {{shard}}: '{EXPERT}'), row 128, column 0 is nan",
    ),
    # head 1's rows of k, which are turned into columns
    (
        "nan_in_transposed_kv_b",
        KV_B,
        (128 + 3) * 256 + 9,
        b"\x7f",
        f"'blk.0.attn_k_b.weight' (from {{shard}}: '{KV_B}'), row 131, column 9 is nan",
    ),
    (
        "nan_in_v_of_kv_b",
        KV_B,
        (64 + 3) * 256 + 9,
        b"\x7f",
        f"'blk.0.attn_v_b.weight' (from {{shard}}: '{KV_B}'), row 67, column 9 is nan",
    ),
    (
        "inf_in_bf16",
        "lm_head.weight",
        2 * (383 * 256 + 1),
        b"\x80\x7f",
        "'output.weight' (from {shard}: 'lm_head.weight'), row 383, column 1 is inf",
    ),
    (
        "negative_inf_in_a_norm",
        "model.norm.weight",
        2 * 255,
        b"\x80\xff",
        "'output_norm.weight' (from {shard}: 'model.norm.weight'), row 0, column 255 is -inf",
    ),
    (
        "nan_in_the_router_bias",
        BIAS,
        4 * 3,
        NAN32,
        f"'blk.2.exp_probs_b.bias' (from {{shard}}: '{BIAS}'), row 0, column 3 is nan",
    ),
]


@pytest.mark.parametrize(("tensor", "at", "raw", "says"), [pytest.param(*c[1:], id=c[0]) for c in BAD_WEIGHTS])
def test_weights_that_are_no_numbers(place: Place, v3: Path, tensor: str, at: int, raw: bytes, says: str) -> None:
    shard = poke(v3, tensor, at, raw)
    place.fails(8, says.format(shard=shard.name) + AGAIN, v3)


def test_an_infinite_scale(place: Place, v3: Path) -> None:
    """Infinity times a weight is infinite, times zero it is NaN: the first weight decides which."""
    name = EXPERT.replace("up", "gate")
    poke(v3, name, 0, b"\x38")  # 1.0
    shard = poke(v3, name + "_scale_inv", 0, INF32)
    says = f"'blk.1.ffn_gate_exps.weight' (from {shard.name}: '{name}'), row 0, column 0 is inf"
    place.fails(8, says + AGAIN, v3)


def test_a_product_beyond_bfloat16(place: Place, v3: Path) -> None:
    poke(v3, EXPERT, 0, b"\x7e")  # 448
    shard = poke(v3, EXPERT + "_scale_inv", 0, struct.pack("<f", 1e36))
    says = f"'blk.1.ffn_up_exps.weight' (from {shard.name}: '{EXPERT}'), row 0, column 0 is inf"
    place.fails(8, says + AGAIN, v3)


def test_nan_where_nothing_is_read(place: Place, v3: Path) -> None:
    """The MTP layer is left out, whatever it holds."""
    poke(v3, "model.layers.3.eh_proj.weight", 0, b"\xc0\x7f")
    assert place.build(v3).returncode == 0


def test_nan_in_a_gguf(place: Place, tmp_path: Path) -> None:
    weights = np.ones((2, 256), np.float32)
    weights[1, 9] = np.nan
    source = gguf_file(tmp_path / "x.gguf", {"token_embd.weight": ((256, 2), "F32", weights.tobytes())})
    says = "'token_embd.weight' (from x.gguf: 'token_embd.weight'), row 1, column 9 is nan"
    place.fails(8, says + AGAIN, source)


# ---------------------------------------------------------------- checkpoints


def test_a_truncated_shard(place: Place, v3: Path) -> None:
    shard = shard_of(v3, "model.norm.weight")
    c = open_checkpoint(v3)
    last = max((t for t in [*c.tensors.values(), *c.scales.values()] if t.file == shard), key=lambda t: t.offset)
    size = shard.stat().st_size
    start = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    os.truncate(shard, size - 1)
    place.fails(
        4,
        f"{shard}: the data of '{last.name}' is said to be at {last.offset - start:,}-{size - start:,}, outside the "
        f"file's {size - 1 - start:,} data bytes; the shard is truncated: download it again",
        v3,
    )


def test_a_missing_shard(place: Place, v3: Path) -> None:
    shard_of(v3, "model.norm.weight").unlink()
    place.fails(
        4,
        f"{v3}: shard model-00002-of-00002.safetensors of the 2 that model.safetensors.index.json names is missing; "
        "download it again",
        v3,
    )


def test_a_path_that_leaves_the_checkpoint(place: Place, v3: Path) -> None:
    edit_json(
        v3 / "model.safetensors.index.json", lambda i: i["weight_map"].update({"lm_head.weight": "../x.safetensors"})
    )
    place.fails(
        4,
        f"{v3 / 'model.safetensors.index.json'}: weight_map names '../x.safetensors', which is outside the checkpoint "
        "directory",
        v3,
    )


def test_a_scale_without_its_weight(place: Place, v3: Path) -> None:
    shard = shard_of(v3, EXPERT)
    edit_safetensors(shard, lambda h: h.update({"x_scale_inv": h.pop(EXPERT + "_scale_inv")}))
    edit_json(
        v3 / "model.safetensors.index.json",
        lambda i: i["weight_map"].update({"x_scale_inv": i["weight_map"].pop(EXPERT + "_scale_inv")}),
    )
    place.fails(
        4,
        f"{shard}: scale 'x_scale_inv' has no weight 'x' in any shard; the checkpoint is not whole: download it again",
        v3,
    )


def test_a_hostile_header(place: Place, v3: Path) -> None:
    shard = shard_of(v3, EXPERT)
    shard.write_bytes(b"\xff" * 8 + bytes(100))
    place.fails(
        4,
        f"{shard}: claims a header of 18,446,744,073,709,551,615 bytes, but has 100 after the length (at most "
        "100,000,000); it is truncated or not a safetensors file: download it again",
        v3,
    )


def test_a_hostile_gguf(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "x.gguf"
    source.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16)
    place.fails(
        4,
        f"{source}: not a usable GGUF file: it claims 18,446,744,073,709,551,615 keys, more than its 24 bytes can hold",
        source,
    )


@pytest.mark.parametrize(
    ("code", "changes", "says"),
    [
        (
            4,
            {"vocab_size": 385},
            "'lm_head.weight' has the shape [384, 256], but config.json calls for [385, 256]",
        ),
        (5, {"architectures": ["GPT2LMHeadModel"]}, "config.json names the architecture 'GPT2LMHeadModel'"),
    ],
    ids=["of_another_model", "of_another_architecture"],
)
def test_a_config(place: Place, v3: Path, code: int, changes: dict[str, Any], says: str) -> None:
    edit_json(v3 / "config.json", lambda c: c.update(changes))
    if code == 4:
        says = f"{shard_of(v3, 'lm_head.weight')}: {says}; is this config.json the one of the checkpoint?"
    else:
        says = (
            f"Tiny-V3: {says}; quantkit knows DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, LlamaForCausalLM, "
            "Qwen2ForCausalLM"
        )
    place.fails(code, says, v3)


def test_a_config_alone(place: Place, v3: Path) -> None:
    place.fails(
        4,
        "Tiny-V3: only the config is known, there are no weights to build from; give a checkpoint directory or a GGUF",
        v3 / "config.json",
    )


def test_no_tokenizer(place: Place, v3: Path) -> None:
    (v3 / "tokenizer.json").unlink()
    place.fails(4, f"{v3}: tokenizer.json is missing; download it from the model's repository", v3)


def test_quantizing_what_is_quantized(place: Place, tmp_path: Path) -> None:
    blocks = bytes(2 * 8 * 34)
    source = gguf_file(tmp_path / "x.gguf", {"token_embd.weight": ((256, 2), "Q8_0", blocks)})
    place.fails(
        5,
        "x: 'token_embd.weight' is already Q8_0; quantizing it again to Q4_K loses quality: build from the original, "
        "or allow it with --allow-requantize",
        source,
    )
    assert place.build(source, "--allow-requantize").returncode == 0


def test_quantizing_integers(place: Place, tmp_path: Path) -> None:
    source = gguf_file(tmp_path / "x.gguf", {"token_embd.weight": ((256, 2), "I32", bytes(2048))})
    says = f"{source}: 'token_embd.weight' is I32; quantkit quantizes floats and ggml blocks"
    place.fails(5, says, source)


# ---------------------------------------------------------------- importance matrices


@pytest.fixture
def needy(place: Place) -> Place:
    """The recipe's type cannot do without an importance matrix."""
    place.recipe.write_text(NEEDY)
    return place


WHOSE = "; is it of this model and layout?"


def test_no_imatrix(needy: Place, tiny_v3: Path) -> None:
    # attention, dense ffn, experts; rows of attn_k_b and attn_output are too short for the type
    n = 3 * 4 + 3 + 2 * 6
    needy.fails(
        6,
        f"'blk.0.attn_kv_a_mqa.weight' as IQ2_S needs an importance matrix, as do {n - 1} more; give one with "
        "--imatrix FILE",
        tiny_v3,
    )


def test_no_imatrix_for_a_recipe_that_requires_one(place: Place, tiny_v3: Path) -> None:
    place.recipe.write_text(RECIPE.replace("rules:", "imatrix: required\nrules:"))
    place.fails(
        6,
        "the recipe Small requires an importance matrix; give one with --imatrix FILE (llama-imatrix makes them, and "
        "published quantizations often come with theirs)",
        tiny_v3,
    )


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to ne shape of what an imatrix of the checkpoint covers."""
    c = open_model(str(folder), Options(pre="deepseek-v3"))
    return {t.name: t.shape for t in c.tensors if t.quantizable and t.layer is not None}


def dat(path: Path, covered: dict[str, tuple[int, ...]]) -> Path:
    return legacy_imatrix(path, {n: (2, np.ones(s[0] * int(np.prod(s[2:])))) for n, s in covered.items()})


def test_an_imatrix_that_fits(place: Place, tiny_v3: Path, tiny_imatrix: Path) -> None:
    """Those below are damaged."""
    done = place.build(tiny_v3, "--imatrix", tiny_imatrix)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_imatrix_without_an_entry(needy: Place, tiny_v3: Path, tmp_path: Path) -> None:
    covered = shapes(tiny_v3)
    del covered["blk.1.ffn_up_exps.weight"]
    needy.fails(
        6,
        "the importance matrix has no entry for 1 tensor that must have one, the first 'blk.1.ffn_up_exps.weight' as "
        "IQ2_S (4 x 256 values)" + WHOSE,
        tiny_v3,
        "--imatrix",
        dat(tmp_path / "x.dat", covered),
    )


def test_an_imatrix_with_an_entry_of_the_wrong_size(place: Place, tiny_v3: Path, tmp_path: Path) -> None:
    covered = {**shapes(tiny_v3), "blk.1.ffn_up_exps.weight": (256, 256, 3)}
    place.fails(
        6,
        "the importance matrix has an entry of the wrong size for 1 tensor, the first "
        "'blk.1.ffn_up_exps.weight' as Q4_K (4 x 256 values)" + WHOSE,
        tiny_v3,
        "--imatrix",
        dat(tmp_path / "x.dat", covered),
    )


def test_an_imatrix_of_another_model(needy: Place, tiny_v3: Path, tmp_path: Path) -> None:
    im = legacy_imatrix(tmp_path / "x.dat", {"layers.0.attention.wq.weight": (2, np.ones(4096))})
    done = needy.build(tiny_v3, "--imatrix", im)
    assert done.returncode == 6
    assert re.fullmatch(
        r"error: the importance matrix has no entry for \d\d tensors that must have one, the first "
        r"'blk\.0\.attn_kv_a_mqa\.weight' as IQ2_S \(1 x 256 values\); is it of this model and layout\?\n",
        done.stderr,
    )
    assert snapshot(needy.folder) == {}


def test_nan_in_an_imatrix(place: Place, tiny_v3: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    im = tmp_path / "x.gguf"
    shutil.copyfile(tiny_imatrix, im)
    with im.open("r+b") as f:
        f.seek(-32, os.SEEK_END)  # the values before the last counts, which are padded to 32
        f.seek(-4, os.SEEK_CUR)
        f.write(NAN32)
    done = place.build(tiny_v3, "--imatrix", im)
    assert (done.returncode, snapshot(place.folder)) == (6, {})
    assert re.fullmatch(
        rf"error: {im}: entry 'blk\.2\.ffn_up_shexp\.weight' holds nan at \d+ of 256; all must be finite and not "
        r"negative: compute the imatrix again\n",
        done.stderr,
    )


def test_a_model_for_an_imatrix(place: Place, tiny_v3: Path, tmp_path: Path) -> None:
    im = gguf_file(tmp_path / "x.gguf", {"t": ((4,), "F32", bytes(16))})
    place.fails(
        6,
        f"{im}: not an importance matrix: the key imatrix.datasets is missing or mistyped (no general.type); give the "
        "file that llama-imatrix made",
        tiny_v3,
        "--imatrix",
        im,
    )


def test_no_such_imatrix(place: Place, tiny_v3: Path, tmp_path: Path) -> None:
    im = tmp_path / "x.gguf"
    place.fails(6, f"{im}: cannot be read: No such file or directory", tiny_v3, "--imatrix", im)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("was", "typed", "where"),
    [
        ("type: Q4_K,", "type: Q4KK,", "small.yaml:5 rules[0].type: "),
        ("rules:", "rulse:", "small.yaml:4 rulse: "),
        ("rules:", "rules", "small.yaml:"),
    ],
    ids=["type", "key", "yaml"],
)
def test_a_typo_in_a_recipe(place: Place, tiny_v3: Path, was: str, typed: str, where: str) -> None:
    """The sentences are asserted in the recipe's own tests; here, that they arrive as all errors do."""
    place.recipe.write_text(RECIPE.replace(was, typed))
    with pytest.raises(errors.RecipeError) as e:
        load(str(place.recipe))
    assert where in str(e.value)
    place.fails(3, str(e.value), tiny_v3)


# ---------------------------------------------------------------- the output


def source_gguf(path: Path) -> Path:
    weights = np.linspace(-1, 1, 512, dtype=np.float32)
    return gguf_file(path, {"token_embd.weight": ((256, 2), "F32", weights.tobytes())})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_gguf(tmp_path / "source.gguf")


def test_the_output_exists(place: Place, source: Path) -> None:
    place.out.write_bytes(b"precious")
    place.fails(7, f"{place.out}: exists; choose another name, or replace it with --force", source)


def test_a_shard_of_the_output_exists(place: Place, source: Path) -> None:
    shard = place.folder / "m-00001-of-00001.gguf"
    shard.write_bytes(b"precious")
    place.fails(
        7, f"{shard}: exists; choose another name, or replace it with --force", source, "--split-max-size", "1G"
    )


@pytest.mark.parametrize("how", ["itself", "symlink", "hard_link"])
def test_the_output_is_the_source(place: Place, tmp_path: Path, how: str) -> None:
    if how == "itself":
        source = source_gguf(place.out)
    else:
        source = source_gguf(tmp_path / "x.gguf")
        (place.out.symlink_to if how == "symlink" else place.out.hardlink_to)(source)
    place.fails(
        7,
        f"{place.out}: is one of the files read and would be overwritten; choose another name",
        source,
        "--force",
    )
    assert source.stat().st_size > 2048


def test_the_output_is_a_shard_of_the_checkpoint(place: Place, v3: Path) -> None:
    place.folder, place.out = v3, v3 / "model-00001-of-00002.safetensors"
    place.fails(
        7, f"{place.out}: is one of the files read and would be overwritten; choose another name", v3, "--force"
    )


def test_the_output_is_the_imatrix(place: Place, tiny_v3: Path, tiny_imatrix: Path) -> None:
    place.out.hardlink_to(tiny_imatrix)
    place.fails(
        7,
        f"{place.out}: is one of the files read and would be overwritten; choose another name",
        tiny_v3,
        "--force",
        "--imatrix",
        tiny_imatrix,
    )


def test_no_directory_for_the_output(place: Place, source: Path) -> None:
    place.out = place.folder / "no" / "m.gguf"
    place.fails(7, f"{place.out}: there is no directory {place.out.parent}; create it first", source)


def test_a_directory_for_the_output(place: Place, source: Path) -> None:
    place.out = place.folder
    place.fails(
        7,
        f"{place.out}: is a directory; give the name of the file to make, such as {place.out / 'model.gguf'}",
        source,
    )


def test_an_output_in_a_file(place: Place, source: Path) -> None:
    (place.folder / "file").write_bytes(b"precious")
    place.out = place.folder / "file" / "m.gguf"
    place.fails(7, f"{place.out}: there is no directory {place.out.parent}; create it first", source)


def test_an_output_with_a_name_too_long(place: Place, source: Path) -> None:
    place.out = place.folder / ("m" * 250)
    place.fails(
        7,
        f"{'m' * 250}: the name has 258 bytes with what is added while it is made, and 255 are the most; give a "
        "shorter one",
        source,
    )


# ---------------------------------------------------------------- disk and permissions, on the functions


@pytest.fixture
def small_plan(tmp_path: Path) -> Plan:
    """A plan that builds in no time."""
    return make_plan(open_model(str(source_gguf(tmp_path / "source.gguf"))), parse(RECIPE, "small.yaml"))


def output_error(call: Callable[[], object]) -> str:
    with pytest.raises(OutputError) as e:
        call()
    assert e.value.exit_code == 7
    return str(e.value)


@pytest.mark.parametrize(("missing", "ok"), [(1, False), (0, True)])
def test_a_disk_without_the_space(
    tmp_path: Path, small_plan: Plan, monkeypatch: pytest.MonkeyPatch, missing: int, ok: bool
) -> None:
    out = tmp_path / "out.gguf"
    need = builds.prepare(small_plan, out).file_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - missing))
    if ok:
        assert builds.prepare(small_plan, out).file_bytes == need
    else:
        assert output_error(lambda: builds.prepare(small_plan, out)) == (
            f"{tmp_path}: the output needs {need:,} bytes, but {need - 1:,} are free; free 1 more, or choose "
            "another place"
        )


def test_a_directory_without_permission(tmp_path: Path, small_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so what os.access says is set."""
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    assert output_error(lambda: builds.prepare(small_plan, tmp_path / "x.gguf")) == (
        f"{tmp_path}: no permission to write there"
    )
    assert asked == [(tmp_path, os.W_OK)]


def test_a_directory_that_goes_away(tmp_path: Path, small_plan: Plan) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    ready = builds.prepare(small_plan, folder / "x.gguf")
    folder.rmdir()
    assert output_error(lambda: builds.run(ready, NativeEngine(), 1, lambda name, done: None)) == (
        f"{folder / 'x.gguf.partial'}: cannot be made: No such file or directory; choose another place"
    )


def test_a_disk_that_fills_up_during_the_build(
    tmp_path: Path, small_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    ready = builds.prepare(small_plan, folder / "x.gguf")
    offset = ready.files[0][1].tensors[0].offset

    real = os.pwrite

    def pwrite(fd: int, data: bytes, at: int) -> int:
        if at < offset:
            return real(fd, data, at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    temporary = folder / "x.gguf.partial" / "x.gguf"
    assert output_error(lambda: builds.run(ready, NativeEngine(), 2, lambda name, done: None)) == (
        f"{temporary}: writing 'token_embd.weight' at {offset:,} failed: No space left on device; free some space and "
        "build again"
    )
    assert snapshot(folder) == {}


# ---------------------------------------------------------------- a process that is held short, or stopped


def spawn(place: Place, source: Path, *options: str | Path, **kwargs: Any) -> subprocess.Popen[str]:
    """A build in a process of its own, as the shell starts it."""
    command = [sys.executable, "-m", "quantkit", "build", source, "-o", place.out, "-r", place.recipe]
    return subprocess.Popen(
        [*map(str, command), "--pre", "deepseek-v3", "-q", *map(str, options)],
        cwd=tempfile.gettempdir(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.mark.parametrize("old", [None, b"precious"], ids=["nothing_there", "replacing"])
def test_a_file_size_limit(place: Place, tiny_v3: Path, old: bytes | None) -> None:
    """The system refuses the file's length: what a full disk does, and tried for real."""
    if old is not None:
        place.out.write_bytes(old)
    limit = 100_000
    process = spawn(
        place,
        tiny_v3,
        "--force",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (7, "")
    assert re.fullmatch(
        rf"error: {place.out}: File too large(: [\d,]+ bytes cannot be reserved)?; mend that and build again\n",
        stderr,
    )
    assert snapshot(place.folder) == ({} if old is None else {"m.gguf": old})


@pytest.fixture(scope="session")
def slow_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes some seconds to build, most of it for embedding and output."""
    return checkpoint(tmp_path_factory.mktemp("slow") / "Slow-V3", {**TINY_V3, "vocab_size": 16384})


@pytest.fixture
def slow(place: Place, slow_v3: Path) -> Iterator[subprocess.Popen[str]]:
    """A build that has begun to write, over a file that is there."""
    place.recipe.write_text(RECIPE.replace("Q4_K,", "IQ4_XS,"))
    place.out.write_bytes(b"precious")
    process = spawn(place, slow_v3, "--force", "-t", "1", env=os.environ | {"QUANTKIT_COMMIT_SECONDS": "0.02"})
    try:
        deadline = time.monotonic() + 60
        while not list(place.folder.glob("m.gguf.partial/scratch")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        place.begun = len(place.journal.read_bytes().partition(b"\n")[0]) + 1
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("signals", "code", "says"),
    [
        ([signal.SIGINT], 130, "interrupted"),
        ([signal.SIGTERM], 143, "terminated"),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted"),
        ([signal.SIGTERM, signal.SIGTERM], 143, "terminated"),
    ],
    ids=["SIGINT", "SIGTERM", "SIGINT_twice", "SIGTERM_twice"],
)
def test_a_build_that_is_stopped(
    place: Place, slow: subprocess.Popen[str], signals: list[signal.Signals], code: int, says: str
) -> None:
    while not place.journal.stat().st_size > place.begun:  # something is durable
        time.sleep(0.005)
    for number in signals:
        slow.send_signal(number)
        time.sleep(0.05)
    stdout, stderr = slow.communicate(timeout=60)
    # click ends the line that ^C stands on
    assert (slow.returncode, stdout) == (code, "")
    assert re.fullmatch(
        rf"\n?{says}; [\d,]+ of [\d,]+ bytes are kept in {place.out}\.partial: the same command goes on from there, "
        r"--restart starts again\n",
        stderr,
    )
    assert snapshot(place.folder) == {"m.gguf": b"precious", "m.gguf.partial": b""}


def test_a_shard_truncated_during_the_build(place: Place, slow_v3: Path, tmp_path: Path) -> None:
    """Cut off after the plan was made and before its end was read."""
    model = tmp_path / "Slow-V3"
    shutil.copytree(slow_v3, model)
    place.recipe.write_text(RECIPE.replace("Q4_K,", "IQ4_XS,"))
    process = spawn(place, model, "-t", "1", env=os.environ | {"QUANTKIT_COMMIT_SECONDS": "3600"})
    while not list(place.folder.glob("m.gguf.partial/scratch")):
        assert process.poll() is None
        time.sleep(0.005)
    shard = shard_of(model, "lm_head.weight")
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (4, "")
    assert re.fullmatch(
        rf"error: {shard}: '[a-z_.]+' should end at [\d,]+, but the file now ends at {size - 100:,}; it has changed "
        r"since it was opened\n",
        stderr,
    )
    assert snapshot(place.folder) == {}  # nothing that was made of it is kept
    # and it is refused as it is
    done = place.build(model, "-t", "1")
    assert done.returncode == 4
