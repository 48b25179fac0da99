"""How large a file may be: bytes, bits per weight, or what fits on GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from ...base.errors import RecipeError
from ...base.text import GIB
from ...model.catalogue import Catalogue, Tensor
from ...planning import fit
from ...planning.gpus import parse_gpus
from ...planning.plan import Plan
from .knapsack import Solution
from .problem import Problem, padded, plain

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,12})?)\s*(?:([KMGT])(I?)B?|B)?", re.IGNORECASE)
_BPW = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*bpw", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_FIT_TRIES = 60
#: least reduction of the limit, in bytes, when a solution does not fit
_FIT_STEP = 1 << 20

Solve = Callable[[int, Callable[[Tensor, str], int]], "Solution | None"]


class Priced(Protocol):
    """What a target needs to know of an optimization."""

    catalogue: Catalogue
    problem: Problem
    overhead: int

    def plan_of(self, name: str, asked: dict[str, str], gamma: float) -> Plan: ...


@dataclass(frozen=True)
class Gpu:
    """What must fit on GPUs besides the weights."""

    room: tuple[int, ...]
    """bytes of each GPU"""
    context: int = 8192
    cache_type: str = "f16"


@dataclass(frozen=True)
class Target:
    """One of: bytes of the file, bits per weight, GPUs that hold all layers."""

    text: str
    nbytes: int | None = None
    bpw: Fraction | None = None
    gpu: Gpu | None = None

    def file_limit(self, run: Priced) -> int:
        """Upper limit for the file in bytes; for bits per weight and GPUs it includes every tensor's padding."""
        if self.nbytes is not None:
            return self.nbytes
        if self.bpw is not None:
            return self._tensor_bytes(run) + run.overhead + 32 * len(run.catalogue.tensors)
        assert self.gpu is not None
        largest = sum(
            max(padded(t, g[i]) for g in c.given) for c in run.problem.choices for i, t in enumerate(c.tensors)
        )
        return largest + run.overhead

    def search(self, solve: Solve, run: Priced, scale: float) -> Solution | None:
        """The best solution within the target times `scale`."""
        if self.nbytes is not None:
            return solve(int(self.nbytes * scale) - run.overhead, padded)
        if self.bpw is not None:
            fixed = sum(plain(t, t.source_type) for t in run.catalogue.tensors if not t.quantizable)
            return solve(int(self._tensor_bytes(run) * scale) - fixed, plain)
        return self._fitting(solve, run, scale)

    def _tensor_bytes(self, run: Priced) -> int:
        assert self.bpw is not None
        return int(self.bpw * sum(t.n_elements for t in run.catalogue.tensors) / 8)

    def _fitting(self, solve: Solve, run: Priced, scale: float) -> Solution | None:
        """The largest solution with all layers and the KV cache on the GPUs. token_embd stays in RAM and costs
        nothing."""
        assert self.gpu is not None
        room = [int(r * scale) for r in self.gpu.room]
        cache = sum(fit.cache_bytes(run.catalogue, self.gpu.context, self.gpu.cache_type))
        fixed = sum(plain(t, t.source_type) for t in run.catalogue.tensors if not t.quantizable)
        limit = sum(room) - cache - fixed
        for _ in range(_FIT_TRIES):
            found = solve(limit, _on_gpu) if limit > 0 else None
            if found is None:
                return None
            asked = run.problem.asked_of(found.chosen)
            placed = fit.weigh(run.catalogue, run.plan_of("fit", asked, 1.0), self.gpu.context, self.gpu.cache_type)
            whole = fit.whole_layers(placed, room)
            if whole.output and whole.n_layers == placed.n_layers:
                return found
            # the layers left in RAM are the excess; several GPUs leave gaps that a smaller layer may fill
            over = whole.ram - placed.input
            limit = min(limit, found.nbytes) - max(_FIT_STEP // 16, over // (8 * len(room)))
        return None


def _on_gpu(tensor: Tensor, type_: str) -> int:
    return 0 if tensor.name.startswith(("token_embd.", "per_layer_token_embd.")) else plain(tensor, type_)


def parse_target(text: str) -> Target:
    """Parse 131GiB, 1.67bpw or 14517920B. Raises RecipeError."""
    given = text.strip()
    if m := _BPW.fullmatch(given):
        if not 0 < Fraction(m[1]) <= 32:
            raise RecipeError(f"--target {text}: no file has so many bits per weight; give 1 to 16, such as 1.67bpw")
        return Target(given, bpw=Fraction(m[1]))
    if m := _SIZE.fullmatch(given):
        base = 1024 if m[3] else 1000
        nbytes = Fraction(m[1]) * base ** _POWERS[(m[2] or "").upper()]
        if nbytes >= 1:
            return Target(given, nbytes=int(nbytes))
    raise RecipeError(
        f"--target {text}: is not a size; give 131GiB, 140GB, 14517920B or bits per weight such as 1.67bpw"
    )


def parse_fit(text: str, reserve: int = GIB, context: int = 8192, cache_type: str = "f16") -> Target:
    """Parse GPUs such as 2x80, with `reserve` bytes of each left free. Raises RecipeError."""
    try:
        gpus = parse_gpus(text)
    except ValueError as e:
        raise RecipeError(f"--fit {e}") from None
    room: Sequence[int] = [g * GIB - reserve for g in gpus.gib]
    return Target(f"{gpus.text} GiB of VRAM", gpu=Gpu(tuple(room), context, cache_type))
