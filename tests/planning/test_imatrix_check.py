"""`quantkit imatrix check`: what a matrix lacks for a recipe on a model, and which gaps matter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import numpy as np
import numpy.typing as npt
import pytest
from conftest import Run
from factory import gguf_imatrix
from small_builds import OPTIONS, rules

import quantkit as qk
from quantkit.imatrix.matrix import open_imatrix
from quantkit.imatrix.policies import parse_policy
from quantkit.model.open import open_model
from quantkit.planning.imatrix_check import Check, check

F32 = np.float32
Entries = dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
GATE, UP, DOWN = (f"blk.1.ffn_{x}_exps.weight" for x in ("gate", "up", "down"))
Q_A, KV_A, OUT = "blk.1.attn_q_a.weight", "blk.1.attn_kv_a_mqa.weight", "blk.1.attn_output.weight"
#: gate and up must have weights, down uses them, attention mostly has no use for them
RECIPE = rules(
    'match: "blk.*.ffn_{gate,up}_exps.weight", type: IQ1_S', 'match: "*_exps.weight", type: Q4_K',
    'match: "*.attn_q_a.weight", type: IQ2_S', 'match: "*.attn_kv_a_mqa.weight", type: Q5_1',
    'match: "*", type: Q8_0', optional=True,
)  # fmt: skip


def entries_of(model: Path) -> Entries:
    out: Entries = {}
    for t in open_model(str(model), OPTIONS).tensors:
        if t.quantizable and t.layer is not None:
            n_mats = t.shape[2] if len(t.shape) > 2 else 1
            n_counts = n_mats if "_exps" in t.name else 1
            values = np.ones((n_counts, t.shape[0] * n_mats // n_counts), F32)
            out[t.name] = (values * 300, np.full((n_counts, 1), 300, F32))
    return out


def checked(model: Path, path: Path, change: Callable[[Entries], Any], policy: str | None = None) -> Check:
    entries = entries_of(model)
    change(entries)
    found = open_imatrix(str(gguf_imatrix(path, entries)))
    return check(open_model(str(model), OPTIONS), RECIPE, found, None if policy is None else parse_policy(policy))


def told(c: Check) -> list[tuple[str, str, tuple[int, ...], bool, str]]:
    return [(x.tensor, str(x.fault), x.matrices, x.matters, x.why) for x in c.lacks]


def test_nothing_is_wrong(tiny_v3: Path, tmp_path: Path) -> None:
    found = checked(tiny_v3, tmp_path / "x", lambda _: None)
    assert (found.ok, found.lacks, found.notes) == (True, (), ())
    assert found.verdict() == "fine: nothing is wrong"


def spoil(e: Entries) -> None:
    e[UP][0][1] = e[UP][1][1] = 0  # never seen
    e[GATE][0][2] = 0  # zeros
    e[DOWN][1][3] = 99
    e[DOWN][1][0] = 1
    del e[Q_A]
    e[KV_A][0][:] = 0  # Q5_1 keeps its weights
    del e[OUT]  # Q8_0
    e["blk.9.gone.weight"] = e[DOWN]


def test_everything_in_order_of_bytes(tiny_v3: Path, tmp_path: Path) -> None:
    found = checked(tiny_v3, tmp_path / "x", spoil)
    assert told(found) == [
        (DOWN, "few tokens", (0, 3), True, "as few as 1 token; Q4_K uses weights"),
        (Q_A, "no entry", (), True, "IQ2_S must have weights"),
        (GATE, "all zeros", (2,), True, "IQ1_S loses these weights"),
        (UP, "never seen", (1,), True, "IQ1_S must have weights"),
        (KV_A, "all zeros", (), False, "Q5_1 keeps these weights all the same"),
        (OUT, "no entry", (), False, "Q8_0 has no use for weights"),
    ]
    plan = found.plan
    assert [x.nbytes for x in found.lacks] == [
        plan[DOWN].nbytes // 2, plan[Q_A].nbytes, plan[GATE].nbytes // 4, plan[UP].nbytes // 4, plan[KV_A].nbytes,
        plan[OUT].nbytes,
    ]  # fmt: skip
    assert not found.ok
    n = sum(x.nbytes for x in found.lacks[:4])
    assert found.verdict().startswith(f"not fine: what was found of 4 tensors matters, {n:,} bytes")
    assert found.notes == (f"1 entry is of no tensor of {plan.catalogue.model}: blk.9.gone.weight",)


def test_what_is_left_after_a_policy(tiny_v3: Path, tmp_path: Path) -> None:
    found = checked(tiny_v3, tmp_path / "x", spoil, "sibling,prior")
    by_tensor = {x.tensor: x for x in found.lacks}
    assert (by_tensor[UP].matters, by_tensor[UP].why) == (False, "sibling, by the policy")
    assert (by_tensor[GATE].matters, by_tensor[GATE].why) == (False, "sibling, by the policy")
    # its sibling, kv_a_mqa, has only zeros
    assert (by_tensor[Q_A].matters, by_tensor[Q_A].why) == (True, "IQ2_S must have weights")
    assert by_tensor[DOWN].matters
    drawn = {x.tensor: x for x in checked(tiny_v3, tmp_path / "y", spoil, "shrink:50").lacks}
    assert (drawn[DOWN].matters, drawn[DOWN].why) == (False, "as few as 1 token; drawn towards the mean, by the policy")


def test_values_that_are_no_weights_are_all_named(tiny_v3: Path, tmp_path: Path) -> None:
    def change(e: Entries) -> None:
        e[UP][0][2, 5] = np.nan
        e[DOWN][0][0, 1] = -300
        e["blk.1.attn_q_b.weight"][0][0, 3] = np.inf

    found = checked(tiny_v3, tmp_path / "x", change, "prior")
    assert [(x.tensor, str(x.fault), x.matters, x.why) for x in found.lacks] == [
        (DOWN, "no weights", True, "-1.0 at 1 of 1,024: a build refuses the file"),
        ("blk.1.attn_q_b.weight", "no weights", True, "inf at 3 of 256: a build refuses the file"),
        (UP, "no weights", True, f"nan at {2 * 256 + 5} of 1,024: a build refuses the file"),
    ]
    assert found.notes == ("the policy was left aside: mend the values that are no weights first",)


def test_an_entry_of_the_wrong_size(tiny_v3: Path, tmp_path: Path) -> None:
    def change(e: Entries) -> None:
        e[UP] = (np.ones((3, 256), F32), np.ones((3, 1), F32))

    assert told(checked(tiny_v3, tmp_path / "x", change)) == [
        (UP, "wrong size", (), True, "768 values, not 1,024; a build refuses it")
    ]


def test_the_older_format_has_no_tokens_of_experts(tiny_v3: Path, tmp_path: Path) -> None:
    path = factory.legacy_imatrix(
        tmp_path / "x.dat", {n: (2, v.ravel() * 2 + 1) for n, (v, _) in entries_of(tiny_v3).items()}
    )
    found = check(open_model(str(tiny_v3), OPTIONS), RECIPE, open_imatrix(str(path)))
    assert found.lacks == ()
    assert found.notes == (
        "the tokens of each expert are not known of 6 tensors, such as blk.1.ffn_down_exps.weight: one count stands "
        "for all, as in the older .dat format",
    )


def test_embedding_and_output_have_no_entries_by_custom(tiny_v3: Path, tmp_path: Path) -> None:
    found = check(
        open_model(str(tiny_v3), OPTIONS), qk.load_recipe("Q4_K_M"),
        open_imatrix(str(gguf_imatrix(tmp_path / "x", entries_of(tiny_v3)))),
    )  # fmt: skip
    why = "llama-imatrix has none without --process-output, and the type does without"
    assert sorted((x.tensor, x.matters, x.why) for x in found.lacks) == [
        ("output.weight", False, why), ("token_embd.weight", False, why)
    ]  # fmt: skip
    assert found.verdict() == "fine: of what was found (2) nothing matters here"


def test_from_python(tiny_v3: Path, tmp_path: Path) -> None:
    entries = entries_of(tiny_v3)
    spoil(entries)
    path = gguf_imatrix(tmp_path / "x", entries)
    model = qk.open_model(tiny_v3, pre="deepseek-v3")
    assert not qk.check_imatrix(path, RECIPE, model).ok
    assert qk.check_imatrix(path, "Q8_0", model, imatrix_policy="ones", min_tokens=5).ok


def test_from_the_command_line(quantkit: Run, tiny_v3: Path, tmp_path: Path) -> None:
    entries = entries_of(tiny_v3)
    spoil(entries)
    path = gguf_imatrix(tmp_path / "x.gguf", entries)
    args = ("imatrix", "check", path, "--recipe", "UD-IQ1_S", "--model", tiny_v3)
    said = quantkit(*args)
    assert (said.returncode, said.stderr) == (1, "")
    assert said.stdout.splitlines()[0] == f"{path} for Tiny-V3 as UD-IQ1_S, policy fail"
    assert said.stdout.splitlines()[-1].startswith("not fine: ")
    made = json.loads(quantkit(*args, "--json", "--imatrix-policy", "sibling,shrink:50").stdout)
    assert (made["quantkit_imatrix_check"], made["policy"], made["ok"]) == (1, "sibling,shrink:50", False)
    assert {x["tensor"]: x["matters"] for x in made["found"]}[UP] is False
    assert quantkit("imatrix", "check", path, "--recipe", "Q8_0", "--model", tiny_v3).returncode == 0


@pytest.mark.parametrize("n", [1, 0])
def test_a_file_that_is_no_matrix(quantkit: Run, tmp_path: Path, n: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" * n)
    said = quantkit("imatrix", "check", path, "--recipe", "UD-IQ1_S", "--model", "deepseek-r1")
    assert said.returncode == 6
    assert said.stderr.startswith("error: ")
    assert said.stderr.count("\n") == 1
