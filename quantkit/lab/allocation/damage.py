"""The measured sensitivity of a model, and the damage it predicts for any choice of types. Stored as one JSON file.

A probe changes one group of tensors, leaves all others as in the reference, and records the KLD that this costs, chunk
by chunk. Two numbers are fitted per group, with e the relative squared error of its weights:

    KLD = α·e + β·√e

α is the cost of smooth errors. β is the cost of choices that flip, such as a router's: their number grows with the size
of an error, not with its square. A model without experts, and the last layers of one with experts, have almost none.

Over many groups, α·e add up. Flips of different groups are independent and mostly hit the same tokens, so they add as
their squares, or with the exponent that whole models show (`problem.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.errors import SourceError, did_you_mean
from ...base.files import text_within
from ...base.outputs import write_text
from ..frames import frame
from .groups import Group

F64 = npt.NDArray[np.float64]
VERSION = 2
#: the group of the probe that changes every weight about as much as rounding to BF16 does
FLOOR = "(floor)"
N_BOOTSTRAP, _SEED = 400, 20_250_128
_MAX_BYTES = 1 << 30
_TINY = 1e-12


class Probe(NamedTuple):
    """One measurement."""

    group: str
    change: str
    """a type, or "noise E seed N" (E: relative squared error)"""
    error: float
    """relative squared error of the group's weights, weighted by the imatrix where it has them"""
    text: str
    """digest of the text it was measured on"""
    by_chunk: tuple[float, ...]
    """mean KLD of each chunk, in nats"""

    @property
    def kld(self) -> float:
        return float(np.mean(self.by_chunk))

    @property
    def is_noise(self) -> bool:
        return self.change.startswith("noise")


@dataclass(frozen=True)
class Alpha:
    """The cost of errors in a group, in nats."""

    group: str
    value: float
    """α: per unit of relative squared error"""
    low: float
    high: float
    """95 %, bootstrap over chunks"""
    beta: float
    """β: per unit of its square root"""
    beta_low: float
    beta_high: float
    misfit: float
    """largest relative deviation of the fit from a probe's KLD"""
    above_floor: bool
    """whether the largest KLD of its probes is above the noise floor"""


@dataclass(frozen=True)
class Sensitivity:
    """Everything measured of a model."""

    model: str
    arch: str
    source: str
    """digest of tensors and their shapes and types"""
    imatrix: str
    """digest of the importance matrix; '' without one"""
    groups: tuple[Group, ...]
    errors: Mapping[str, Mapping[str, float]]
    """relative error by tensor and type"""
    probes: tuple[Probe, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    """digest of a text -> its description"""
    settings: str = ""
    """how errors were sampled"""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """elements of each tensor, which weight its error within the group"""

    # ------------------------------------------------------------ what it says

    @cached_property
    def by_name(self) -> dict[str, Group]:
        return {g.name: g for g in self.groups}

    @cached_property
    def _fits(self) -> dict[str, tuple[F64, F64, float, float]]:
        """α and β per group, [1 + N_BOOTSTRAP] each (first of all chunks, then of resampled chunks), the misfit, and
        the largest KLD."""
        out = {}
        probes = pooled(self.probes)
        for name in {p.group for p in probes} - {FLOOR}:
            mine = [p for p in probes if p.group == name and p.error > 0]
            mine = [p for p in mine if not p.is_noise] or mine
            if not mine:
                continue
            errors = np.array([p.error for p in mine])
            klds = []
            for p in mine:
                values = np.asarray(p.by_chunk)
                klds.append(np.concatenate([[values.mean()], values[_picks(len(values))].mean(-1)]))
            measured = np.maximum(np.stack(klds, -1), _TINY)
            alpha, beta = _fit(errors, measured)
            said = alpha[0] * errors + beta[0] * np.sqrt(errors)
            misfit = float(np.abs(said / measured[0] - 1).max())
            out[name] = alpha, beta, misfit, float(measured[0].max())
        return out

    @property
    def probed(self) -> frozenset[str]:
        """The groups with at least one usable probe."""
        return frozenset(self._fits)

    def alpha(self, group: str) -> Alpha:
        """α and β of a group. Raises SourceError if it was not probed."""
        if group not in self._fits:
            raise SourceError(f"{self.model}: the group '{group}' was not probed{did_you_mean(group, self._fits)}")
        alpha, beta, misfit, largest = self._fits[group]
        low, high = np.quantile(alpha[1:], (0.025, 0.975))
        beta_low, beta_high = np.quantile(beta[1:], (0.025, 0.975))
        return Alpha(
            group, float(alpha[0]), float(low), float(high), float(beta[0]), float(beta_low), float(beta_high), misfit,
            largest > self.floor,
        )  # fmt: skip

    @property
    def floor(self) -> float:
        """KLD below which a difference means nothing: the cost of rounding all weights to BF16 again."""
        return max((p.kld for p in self.probes if p.group == FLOOR), default=0.0)

    def damage(self, group: str, error: float) -> float:
        """KLD caused by an error in a group's weights, all else as in the reference. NaN if it was not probed."""
        smooth, flips = self.parts(group, error)
        return float(smooth[0] + flips[0])

    def parts(self, group: str, error: float) -> tuple[F64, F64]:
        """α·e and β·√e of a group, [1 + N_BOOTSTRAP] each: first of all chunks, then of resampled chunks."""
        if group not in self._fits:
            return np.full(1 + N_BOOTSTRAP, np.nan), np.full(1 + N_BOOTSTRAP, np.nan)
        alpha, beta, _, _ = self._fits[group]
        return alpha * error, beta * np.sqrt(error)

    def error_of(self, group: Group, types: Mapping[str, str]) -> float:
        """The error of a group with its tensors at `types`. Raises SourceError if one was not sampled."""
        total = 0.0
        for name in group.tensors:
            total += self.sizes[name] * self.tensor_error(name, types[name])
        return total / sum(self.sizes[name] for name in group.tensors)

    def tensor_error(self, name: str, type_: str) -> float:
        """Relative error of a tensor at a type. Raises SourceError if it was not sampled."""
        if type_ in ("F32", "F16", "BF16"):
            return 0.0
        found = self.errors.get(name, {}).get(type_)
        if found is None:
            raise SourceError(
                f"{self.model}: the sensitivity has no error of '{name}' at {type_}; run quantkit sensitivity again "
                f"with --types that have {type_}: only what is missing is done"
            )
        return found

    def to_frame(self) -> Any:
        """The probed groups with their α and β, as a pandas DataFrame. Raises ToolError if pandas is not installed."""
        return frame(asdict(self.alpha(g.name)) for g in self.groups if g.name in self.probed)

    # ------------------------------------------------------------ the file

    def to_json(self) -> dict[str, Any]:
        alphas = [asdict(self.alpha(g.name)) for g in self.groups if g.name in self.probed]
        return {
            "quantkit_sensitivity": VERSION,
            "model": self.model,
            "arch": self.arch,
            "source": self.source,
            "imatrix": self.imatrix,
            "settings": self.settings,
            "floor": self.floor,
            "groups": [asdict(g) for g in self.groups],
            "alphas": alphas,
            "texts": dict(self.texts),
            "sizes": dict(self.sizes),
            "probes": [{**p._asdict(), "by_chunk": list(p.by_chunk), "kld": p.kld} for p in self.probes],
            "errors": {name: dict(of) for name, of in self.errors.items()},
        }

    def save(self, path: Path, replace: bool = True) -> None:
        """Write the file atomically. Raises OutputError."""
        write_text(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", replace)


def _fit(errors: F64, klds: F64) -> tuple[F64, F64]:
    """Fit α and β, both non-negative, by least squares of relative deviations. errors [n], klds [m, n]; returns [m]
    each. With a single probe, α takes all."""
    x, y = errors / klds, np.sqrt(errors) / klds
    xx, xy, yy = (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)
    x1, y1 = x.sum(-1), y.sum(-1)
    only_alpha, only_beta = x1 / xx, y1 / yy
    if len(errors) == 1:
        return only_alpha, np.zeros_like(only_alpha)
    det = np.maximum(xx * yy - xy * xy, 1e-300)
    alpha, beta = (x1 * yy - y1 * xy) / det, (y1 * xx - x1 * xy) / det
    beta = np.where(alpha < 0, only_beta, beta)
    alpha = np.where(alpha < 0, 0.0, alpha)
    alpha = np.where(beta < 0, only_alpha, alpha)
    return alpha, np.where(beta < 0, 0.0, beta)


def _picks(n: int) -> npt.NDArray[np.int64]:
    """Chunk indices drawn with replacement, [N_BOOTSTRAP, n]. They depend only on n, so groups that were measured
    together are resampled together."""
    return np.random.default_rng(_SEED).integers(0, n, (N_BOOTSTRAP, n))


def read_sensitivity(path: Path) -> Sensitivity:
    """Read a file of `quantkit sensitivity`. Raises SourceError."""
    try:
        text = text_within(path, _MAX_BYTES)
        said = json.loads(text or "")
        version = said.get("quantkit_sensitivity") if isinstance(said, dict) else None
        if version != VERSION:
            what = "is of another version of quantkit" if isinstance(version, int) else "is no sensitivity"
            raise SourceError(f"{path}: {what}; make it with quantkit sensitivity")
        return Sensitivity(
            said["model"], said["arch"], said["source"], said["imatrix"],
            tuple(Group(**{**g, "tensors": tuple(g["tensors"])}) for g in said["groups"]),
            {str(n): {str(t): float(v) for t, v in of.items()} for n, of in said["errors"].items()},
            tuple(
                Probe(p["group"], p["change"], float(p["error"]), p["text"], tuple(map(float, p["by_chunk"])))
                for p in said["probes"]
            ),
            dict(said["texts"]), said["settings"], {n: int(v) for n, v in said["sizes"].items()},
        )  # fmt: skip
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SourceError(
            f"{path}: is not a sensitivity, or is damaged: {e}; make it with quantkit sensitivity"
        ) from None


def merge(every: Iterable[tuple[str, Sensitivity]]) -> Sensitivity:
    """Merge sensitivities, given with their names, of one model and importance matrix: all groups, errors and probes.
    The same probe on several texts becomes one over all their chunks. Raises SourceError if they do not match."""
    (first_name, out), *others = every
    for name, one in others:
        for what, a, b in (
            ("model", out.source, one.source), ("importance matrix", out.imatrix, one.imatrix),
            ("settings", out.settings, one.settings),
        ):  # fmt: skip
            if a != b:
                raise SourceError(f"{name}: is of another {what} than {first_name} ('{b}', not '{a}')")
        known = out.by_name
        for g in one.groups:
            if g.name in known and known[g.name].tensors != g.tensors:
                raise SourceError(f"{name}: its group '{g.name}' has other tensors than that of {first_name}")
        of = {n: {**out.errors.get(n, {}), **one.errors.get(n, {})} for n in {**out.errors, **one.errors}}
        have = {(p.group, p.change, p.text) for p in out.probes}
        out = replace(
            out,
            groups=(*out.groups, *(g for g in one.groups if g.name not in known)),
            errors=of,
            probes=(*out.probes, *(p for p in one.probes if (p.group, p.change, p.text) not in have)),
            texts={**out.texts, **one.texts},
            sizes={**out.sizes, **one.sizes},
        )
    return out


def pooled(probes: Iterable[Probe]) -> tuple[Probe, ...]:
    """Pool probes of the same change on several texts into one over all their chunks."""
    by: dict[tuple[str, str], Probe] = {}
    for p in probes:
        was = by.get((p.group, p.change))
        by[p.group, p.change] = p if was is None else was._replace(by_chunk=was.by_chunk + p.by_chunk)
    return tuple(by.values())
