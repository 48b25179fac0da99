"""What a file says of its tensors that ggml did not round: keys of quantkit.rounding.*, read back.

Rows of them are made again by quantkit's own rounding, handed in from outside: it has no second implementation, so that
their bytes are right is checked, and that the method is, is not.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..base.errors import SourceError
from ..planning.plan import Plan
from ..planning.rounding import Rounding
from ..recipe.schema import ROUNDINGS
from ..rounding.covariance import CovarianceSource, Standing
from ..rounding.options import VERSION as ROUNDING_VERSION
from ..rounding.policy import Choice
from .gguf import Gguf, Info, read
from .structure import paths_of
from .verdict import Findings

PREFIX = "quantkit.rounding."
_ARR, _STR = 9, 8
_MAX_NUMBER = 1 << 20
_LINE = re.compile(r"(\S{1,40}) (\S{1,300})(?: but ([0-9,-]{1,100000}))?")
_LAYERS = re.compile(r"blk\.\{([0-9,-]{1,10000})\}\.(.+)")
_OPTIONS = re.compile(r"damp ([0-9.e+-]{1,30})(, search)?")


class Rounder(Protocol):
    """Makes rows again as a build does (quantkit.rounding.rounder)."""

    def improve(
        self, rows: npt.NDArray[np.float32], blocks: npt.NDArray[np.uint8], type_: str, matrix: tuple[str, int],
        choice: Choice,
    ) -> int: ...  # fmt: skip


class Recorded(NamedTuple):
    """What a file says of its rounding."""

    rounding: Rounding
    covariance: str
    """its digest, or that of the pass that computed it while the file was built"""
    held_out: str
    """'' where there was none"""


def headers(out: Path) -> Iterator[Gguf]:
    """The headers of a file, or of a set of shards, that can be read."""
    return (g for path in paths_of(out, Findings()) if (g := read(path, Findings())) is not None)


def recorded(files: Iterable[Gguf]) -> Recorded | None:
    """What the first file that says something says; None where none does. Raises SourceError for what no build
    writes."""
    for g in files:
        if any(name.startswith(PREFIX) for name in g.keys):
            try:
                return _read(g)
            except (ValueError, KeyError, struct.error) as e:
                raise SourceError(
                    f"{g.name}: its keys {PREFIX}* say nothing that a build writes ({str(e)[:100]}); it is damaged or "
                    "of another version: verify it with --sample none"
                ) from None
    return None


def _read(g: Gguf) -> Recorded:
    version = g.keys[PREFIX + "version"].number()
    if version != ROUNDING_VERSION:
        raise ValueError(f"version {version}, known is {ROUNDING_VERSION}")
    options = _OPTIONS.fullmatch(g.keys[PREFIX + "options"].text())
    if options is None:
        raise ValueError("options")
    infos = {t.name: t for t in g.tensors}
    choices, standings = {}, {}
    for line in _texts(g.keys[PREFIX + "tensors"].raw):
        m = _LINE.fullmatch(line)
        if m is None or m[1] not in ROUNDINGS:
            raise ValueError(f"tensors {line!r:.60}")
        thin = frozenset(_numbers(m[3])) if m[3] else frozenset()
        for name in _names(m[2]):
            choices[name] = Choice(m[1], "the file says so", float(options[1]), options[2] is not None)
            standings[name] = Standing(_n_mats(infos.get(name)), thin, "")
    if not choices:
        raise ValueError("no tensors")
    held_out, policy = (g.keys[key].text() if key in g.keys else "" for key in (PREFIX + "held_out", PREFIX + "policy"))
    in_pass = PREFIX + "pass" in g.keys
    rounding = Rounding(choices, standings=standings, recorded_policy=policy, in_pass=in_pass)
    return Recorded(rounding, g.keys[PREFIX + ("pass" if in_pass else "covariance")].text(), held_out)


def _n_mats(info: Info | None) -> int:
    return 1 if info is None or len(info.shape) < 3 else info.shape[2]


def _texts(raw: bytes) -> list[str]:
    """The strings of an array."""
    element, n = struct.unpack_from("<IQ", raw)
    if element != _STR:
        raise ValueError("tensors are no text")
    out, at = [], 12
    for _ in range(n):
        (size,) = struct.unpack_from("<Q", raw, at)
        out.append(raw[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return out


def first_difference(expected: bytes, found: bytes) -> tuple[str, str]:
    """Of two arrays of strings the first that differ; 'nothing' where one has no more."""
    try:
        a, b = _texts(expected), _texts(found)
    except (ValueError, struct.error):
        return "text", "something else"
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return repr(a[n]) if n < len(a) else "nothing", repr(b[n]) if n < len(b) else "nothing"


def _names(pattern: str) -> list[str]:
    m = _LAYERS.fullmatch(pattern)
    return [pattern] if m is None else [f"blk.{i}.{m[2]}" for i in _numbers(m[1])]


def _numbers(text: str) -> list[int]:
    """'3-5,8' as 3, 4, 5, 8."""
    out: list[int] = []
    for some in text.split(","):
        first, _, last = some.partition("-")
        a, b = int(first), int(last or first)
        if not 0 <= a <= b or len(out) + b - a > _MAX_NUMBER:
            raise ValueError(f"numbers {text!r:.60}")
        out += range(a, b + 1)
    return out


def require_covariance(said: Recorded | None, covariance: CovarianceSource | None) -> None:
    """Raise SourceError for another covariance than the file was rounded by."""
    if said is None or covariance is None:
        return
    held_out = "" if covariance.held_out is None else covariance.held_out.digest
    digest = covariance.pass_digest if said.rounding.in_pass else covariance.digest
    for what, was, there in (("", said.covariance, digest), ("held-out ", said.held_out, held_out)):
        if was != there:
            raise SourceError(
                f"{covariance.name}: is not the {what}covariance that the file was rounded by, but another: the file "
                f"says {was[:12] or 'none'}, its digest is {there[:12] or 'none'}; give that one, or leave out "
                "--covariance and compare the other tensors"
            )


def _standings(rounding: Rounding, covariance: CovarianceSource) -> dict[str, Standing]:
    """Which matrices are too thin, which the file of a pass does not say."""
    out = dict(rounding.standings)
    for name in rounding.standings.keys() & {n for n in rounding.choices if n in covariance}:
        n_mats, n_cols = out[name].n_mats, covariance.n_cols(name)
        counts = covariance.counts(name)
        counts = counts if len(counts) > 1 else counts * n_mats
        thin = frozenset(i for i, n in enumerate(counts) if n < n_cols)
        out[name] = Standing(n_mats, thin, "they saw fewer tokens than columns" if len(thin) == n_mats else "")
    return out


def settled(
    plan: Plan | None, said: Recorded | None, covariance: CovarianceSource | None
) -> tuple[Plan | None, Rounding | None, list[str]]:
    """A plan as rows are to be compared by, what rounds its tensors, and notes: where it says nothing of rounding, the
    file's own words count. Raises SourceError for another covariance than the file's."""
    require_covariance(said, covariance)
    if plan is not None and _says(plan):
        if plan.rounding is not None and said is not None:
            plan = replace(plan, rounding=replace(plan.rounding, in_pass=said.rounding.in_pass))
        return plan, plan.rounding, []
    if said is None:
        return plan, None, []
    rounding = replace(said.rounding, covariance=covariance)
    if rounding.in_pass and covariance is not None:
        rounding = replace(rounding, standings=_standings(rounding, covariance))
    if plan is None:
        return None, rounding, []
    note = "what rounds which tensors was taken from the file itself: give --rounding or --rounding-policy to check it"
    return replace(plan, rounding=rounding), rounding, [note]


def _says(plan: Plan) -> bool:
    """Whether its recipe, or who gave it, says how to round; ggml's rounding, too."""
    recipe = plan.recipe
    return plan.rounding is not None or recipe.rounding is not None or any(rule.rounding for rule in recipe.rules)


def remark(said: Recorded | None) -> list[str]:
    """What is to be said of a file with tensors that ggml did not round."""
    if said is None:
        return []
    by: dict[str, int] = {}
    for choice in said.rounding.choices.values():
        by[choice.rounding] = by.get(choice.rounding, 0) + 1
    counts = ", ".join(f"{n} by {name}" for name, n in sorted(by.items()))
    n = len(said.rounding.choices)
    return [
        f"{n} tensor{'s are' if n != 1 else ' is'} not ggml's bytes, made by quantkit's feedback rounding ({counts}; "
        f"{'second moments of a pass in the build' if said.rounding.in_pass else 'covariance'} {said.covariance[:12]})"
    ]


def not_compared(skipped: Mapping[str, int]) -> str:
    """A note on rows that could not be made again. `skipped`: tensor -> rows."""
    n, names = len(skipped), list(skipped)
    more = ", …" if n > 1 else ""
    return (
        f"{sum(skipped.values()):,} rows of {n} tensor{'s' * (n != 1)} were not compared, since ggml did not round "
        f"them: {names[0]}{more}; give --covariance DIR"
    )
