"""What the tests of `quantkit verify` share: builds to check, and how files are damaged."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import small_builds

from quantkit.gguf.header import KV, TensorInfo, header_bytes, read_header
from quantkit.imatrix.matrix import open_imatrix
from quantkit.planning.gaps import completed
from quantkit.planning.plan import Plan
from quantkit.verifying.against_plan import expected_of
from quantkit.verifying.ggml import Ggml
from quantkit.verifying.rederive import RowCheck, parse_sample
from quantkit.verifying.run import Outcome, Request, verify
from quantkit.verifying.verdict import Verdict

rules = partial(small_builds.rules, optional=True)

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

GATE, UP, DOWN = (f"blk.1.ffn_{x}_exps.weight" for x in ("gate", "up", "down"))


class Silent:
    """Progress that nobody sees."""

    def start(self, stage: str, total: int, unit: str) -> None:
        pass

    def advance(self, n: int) -> None:
        pass


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
        values = None if weights is None else completed(plan.catalogue, weights, plan.policy)
        rows = RowCheck(plan.catalogue, plan.catalogue.source, values, Ggml(pinned), parse_sample(sample), 0)
    expected = None if plan is None else expected_of(plan)
    return verify(Request(out, expected, plan, weights, rows=rows, n_threads=2, **more), Silent())


def poke(path: Path, at: int, raw: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(raw)


def info_of(path: Path, name: str) -> TensorInfo:
    return next(t for t in read_header(path).tensors if t.name == name)


Infos = list[tuple[str, tuple[int, ...], str, int]]


def rewrite(path: Path, change: Callable[[list[KV], Infos], Any]) -> None:
    """Write a header again after `change` of its keys and tensors (name, shape, type, offset); the data stay."""
    h = read_header(path)
    kvs = list(h.kvs)
    infos: Infos = [(t.name, t.shape, t.type, t.offset - h.data_offset) for t in h.tensors]
    change(kvs, infos)
    path.write_bytes(header_bytes(kvs, infos) + path.read_bytes()[h.data_offset :])


def set_key(kvs: list[KV], item: KV) -> None:
    i = next(i for i, have in enumerate(kvs) if have.key == item.key)
    kvs[i] = item


def reshape(name: str, shape: tuple[int, ...]) -> Callable[[list[KV], Infos], None]:
    def change(_kvs: list[KV], infos: Infos) -> None:
        i = next(k for k, t in enumerate(infos) if t[0] == name)
        infos[i] = (name, shape, *infos[i][2:])

    return change


def expert(path: Path, name: str, i: int) -> tuple[int, int]:
    t = info_of(path, name)
    n = t.nbytes // t.shape[2]
    return t.offset + i * n, n


def assert_found(verdict: Verdict, kind: str, says: str) -> None:
    """Not OK, and a finding of that kind says what the pattern does."""
    assert not verdict.ok
    assert verdict.line().startswith("BUILT FROM OTHER FILES: " if kind == "source" else "DAMAGED: ")
    assert any(f.kind == kind and re.search(says, str(f)) for f in verdict.findings.kept()), verdict.text(50)
