"""What stands in for data that an importance matrix lacks. The user chooses; builder and verifier compute it here.

Data is missing if the file has no entry; if no token chose an expert (its count is 0, or its row is exactly ones in an
entry with one count for all experts, as llama-imatrix's older format writes it); or if an expert's row is all zeros,
which says nothing about its columns. A policy is a chain such as `sibling,prior`: each step gives data to what still
lacks it. `fail` and `ones` end a chain. They leave rows of zeros and absent entries as llama-quantize treats them, so
`ones` gives its bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.errors import ImatrixError, KernelError, did_you_mean
from ..gguf.types import INTEGER_TYPES, qtype
from .entries import Gaps
from .matrix import Imatrix

F32 = npt.NDArray[np.float32]
_MOST_TOKENS = 10**9
#: tensors of a layer that multiply the same input; `ffn_gate_inp` is the router, which can only give values
_SAME_INPUT = (
    ("ffn_gate_exps", "ffn_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_inp"),
    ("ffn_gate", "ffn_up"),
    ("attn_q_a", "attn_kv_a_mqa", "attn_q", "attn_k", "attn_v"),
)
_IN_LAYER = re.compile(r"(blk\.\d+\.)(\w+)(\.weight)")
#: no entries in a matrix of llama-imatrix without --process-output; llama-quantize does not expect any
OUTSIDE_LAYERS = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")

# sources of the values of a matrix
OWN, SIBLING, KV_B, PRIOR, SHRINK, ONES, UNSEEN = "own", "sibling", "kv_b", "prior", "shrink", "ones", "unseen"

WORDS = {
    "fail": "nothing (the default)",
    "ones": "all columns alike, as llama-quantize has it without a word",
    "sibling": "a copy from the tensor with the same input: gate and up, q_a and kv_a_mqa",
    "prior": "the mean of the tensor's other experts",
    "shrink:K": "that mean, and every expert's values drawn towards it by K tokens",
    "raise:TYPE": "at least TYPE for the whole tensor, whose experts cannot differ in type",
    "kv_b": "attn_kv_b's entry for attn_v_b",
}


class Policy(NamedTuple):
    """A chain of steps, in order."""

    steps: tuple[tuple[str, str], ...]
    """words, each with the text after its colon"""

    @property
    def text(self) -> str:
        return ",".join(f"{word}:{value}" if value else word for word, value in self.steps)

    @property
    def fills(self) -> bool:
        """Whether it can give values that are not in the file."""
        return any(word not in ("fail", "ones") for word, _ in self.steps)

    @property
    def ends_in_ones(self) -> bool:
        return self.steps[-1][0] == "ones"

    def has(self, word: str) -> bool:
        return word in (w for w, _ in self.steps)

    def value(self, word: str) -> str:
        """Return the text after a step's colon, '' if the chain lacks the step."""
        return next((value for w, value in self.steps if w == word), "")


def parse_policy(text: str) -> Policy:
    """Parse a chain as written, such as sibling,shrink:50,ones. Raises ValueError."""
    steps: list[tuple[str, str]] = []
    pieces = [piece.strip() for piece in text.split(",")]
    for i, piece in enumerate(pieces):
        word, colon, value = piece.partition(":")
        known = {w.partition(":")[0]: w for w in WORDS}
        if word not in known:
            raise ValueError(
                f"'{piece:.60}' is not a policy for an importance matrix{did_you_mean(word[:60], known)}; known are "
                f"{', '.join(WORDS)}, several in a row with commas, as in sibling,prior"
            )
        if (":" in known[word]) != bool(colon and value):
            raise ValueError(f"'{piece:.60}' should be written {known[word]}")
        if word == "shrink":
            if not (value.isascii() and value.isdecimal() and 0 < int(value[:12]) <= _MOST_TOKENS and len(value) < 11):
                raise ValueError(f"'{piece:.60}': K is a number of tokens from 1 to {_MOST_TOKENS:,}, as in shrink:50")
            value = str(int(value))
        if word == "raise":
            value = _a_type(value, piece)
        if word in ("fail", "ones") and i < len(pieces) - 1:
            raise ValueError(f"'{text:.60}': {word} ends a chain; what follows it would never be asked")
        if word in (w for w, _ in steps):
            raise ValueError(f"'{text:.60}' has {word} twice")
        steps.append((word, value))
    return Policy(tuple(steps))


def _a_type(value: str, piece: str) -> str:
    try:
        found = qtype(value).name
    except KernelError as e:
        raise ValueError(f"'{piece:.60}': {e}") from None
    if found in INTEGER_TYPES:
        raise ValueError(f"'{piece:.60}': {found} is not a type to quantize to")
    return found


FAIL, AS_LLAMA_QUANTIZE = parse_policy("fail"), parse_policy("ones")


class Origin(NamedTuple):
    """Where the weights of a tensor's matrices come from under a policy."""

    sources: tuple[str, ...]
    """for each matrix: OWN, SIBLING, KV_B, PRIOR, SHRINK or ONES; UNSEEN if there is no data"""
    donor: str = ""
    """the tensor whose entry supplies the matrices that are SIBLING or KV_B"""
    mean_of: tuple[int, ...] = ()
    """the matrices whose mean is used for PRIOR and SHRINK"""
    tokens: int = 0
    """K of shrink:K; 0 leaves data unchanged"""
    lacks: bool = False
    """whether the chain's `raise` step found matrices without data"""

    @property
    def unseen(self) -> tuple[int, ...]:
        return tuple(m for m, source in enumerate(self.sources) if source == UNSEEN)

    @property
    def is_filled(self) -> bool:
        """Whether some of the values come from a policy, not from the file or llama-quantize."""
        return bool(self.tokens) or self.lacks or any(s not in (OWN, ONES, UNSEEN) for s in self.sources)

    def counts(self) -> dict[str, int]:
        """Return how many matrices have their values from each source."""
        found = Counter(SHRINK if self.tokens and source == OWN else source for source in self.sources)
        return dict(sorted(found.items()))


class Completed:
    """An importance matrix whose missing data a policy fills in. Reads like `Imatrix`, but for the tensors of a known
    model. `shapes`: (columns, matrices) of each tensor. `gaps`: what `Imatrix.check` found; if not given, it is read
    from the file when a policy needs it. Safe for threads."""

    def __init__(
        self,
        imatrix: Imatrix,
        policy: Policy,
        shapes: Mapping[str, tuple[int, int]],
        gaps: Mapping[str, Gaps] | None = None,
    ) -> None:
        self.given, self.policy, self.shapes = imatrix, policy, shapes
        self._gaps = gaps
        self._origins: dict[str, Origin] = {}
        self._means: dict[str, npt.NDArray[np.float64]] = {}
        self._lacking: dict[str, frozenset[int]] = {}

    @property
    def path_as_given(self) -> str:
        return self.given.path_as_given

    @property
    def path(self) -> Path:
        return self.given.path

    def __contains__(self, name: str) -> bool:
        return name in self.given or bool(self.origin(name).donor)

    def fits(self, name: str, n_cols: int, n_mats: int) -> bool:
        """Whether the entry, if there is one, has a value for each column of each matrix."""
        return name not in self.given or self.given.fits(name, n_cols, n_mats)

    def weights(self, name: str, mat: int, n_cols: int) -> F32:
        """Return the weights float32 [n_cols] of matrix number `mat` of a tensor. Raises ImatrixError."""
        origin = self.origin(name)
        source = origin.sources[mat] if mat < len(origin.sources) else OWN
        if source == ONES:
            return np.ones(n_cols, np.float32)
        if source in (PRIOR, SHRINK):
            return self._mean(name, origin).astype(np.float32)
        data = self._data(name, origin, mat, n_cols)
        if not origin.tokens or source == UNSEEN:
            return data
        count = self.given.entries[origin.donor if source == SIBLING else name].counts[mat]
        drawn = (count * data.astype(np.float64) + origin.tokens * self._mean(name, origin)) / (count + origin.tokens)
        return drawn.astype(np.float32)

    def _data(self, name: str, origin: Origin, mat: int, n_cols: int) -> F32:
        source = origin.sources[mat] if mat < len(origin.sources) else OWN
        if source == KV_B:
            return self.given.weights(origin.donor, 0, n_cols)
        return self.given.weights(origin.donor if source == SIBLING else name, mat, n_cols)

    def _mean(self, name: str, origin: Origin) -> npt.NDArray[np.float64]:
        """Return the unweighted mean over the experts that have data: float64 [n_cols]."""
        if name not in self._means:
            n_cols = self.shapes[name][0]
            total = np.zeros(n_cols, np.float64)
            for mat in origin.mean_of:
                total += self._data(name, origin, mat, n_cols)
            self._means[name] = total / len(origin.mean_of)
        return self._means[name]

    # ------------------------------------------------------------ where values come from

    def origin(self, name: str) -> Origin:
        """Return where a tensor's values come from. Raises ImatrixError if this matrix cannot support the policy."""
        if name not in self._origins:
            self._origins[name] = self._follow(name)
        return self._origins[name]

    def _follow(self, name: str) -> Origin:
        n_cols, n_mats = self.shapes.get(name, (0, 0))
        if name in self.given and not self.given.fits(name, n_cols, n_mats):
            return Origin((OWN,) * n_mats)
        nothing = self._nothing(name)
        empty = self._empty(name) if self.policy.fills else frozenset()
        sources = [UNSEEN if m in nothing or m in empty else OWN for m in range(n_mats)]
        origin = Origin(())
        for word, value in self.policy.steps:
            missing = [m for m, source in enumerate(sources) if source == UNSEEN]
            if word == "sibling" and missing:
                donor = self._sibling(name, missing)
                if donor:
                    lacking = self._nothing(donor) | self._empty(donor)
                    given = [m for m in missing if m not in lacking]
                    sources = [SIBLING if m in given else source for m, source in enumerate(sources)]
                    origin = origin._replace(donor=donor)
            elif word == "kv_b" and len(missing) == n_mats and (donor := self._kv_b(name)):
                sources = [KV_B] * n_mats
                origin = origin._replace(donor=donor)
            elif word in ("prior", "shrink") and is_expert(name):
                data = tuple(m for m, source in enumerate(sources) if source in (OWN, SIBLING))
                if not data or (word == "prior" and not missing):
                    continue
                if word == "shrink":
                    self._require_counts(name, origin.donor, n_mats)
                    origin = origin._replace(tokens=int(value))
                sources = [(PRIOR if word == "prior" else SHRINK) if s == UNSEEN else s for s in sources]
                origin = origin._replace(mean_of=data)
            elif word == "raise" and missing and name not in OUTSIDE_LAYERS:
                origin = origin._replace(lacks=True)
        if name in self.given or origin.donor:
            # no step gave data to these
            for m, source in enumerate(sources):
                if source == UNSEEN and origin.lacks:
                    sources[m] = ONES
                elif source == UNSEEN and m in empty:
                    sources[m] = OWN
                elif source == UNSEEN and self.policy.ends_in_ones:
                    sources[m] = ONES
        return origin._replace(sources=tuple(sources))

    def without_data(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the matrices of a tensor's own entry that no token reached, and those with only zeros."""
        return tuple(sorted(self._nothing(name))), tuple(sorted(self._empty(name)))

    def _nothing(self, name: str) -> frozenset[int]:
        """Return the matrices for which the file has no entry, or no token."""
        if name not in self._lacking:
            self._lacking[name] = self._without_tokens(name)
        return self._lacking[name]

    def _without_tokens(self, name: str) -> frozenset[int]:
        n_cols, n_mats = self.shapes.get(name, (0, 0))
        if name not in self.given:
            return frozenset(range(n_mats))
        entry = self.given.entries[name]
        n_mats = n_mats or len(entry.counts)
        n_cols = n_cols or entry.n_values // n_mats
        found = Gaps(entry.n_values, entry.counts, np.empty((0, 2), np.int64)).of(n_cols, n_mats, 32).unseen
        if len(entry.counts) == 1 and n_mats > 1 and is_expert(name):
            ones = [m for m in range(n_mats) if (self.given.weights(name, m, n_cols) == 1).all()]
            if len(ones) < n_mats:  # otherwise the whole entry was made of ones on purpose
                found = tuple(ones)
        return frozenset(found)

    def _empty(self, name: str) -> frozenset[int]:
        """Return the matrices that have a count but only zeros."""
        if self._gaps is None:
            self._gaps = self.given.check()
        n_cols, n_mats = self.shapes.get(name, (0, 0))
        if name not in self._gaps or not n_cols:
            return frozenset()
        return frozenset(self._gaps[name].of(n_cols, n_mats, 32).zeros)

    def _sibling(self, name: str, missing: list[int]) -> str:
        """Return a tensor with the same input whose entry has data for at least one of the matrices, or ''."""
        m = _IN_LAYER.fullmatch(name)
        group = next((g for g in _SAME_INPUT if m and m[2] in g), ())
        for other in (f"{m[1]}{stem}{m[3]}" for stem in group if m and stem != m[2]):
            if other in self.given and self.given.fits(other, *self.shapes[name]):
                lacking = self._nothing(other) | self._empty(other)
                if any(mat not in lacking for mat in missing):
                    return other
        return ""

    def _kv_b(self, name: str) -> str:
        """Return the attn_kv_b tensor whose entry serves an attn_v_b (both multiply the latent's columns), or ''."""
        other = name.replace("attn_v_b", "attn_kv_b")
        n_cols = self.shapes[name][0]
        if other == name or other not in self.given or not self.given.fits(other, n_cols, 1):
            return ""
        return "" if 0 in self._nothing(other) else other

    def _require_counts(self, name: str, donor: str, n_mats: int) -> None:
        for entry in (n for n in (name, donor) if n in self.given):
            if len(self.given.entries[entry].counts) != n_mats:
                raise ImatrixError(
                    f"{self.path}: the policy {self.policy.text} needs the number of tokens that each expert saw, but "
                    f"the entry of '{entry}' has one count for all {n_mats}, as all have in the older .dat format; use "
                    "prior, or a matrix in the GGUF format that llama-imatrix made"
                )


def is_expert(name: str) -> bool:
    """Whether a tensor stacks routed experts, each of which sees its own tokens."""
    return "_exps." in name


def serves_kv_b(imatrix: Imatrix, name: str) -> bool:
    """Whether a tensor has no entry, but attn_kv_b of its layer has one that a policy could use for it."""
    return name not in imatrix and "attn_v_b" in name and name.replace("attn_v_b", "attn_kv_b") in imatrix
