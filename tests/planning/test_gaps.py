"""Gaps in an importance matrix: experts never seen, or only zeros. With the policy `ones` the bytes stay
llama-quantize's. Plan, build and verify report gaps, and refuse what a build would refuse with the same words."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import factory
import gguf
import numpy as np
import pytest
from checking import UP, check
from conftest import Run, Tools
from factory import gguf_imatrix
from small_builds import OPTIONS, build, plan_of

from quantkit import kernels
from quantkit.building.engines.llama_quantize import LlamaQuantizeEngine
from quantkit.gguf.types import LOST_BY_32, LOST_WITHOUT_WEIGHTS, QTYPES, SPOILED_WITHOUT_WEIGHTS
from quantkit.imatrix.entries import Missing
from quantkit.imatrix.matrix import open_imatrix
from quantkit.imatrix.policies import AS_LLAMA_QUANTIZE
from quantkit.model.open import open_model
from quantkit.planning.gaps import gap_notes, gap_warnings
from quantkit.planning.plan import make_plan, with_values
from quantkit.recipe.load import load
from quantkit.verifying.scan import zero_blocks

F32 = np.float32
Entries = dict[str, tuple[np.ndarray, np.ndarray]]


def entries_of(model: Path) -> Entries:
    """Sums [matrices, columns] and counts [matrices, 1] for each tensor of the layers."""
    rng = np.random.default_rng(3)
    out: Entries = {}
    for t in open_model(str(model), OPTIONS).tensors:
        if t.quantizable and t.layer is not None:
            n_mats = t.shape[2] if len(t.shape) > 2 else 1
            out[t.name] = (rng.lognormal(0, 1, (n_mats, t.shape[0])).astype(F32), np.full((n_mats, 1), 7, F32))
    return out


@pytest.fixture(scope="module")
def gappy(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Expert 1 of UP has only zeros, expert 3 was never seen."""
    entries = entries_of(tiny_v3)
    entries[UP][0][1] = 0
    entries[UP][0][3] = 0
    entries[UP][1][3] = 0
    return gguf_imatrix(tmp_path_factory.mktemp("gappy") / "imatrix.gguf", entries)


# ---------------------------------------------------------------- reading


def missing(path: Path, name: str, n_cols: int, n_mats: int, block: int) -> Missing:
    return open_imatrix(str(path)).check()[name].of(n_cols, n_mats, block)


def test_experts_by_their_counts(tmp_path: Path) -> None:
    sums, counts = np.ones((4, 64), F32), np.array([[5], [0], [5], [5]], F32)
    sums[2] = 0
    path = gguf_imatrix(tmp_path / "x", {"w": (sums, counts)})
    assert missing(path, "w", 64, 4, 32) == Missing(unseen=(1,), zeros=(2,), n_zero_blocks=0)


def test_one_count_for_all_matrices(tmp_path: Path) -> None:
    """As in the older format, and for the stacked matrices of dense tensors."""
    values = np.ones((4, 64), F32)
    values[1] = 0
    path = factory.legacy_imatrix(tmp_path / "x.dat", {"w": (7, values.ravel())})
    assert missing(path, "w", 64, 4, 32) == Missing((), (1,), 0)
    path = gguf_imatrix(tmp_path / "x", {"w": (values, np.zeros(1, F32))})
    assert missing(path, "w", 64, 4, 32) == Missing((0, 1, 2, 3), (), 0)


def test_blocks_of_columns(tmp_path: Path) -> None:
    """Only blocks that are entirely zero, and not those of a matrix that is zero as a whole."""
    values = np.ones((3, 256), F32)
    values[0, 30:130] = 0  # 32-127: three blocks of 32, none of 128
    values[1] = 0
    values[2, :128] = 0
    path = gguf_imatrix(tmp_path / "x", {"w": (values, np.full((3, 1), 2, F32))})
    assert missing(path, "w", 256, 3, 32) == Missing((), (1,), 3 + 4)
    assert missing(path, "w", 256, 3, 128) == Missing((), (1,), 1)


def test_a_matrix_of_zeros_across_the_pieces_that_are_read(tmp_path: Path) -> None:
    values = np.ones((3, 800_000), F32)
    values[1] = 0
    path = gguf_imatrix(tmp_path / "x", {"w": (values, np.full((3, 1), 2, F32))})
    assert missing(path, "w", 800_000, 3, 256) == Missing((), (1,), 0)


def test_sums_that_are_zero_once_divided(tmp_path: Path) -> None:
    values = np.ones((2, 64), F32)
    values[1] = 1e-45
    path = gguf_imatrix(tmp_path / "x", {"w": (values, np.full((2, 1), 1000, F32))})
    assert missing(path, "w", 64, 2, 32) == Missing((), (1,), 0)


def test_a_full_matrix_has_no_gaps(tiny_imatrix: Path) -> None:
    assert open_imatrix(str(tiny_imatrix)).check() == {}


# ---------------------------------------------------------------- what ggml makes of zeros

WEIGHTED = [name for name, t in QTYPES.items() if t.uses_imatrix]


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("n_zeros", [256, 32])
def test_what_zeros_make_of_weights(tools: Tools, name: str, n_zeros: int) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 512)).astype(F32)
    weights = np.ones(512, F32)
    weights[:n_zeros] = 0
    raw = np.asarray(kernels.quantize(rows, name, weights)).reshape(8, -1)
    got = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])[:, :n_zeros]
    error = float(np.sqrt(((got - rows[:, :n_zeros]) ** 2).mean()))
    if name in (LOST_BY_32 if n_zeros == 32 else LOST_WITHOUT_WEIGHTS):
        assert not got.any()
    elif name in SPOILED_WITHOUT_WEIGHTS:
        assert error > 0.6
    elif n_zeros == 256:
        assert error < 0.2
    else:
        assert got.any()
    qt = QTYPES[name]
    zero = zero_blocks(raw.reshape(-1), qt)
    assert zero is not None
    per_row, n_lost = 512 // qt.block, n_zeros // qt.block
    expected = np.zeros((8, per_row), bool)
    expected[:, :n_lost] = name in LOST_WITHOUT_WEIGHTS
    assert (zero.reshape(8, per_row) == expected).all()


# ---------------------------------------------------------------- plan and build

AS_THEIRS = ("--imatrix-policy", "ones")
NEVER_SAW = (
    f"the importance matrix never saw 1 expert in 1 tensor: {UP} expert 3; as in llama-quantize all their weights then "
    "count alike; for better ones make the matrix from more text, or from text of more kinds"
)
ZEROS = (
    f"the importance matrix has nothing but zeros for 1 expert in 1 tensor: {UP} expert 1; as in llama-quantize their "
    "weights become zeros (IQ1_S); make the matrix again, give these tensors a type that does without, such as Q8_0, "
    "or take other values with --imatrix-policy"
)


def test_plan_tells_of_both_kinds(quantkit: Run, tiny_v3: Path, gappy: Path) -> None:
    args = ("plan", tiny_v3, "--recipe", "UD-IQ1_S", "--pre", "deepseek-v3", "--imatrix", gappy, *AS_THEIRS)
    said = quantkit(*args)
    assert said.returncode == 0, said.stderr
    assert said.stdout.rstrip().endswith(f"warning: {NEVER_SAW}\nwarning: {ZEROS}")
    made = json.loads(quantkit(*args, "--json").stdout)
    assert made["warnings"][-2:] == [NEVER_SAW, ZEROS]
    assert made["imatrix_gaps"] == [
        {"tensor": UP, "type": "IQ1_S", "matrices": 4, "never_seen": [3], "all_zeros": [1], "zero_blocks": 0}
    ]


def test_build_tells_of_both_kinds_even_when_quiet(quantkit: Run, tiny_v3: Path, gappy: Path, tmp_path: Path) -> None:
    args = ("build", tiny_v3, "-o", tmp_path / "o.gguf", "--recipe", "UD-IQ1_S", "--pre", "deepseek-v3", *AS_THEIRS)
    quiet = quantkit(*args, "--imatrix", gappy, "-q")
    assert (quiet.returncode, quiet.stdout) == (0, "")
    assert quiet.stderr == f"warning: {NEVER_SAW}\nwarning: {ZEROS}\n"
    loud = quantkit(*args, "--imatrix", gappy, "--force", "--dry-run")
    assert f"\nwarning: {NEVER_SAW}\nwarning: {ZEROS}\n" in loud.stdout


def gaps_of(model: Path, entries: Entries, recipe: str, path: Path) -> Any:
    weights = open_imatrix(str(gguf_imatrix(path, entries)))
    made = make_plan(open_model(str(model), OPTIONS), load(recipe), weights, policy=AS_LLAMA_QUANTIZE)
    return with_values(made, weights).gaps


def test_types_that_lose_nothing_are_not_warned_of(tiny_v3: Path, tmp_path: Path) -> None:
    entries = entries_of(tiny_v3)
    for sums, _ in entries.values():
        sums[:] = 0
    assert gaps_of(tiny_v3, entries, "Q8_0", tmp_path / "a") == ()
    assert gaps_of(tiny_v3, entries, "Q5_1", tmp_path / "b") == ()
    spoiled = gap_warnings(gaps_of(tiny_v3, entries, "IQ2_XS", tmp_path / "c"))
    assert ["weights are mostly lost (IQ2_XS);" in w for w in spoiled] == [False, True]


def test_many_are_counted_and_few_named(tiny_v3: Path, tmp_path: Path) -> None:
    entries = entries_of(tiny_v3)
    for name, (_, counts) in entries.items():
        counts[:] = 0 if "_exps" in name else 7
    (said,) = gap_warnings(gaps_of(tiny_v3, entries, "Q4_K_M", tmp_path / "x"))
    assert said.startswith(
        "the importance matrix never saw 24 experts in 6 tensors: blk.1.ffn_down_exps.weight experts 0, 1, 2, 3; "
        "blk.1.ffn_gate_exps.weight experts 0, 1, 2, 3; blk.1.ffn_up_exps.weight experts 0, 1, 2, 3; …; as in"
    )


def test_blocks_of_columns_are_a_note(tiny_v3: Path, tmp_path: Path) -> None:
    entries = entries_of(tiny_v3)
    name = "blk.0.ffn_down.weight"
    entries[name][0][0, :256] = 0
    gaps = gaps_of(tiny_v3, entries, "Q4_K_M", tmp_path / "x")
    assert gap_warnings(gaps) == []
    assert gap_notes(gaps) == [
        "the importance matrix has nothing but zeros for 1 block of columns in 1 tensor: blk.0.ffn_down.weight (1); "
        "their weights become zeros or are mostly lost, which is right only if the model never uses these columns"
    ]


@pytest.mark.tools
def test_the_bytes_stay_llama_quantizes(tools: Tools, tiny_v3: Path, gappy: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_v3, load("UD-IQ1_S"), gappy, policy="ones")
    ours = build(plan, tmp_path / "ours.gguf", gappy)
    theirs = build(plan, tmp_path / "theirs.gguf", gappy, engine=LlamaQuantizeEngine(tools.quantize))
    assert ours.read_bytes() == theirs.read_bytes()


# ---------------------------------------------------------------- the same verdict everywhere


def test_another_models_matrix_is_refused_alike(quantkit: Run, tiny_v3: Path, gappy: Path, tmp_path: Path) -> None:
    entries = {name: value for name, value in entries_of(tiny_v3).items() if ".ffn_" in name}
    other = gguf_imatrix(tmp_path / "other.gguf", entries)
    common = ("--recipe", "NAIVE-IQ1_S", "--imatrix", other)
    sentence = (
        "error: the importance matrix has no entry for 12 tensors that must have one, the first "
        "'blk.0.attn_kv_a_mqa.weight' as IQ1_S (1 x 256 values); is it of this model and layout?\n"
    )
    pre = ("--pre", "deepseek-v3")
    commands = {
        "plan": ("plan", tiny_v3, *common, *pre),
        "plan --json": ("plan", tiny_v3, *common, *pre, "--json"),
        "dry run": ("build", tiny_v3, "-o", tmp_path / "o.gguf", *common, *pre, "--dry-run"),
        "build": ("build", tiny_v3, "-o", tmp_path / "o.gguf", *common, *pre),
        "explain": ("recipe", "explain", "NAIVE-IQ1_S", UP, "-m", tiny_v3, "--imatrix", other),
        "verify": ("verify", gappy, "--source", tiny_v3, *common, *pre),
    }
    said = {name: quantkit(*args) for name, args in commands.items()}
    assert {name: (done.returncode, done.stderr) for name, done in said.items()} == dict.fromkeys(
        commands, (6, sentence)
    )
    # the question is answered nevertheless
    assert "the importance matrix has an entry for it" in said["explain"].stdout
    assert said["plan"].stdout == said["plan --json"].stdout == ""


@pytest.mark.tools
def test_an_entry_of_another_size_is_refused_for_every_type(
    quantkit: Run, tools: Tools, tiny_v3: Path, tiny_bf16: Path, tmp_path: Path
) -> None:
    """Even if the type does not use importance, as in llama-quantize: the file would name the matrix anyway."""
    entries = entries_of(tiny_v3)
    name = "blk.0.attn_output.weight"
    values, counts = entries[name]
    entries[name] = (np.ones((1, 2 * values.shape[-1]), np.float32), counts)
    other = gguf_imatrix(tmp_path / "other.gguf", entries)
    for recipe in ("Q8_0", "F16", "Q4_K_M"):
        type_ = {"Q4_K_M": "Q5_0"}.get(recipe, recipe)
        sentence = (
            "error: the importance matrix has an entry of the wrong size for 1 tensor, the first "
            f"'{name}' as {type_} (1 x {values.shape[-1]} values); is it of this model and layout?\n"
        )
        common = ("--recipe", recipe, "--imatrix", other, "--pre", "deepseek-v3")
        for args in (("plan", tiny_v3, *common), ("build", tiny_v3, "-o", tmp_path / "o.gguf", *common)):
            said = quantkit(*args)
            assert (said.returncode, said.stdout, said.stderr) == (6, "", sentence)
        command: list[str | Path] = [tools.quantize, "--imatrix", other, tiny_bf16, tmp_path / "theirs.gguf", recipe]
        theirs = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        assert theirs.returncode != 0
        assert f"is different from tensor size {values.shape[-1]} for {name}" in theirs.stdout + theirs.stderr
    # BF16 quantizes nothing, so the entry is not needed
    assert quantkit("plan", tiny_v3, "--recipe", "BF16", "--imatrix", other, "--pre", "deepseek-v3").returncode == 0


def test_values_that_are_no_weights_are_refused_alike(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    entries = entries_of(tiny_v3)
    entries[UP][0][2, 5] = np.nan
    bad = gguf_imatrix(tmp_path / "bad.gguf", entries)
    sentence = (
        f"error: {bad}: entry '{UP}' holds nan at {2 * 256 + 5} of 1024; all must be finite and not negative: compute "
        "the imatrix again\n"
    )
    common = ("--recipe", "UD-IQ1_S", "--imatrix", bad, "--pre", "deepseek-v3")
    for args in (("plan", tiny_v3, *common), ("build", tiny_v3, "-o", tmp_path / "o.gguf", *common)):
        said = quantkit(*args)
        assert (said.returncode, said.stdout, said.stderr) == (6, "", sentence)


def test_without_a_matrix_a_plan_is_made_and_a_build_is_not(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    assert quantkit("plan", "deepseek-r1", "--recipe", "UD-IQ1_S").returncode == 0
    refused = quantkit("build", tiny_v3, "-o", tmp_path / "o.gguf", "--recipe", "UD-IQ1_S", "--pre", "deepseek-v3")
    assert refused.returncode == 6


# ---------------------------------------------------------------- verify


def test_verify_tells_of_an_expert_of_zeros(tiny_v3: Path, gappy: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_v3, load("UD-IQ1_S"), gappy, policy="ones")
    out = build(plan, tmp_path / "o.gguf", gappy)
    note = "all weights are 0 in 1 expert of 1 tensor, {}: " + UP + " 1; an importance matrix with nothing "
    note += "but zeros for them does that: `quantkit plan --imatrix FILE` names them"
    alone = check(out, sample=None)
    assert alone.ok
    assert alone.notes == [note.format("which is right only if the source has zeros there")]
    hashed = check(out, sample=None, hashing=True)
    assert hashed.notes == alone.notes
    weights = open_imatrix(str(gappy))
    full = check(out, with_values(plan, weights), gappy, "1%")
    assert full.ok
    assert full.notes == [NEVER_SAW, ZEROS, note.format("though not in the source")]


def test_an_expert_that_is_zero_in_the_source_is_no_news(tiny_v3: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_v3, load("BF16"), None)
    bf16 = build(plan, tmp_path / "bf16.gguf")
    from quantkit.gguf.header import read_header

    info = next(t for t in read_header(bf16).tensors if t.name == UP)
    blob = bytearray(bf16.read_bytes())
    n = info.nbytes // 4
    blob[info.offset + n : info.offset + 2 * n] = bytes(n)
    bf16.write_bytes(blob)
    plan = plan_of(bf16, load("Q4_K_M"), None)
    out = build(plan, tmp_path / "o.gguf")
    assert check(out, plan).notes == []
    assert [n.startswith("all weights are 0 in 1 expert of 1 tensor") for n in check(out, sample=None).notes] == [True]
