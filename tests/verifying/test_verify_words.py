"""The verdicts for a sound file that is not the one asked for: another recipe's, or no model at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checking import MIX, check, poke, rules
from conftest import Run
from factory import gguf_file
from small_builds import plan_of

from quantkit.gguf.header import F32, KV, STRING, U32, kv, kv_array
from quantkit.recipe.load import load

DATA = ((32, 4), "F32", np.ones(128, np.float32).tobytes())
ARCH = kv("general.architecture", STRING, "llama")


def kind(name: str) -> KV:
    return kv("general.type", STRING, name)


# ---------------------------------------------------------------- another recipe


def test_another_recipes_file(quantkit: Run, sound: Path, tiny_v3: Path, tiny_imatrix: Path) -> None:
    """Its rows are compared by the types that the file itself has."""
    args = ("verify", sound, "--source", tiny_v3, "--pre", "deepseek-v3", "--imatrix", tiny_imatrix, "-q")
    said = quantkit(*args, "--recipe", "Q8_0", "--findings", "1")
    assert said.returncode == 1, said.stderr
    last = said.stdout.splitlines()[-1]
    assert last.startswith(
        "ANOTHER RECIPE'S FILE: 32 of 52 tensors have other types than Q8_0 gives them; the file is sound in itself: 1 "
        "file, 52 tensors, "
    )
    assert "checked structure, plan, metadata, scales, " in last


def test_of_its_own_recipe_it_is_sound(sound: Path, sound_plan: object, tiny_v3: Path, tiny_imatrix: Path) -> None:
    verdict = check(sound, plan_of(tiny_v3, MIX, tiny_imatrix), tiny_imatrix, None)
    assert (verdict.exit_code, verdict.line()[:3]) == (0, "OK:")


def test_one_type_only(sound: Path, tiny_v3: Path, tiny_imatrix: Path) -> None:
    other = rules('match: "output.weight", type: Q5_K', 'match: "*", type: Q4_K')
    verdict = check(sound, plan_of(tiny_v3, other, tiny_imatrix), tiny_imatrix, "1%")
    assert verdict.exit_code == 1
    assert verdict.line().startswith("ANOTHER RECIPE'S FILE: ")
    assert verdict.findings.counts().keys() == {"plan"}


def test_another_recipes_file_that_is_damaged_is_damaged(copied: Path, tiny_v3: Path, tiny_imatrix: Path) -> None:
    """One byte of a row is changed, in a tensor of another type than asked for."""
    from quantkit.gguf.header import read_header

    output = next(t for t in read_header(copied).tensors if t.name == "output.weight")
    poke(copied, output.offset + 3, b"\x55")
    other = rules('match: "output.weight", type: Q5_K', 'match: "*", type: Q4_K')
    verdict = check(copied, plan_of(tiny_v3, other, tiny_imatrix), tiny_imatrix, "all")
    assert verdict.exit_code == 12
    assert verdict.line().startswith("DAMAGED: ")


def test_another_models_file_is_not_another_recipes(sound: Path, tiny_imatrix: Path) -> None:
    from quantkit.model.open import open_model
    from quantkit.planning.plan import make_plan

    verdict = check(sound, make_plan(open_model("deepseek-v2-lite"), load("Q8_0")), None, None)
    assert verdict.exit_code == 12


# ---------------------------------------------------------------- no model

KINDS = {
    "an importance matrix": (None, "OK: an importance matrix, not a model: 1 file, "),
    "a LoRA adapter": ([kind("adapter"), ARCH], "OK: a LoRA adapter, not a model: "),
    "an old LoRA adapter": ([ARCH, kv("adapter.type", STRING, "lora")], "OK: a LoRA adapter, not a model: "),
    "a control vector": ([kv("general.architecture", STRING, "controlvector")], "OK: a control vector, not a model: "),
    "a projector": ([kind("mmproj"), kv("general.architecture", STRING, "clip")],
                    "OK: a multimodal projector (mmproj), not a model: "),
    "a model": ([kind("model"), ARCH], "OK: 1 file, 1 tensors, "),
}  # fmt: skip


def of_kind(what: str, imatrix: Path, folder: Path) -> Path:
    kvs = KINDS[what][0]
    return imatrix if kvs is None else gguf_file(folder / "x.gguf", {"blk.0.attn_q.weight": DATA}, kvs)


@pytest.mark.parametrize("what", KINDS)
def test_what_a_sound_file_is(what: str, tiny_imatrix: Path, tmp_path: Path) -> None:
    verdict = check(of_kind(what, tiny_imatrix, tmp_path), sample=None)
    assert verdict.exit_code == 0, verdict.text(9)
    assert verdict.line().startswith(KINDS[what][1])


def test_a_vocabulary(tmp_path: Path) -> None:
    kvs = [ARCH, kv_array("tokenizer.ggml.tokens", STRING, ["a", "b"]), kv_array("tokenizer.ggml.scores", F32, [0, 0])]
    verdict = check(gguf_file(tmp_path / "x.gguf", {}, kvs), sample=None)
    assert (verdict.exit_code, verdict.line()[:40]) == (0, "OK: a vocabulary without weights, not a ")


def test_an_imatrix_in_place_of_the_model(quantkit: Run, tiny_v3: Path, tiny_imatrix: Path) -> None:
    args = ("verify", tiny_imatrix, "--recipe", "Q8_0", "--source", tiny_v3, "--pre", "deepseek-v3", "-q")
    said = quantkit(*args)
    assert said.returncode == 1
    assert said.stdout.startswith("NOT A MODEL: this is an importance matrix, sound in itself: 1 file, ")
    assert len(said.stdout.splitlines()) == 1


def test_a_damaged_imatrix_is_damaged(tiny_imatrix: Path, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(tiny_imatrix.read_bytes()[:-40])
    verdict = check(path, sample=None)
    assert (verdict.exit_code, verdict.line()[:8]) == (12, "DAMAGED:")


def test_a_file_without_architecture_is_damaged_unless_it_says_what_it_is(tmp_path: Path) -> None:
    verdict = check(gguf_file(tmp_path / "x.gguf", {"w": DATA}, [kv("a.b", U32, 1)]), sample=None)
    assert verdict.exit_code == 12
    assert "general.architecture: expected a string, found nothing" in verdict.text(9)


def test_an_imatrix_is_not_built_from(quantkit: Run, tiny_imatrix: Path, tmp_path: Path) -> None:
    said = quantkit("build", tiny_imatrix, "-o", tmp_path / "o.gguf", "--recipe", "Q8_0")
    sentence = f"error: {tiny_imatrix}: is an importance matrix, not a model; give it with --imatrix\n"
    assert (said.returncode, said.stdout, said.stderr) == (5, "", sentence)
