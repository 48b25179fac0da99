"""Reads back what a file records about tensors that ggml did not round: the keys quantkit.rounding.*.

Their rows are made again by quantkit's own rounding, which the caller passes in. There is no second implementation, so
this checks that the bytes follow from the method, not that the method is right.
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
from ..rounding.options import Device
from ..rounding.policy import Choice
from .gguf import Gguf, Info, read
from .structure import paths_of
from .verdict import Findings

PREFIX = "quantkit.rounding."
_ARR, _STR = 9, 8
_MAX_NUMBER = 1 << 20
_MOST_DEVICE = 200
_LINE = re.compile(r"(\S{1,40}) (\S{1,300})(?: but ([0-9,-]{1,100000}))?")
_LAYERS = re.compile(r"blk\.\{([0-9,-]{1,10000})\}\.(.+)")
_OPTIONS = re.compile(r"damp ([0-9.e+-]{1,30})(, search)?")


class Rounder(Protocol):
    """Makes rows again, as a build does (quantkit.rounding.rounder)."""

    def improve(
        self, rows: npt.NDArray[np.float32], blocks: npt.NDArray[np.uint8], type_: str, matrix: tuple[str, int],
        choice: Choice,
    ) -> int: ...  # fmt: skip

    def output_errors(
        self, rows: npt.NDArray[np.float32], blocks: npt.NDArray[np.uint8], type_: str, matrix: tuple[str, int],
        choice: Choice,
    ) -> npt.NDArray[np.float64]: ...  # fmt: skip


class Recorded(NamedTuple):
    """A file's record of its rounding."""

    rounding: Rounding
    covariance: str
    """its digest, or the digest of the pass that computed it during the build"""
    held_out: str
    """'' if there was none"""


def headers(out: Path) -> Iterator[Gguf]:
    """The readable headers of a file, or of a set of shards."""
    return (g for path in paths_of(out, Findings()) if (g := read(path, Findings())) is not None)


def recorded(files: Iterable[Gguf]) -> Recorded | None:
    """Return the rounding recorded in the first file that records any; None if none does. Raises SourceError for
    contents that no build writes."""
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
    device = Device("", g.keys[PREFIX + "device"].text()) if PREFIX + "device" in g.keys else None
    if device is not None and not (device.text.isprintable() and 0 < len(device.text) <= _MOST_DEVICE):
        raise ValueError("device")
    rounding = Rounding(choices, standings=standings, recorded_policy=policy, in_pass=in_pass, device=device)
    return Recorded(rounding, g.keys[PREFIX + ("pass" if in_pass else "covariance")].text(), held_out)


def _n_mats(info: Info | None) -> int:
    return 1 if info is None or len(info.shape) < 3 else info.shape[2]


def _texts(raw: bytes) -> list[str]:
    """The strings of a GGUF array value."""
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
    """The first strings that differ between two arrays; 'nothing' where one array is shorter."""
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
    """Parse '3-5,8' into [3, 4, 5, 8]."""
    out: list[int] = []
    for some in text.split(","):
        first, _, last = some.partition("-")
        a, b = int(first), int(last or first)
        if not 0 <= a <= b or len(out) + b - a > _MAX_NUMBER:
            raise ValueError(f"numbers {text!r:.60}")
        out += range(a, b + 1)
    return out


def require_covariance(said: Recorded | None, covariance: CovarianceSource | None) -> None:
    """Raise SourceError if the covariance is not the one the file was rounded with."""
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
    """Return the plan to compare rows by, the rounding of its tensors, and notes. If the plan says nothing about
    rounding, the file's own record counts. Raises SourceError for a covariance other than the file's."""
    require_covariance(said, covariance)
    if plan is not None and _says(plan):
        if plan.rounding is not None and said is not None:
            # both are the build's, and no plan's
            of_build = replace(plan.rounding, in_pass=said.rounding.in_pass, device=said.rounding.device)
            plan = replace(plan, rounding=of_build)
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
    """Whether the recipe or the user specifies a rounding, be it ggml's."""
    recipe = plan.recipe
    return plan.rounding is not None or recipe.rounding is not None or any(rule.rounding for rule in recipe.rules)


def remark(said: Recorded | None) -> list[str]:
    """A note on tensors that ggml did not round."""
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
