"""The figures that `quantkit eval --json` printed, as a card shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...base.errors import SourceError
from ...base.files import text_within

_MAX_BYTES = 1 << 26
#: standard errors on each side of a mean in which it lies in 95 of 100 cases
_Z = 1.96


class Figures(NamedTuple):
    """Of a candidate. Intervals are of 95 %; KLD in nats, shares of 1."""

    name: str
    bpw: float
    ppl: tuple[float, float]
    """the value, and half of its interval"""
    mean_kld: tuple[float, float]
    kld_99: float
    same_top: tuple[float, float]


class Measured(NamedTuple):
    reference: str
    reference_ppl: float
    n_tokens: int
    texts: tuple[str, ...]
    engine: str
    candidates: tuple[Figures, ...]


def read(path: Path) -> Measured:
    """Raises SourceError for what is not the JSON of `quantkit eval`."""
    try:
        text = text_within(path, _MAX_BYTES)
        value = json.loads(text) if text is not None else None
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.get("quantkit_eval") != 1:
        raise SourceError(f"{path}: is not what `quantkit eval … --json` prints; give that")
    try:
        return Measured(
            str(value["reference"]["name"]),
            _number(value["reference"]["ppl"]),
            int(_number(value["reference"]["n_tokens"])),
            tuple(map(str, value["texts"])),
            str(value["engine"]),
            tuple(map(_figures, value["candidates"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise SourceError(f"{path}: is damaged at {str(e)[:60]}; make it again with `quantkit eval … --json`") from None


def check_names(measured: Measured, titles: Sequence[str], path: Path) -> None:
    """Raise SourceError where none of the candidates is one of the files."""
    if not any(c.name in titles for c in measured.candidates):
        known = ", ".join(c.name for c in measured.candidates) or "nothing"
        raise SourceError(f"{path}: measures {known}, and none of the files is called so; give the evaluation of these")


def _figures(c: Mapping[str, Any]) -> Figures:
    def pair(name: str) -> tuple[float, float]:
        return _number(c[name]), _Z * _number(c[f"{name}_se"])

    return Figures(
        str(c["name"]), _number(c["bpw"]), pair("ppl"), pair("mean_kld"), _number(c["kld_99"]), pair("same_top")
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.30}, which is no number")
    return float(value)
