"""A sensitivity as readable text, and as plain values."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...base.errors import SourceError
from ...base.text import table
from .damage import FLOOR, Sensitivity, pooled
from .groups import ROLES_IN_ORDER

#: shares are computed with this type everywhere
SHARES_AT = "Q3_K"


class Share(NamedTuple):
    """A role's share of the damage and of the bytes, as fractions of 1, with one type everywhere."""

    role: str
    damage: float
    nbytes: float

    @property
    def ratio(self) -> float:
        return self.damage / self.nbytes if self.nbytes else 0.0


def shares(known: Sensitivity, type_: str = SHARES_AT) -> list[Share]:
    """Damage share and byte share of each role with all tensors at one type; groups without sampled errors are left
    out."""
    damage, weights = dict.fromkeys(ROLES_IN_ORDER, 0.0), dict.fromkeys(ROLES_IN_ORDER, 0)
    for g in known.groups:
        try:
            error = known.error_of(g, {n: _sampled(known, n, type_) for n in g.tensors})
        except SourceError:
            continue
        found = known.damage(g.name, error)
        if np.isfinite(found):
            damage[g.role] += found
            weights[g.role] += g.n_elements
    total, every = sum(damage.values()) or 1.0, sum(weights.values()) or 1
    return [Share(r, damage[r] / total, weights[r] / every) for r in ROLES_IN_ORDER if weights[r]]


def _sampled(known: Sensitivity, name: str, type_: str) -> str:
    """The type itself if it was sampled, else (for rows it does not fit) the sampled type with the largest error."""
    of = known.errors.get(name, {})
    return type_ if type_ in of or not of else sorted(of, key=lambda t: -of[t])[0]


def sensitivity_json(known: Sensitivity) -> dict[str, Any]:
    """The content of the file, with the shares, but without the errors of each tensor."""
    said = known.to_json()
    del said["errors"], said["sizes"]
    return {**said, "shares": [{**s._asdict(), "ratio": s.ratio} for s in shares(known)]}


def sensitivity_text(known: Sensitivity) -> str:
    """Groups with α and β, roles with their shares, and the noise floor."""
    rows = []
    probed = {p.group for p in known.probes}
    for g in known.groups:
        if g.name not in probed:
            rows.append([g.name, g.role, f"{g.n_elements:,}", "not probed", "", "", "", ""])
            continue
        a = known.alpha(g.name)
        mine = sorted((p for p in pooled(known.probes) if p.group == g.name), key=lambda p: p.error)
        klds = ", ".join(f"{p.change} {p.kld:.4f}" for p in mine)
        note = "" if a.above_floor else "below the floor"
        rows.append(
            [
                g.name,
                g.role,
                f"{g.n_elements:,}",
                f"{a.value:.3f} {a.low:.3f}-{a.high:.3f}",
                f"{a.beta:.3f} {a.beta_low:.3f}-{a.beta_high:.3f}",
                f"{100 * a.misfit:.0f} %",
                klds,
                note,
            ]
        )
    head = ("group", "role", "weights", "α, 95 %", "β, 95 %", "misfit", "KLD of its probes", "")
    lines = [f"{known.model}: {len(known.groups)} groups, {len(known.probes)} probes"]
    lines += [f"text: {about}" for about in known.texts.values()]
    lines += ["", table(rows, head, (2, 3, 4, 5)).rstrip(), ""]
    lines.append(
        "KLD in nats = α·e + β·√e, with e the relative squared error of a group; misfit: of its probes, at most"
    )
    if any(p.group == FLOOR for p in known.probes):
        lines.append(f"noise floor: {known.floor:.6f}, what rounding every weight to BF16 once more costs")
    said = shares(known)
    if said:
        lines += ["", f"with {SHARES_AT} everywhere:", ""]
        of = [[s.role, f"{100 * s.damage:.1f} %", f"{100 * s.nbytes:.1f} %", f"{s.ratio:.2f}"] for s in said]
        lines.append(table(of, ("role", "of the damage", "of the bytes", "ratio"), (1, 2, 3)))
    return "\n".join(lines)
