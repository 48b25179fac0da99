"""Second moments of the inputs of matrices, as rounding needs them: where they are, and which one a matrix has.

A folder is `quantkit imatrix make --covariance`'s. For each layer it has `layer-00003.json`, a list with an object an
input: `file`, `tensors` that have this input, `n_cols`, `counts` of inputs that were summed; the file is a NumPy array
float32 [n_mats, n_cols * (n_cols + 1) / 2]: the upper triangle by rows, sums, not divided by anything. With `weights`
`fisher` an input counts as often as the squared gradient at the matrix's output says. Where the folder has a folder
`held-out` of the same kind, made of other text, that one judges what is rounded (quantkit.rounding.rows).

Which matrix: tensors that share an input share its second moment, so all experts' gate and up have one a layer. An
expert's ffn_down has its own, drawn towards its layer's by `SHRINK` tokens. attn_k_b and attn_v_b have one a head.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from ..base.errors import SourceError
from ..base.journal import is_file_name
from ..model.catalogue import Tensor

F32 = npt.NDArray[np.float32]

#: how inputs are weighted: each alike, or by the squared gradient at the matrix's output
PLAIN, FISHER = "", "fisher"
#: what an expert's own second moment is drawn towards its layer's by
SHRINK = 512
HELD_OUT = "held-out"
#: a file of a covariance's folder: the digest of the pass that made it
PASS = "pass"
#: bytes of a folder's JSON that are read, and of an array that its digest is made of
_MAX_JSON, _DIGEST_BYTES, _PIECE = 1 << 26, 1 << 20, 1 << 12
#: pooled matrices that are kept; a layer has one
_POOLED_KEPT = 2
_AGAIN = "make the covariance again"
HOW_TO_MAKE = "make one with: quantkit imatrix make MODEL --text F -o imatrix.gguf --covariance DIR"


class CovarianceSource(Protocol):
    """Sums of x x^T of the inputs of tensors: a folder, or a pass that has computed a layer."""

    @property
    def name(self) -> str:
        """What it is called in a message."""

    @property
    def digest(self) -> str:
        """64 hex digits that are others for other sums."""

    @property
    def pass_digest(self) -> str:
        """64 hex digits of the model, the tokens and the settings that it was computed of; '' where it is not said."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the text: the most inputs that were summed for any tensor."""

    @property
    def weighting(self) -> str:
        """How inputs were weighted: PLAIN or FISHER."""

    @property
    def files(self) -> tuple[Path, ...]:
        """What it is read from."""

    @property
    def held_out(self) -> CovarianceSource | None:
        """Of other text, to judge by what is rounded; None where there is none."""

    def __contains__(self, name: str) -> bool: ...

    def counts(self, name: str) -> tuple[float, ...]:
        """How many inputs were summed: one number, or one for each matrix of the tensor."""

    def n_cols(self, name: str) -> int: ...

    def input_of(self, name: str) -> str:
        """A name of the input; tensors that share a second moment have the same."""

    def matrix(self, name: str, mat: int, n_cols: int) -> tuple[F32, float]:
        """Sums of x x^T, float32 [n_cols, n_cols], of a matrix of a tensor (of all, where they share one), and how many
        inputs were summed. The array is the caller's to change. Raises SourceError for what is not here or of another
        size."""


class LayerSource(CovarianceSource, Protocol):
    """Second moments that are computed as a build asks for them, a layer at a time. `counts` of an expert's are the
    most that they can be, until its layer is there; its digest is that of the pass."""

    @property
    def scratch_bytes(self) -> int:
        """The most that it takes on the disk while it runs."""

    def fits(self, name: str, n_cols: int, n_mats: int) -> bool:
        """Whether an importance matrix of it has a value for each column of each matrix."""

    @property
    def importance(self) -> Path:
        """Of the layer that is there: its importance matrix, as `quantkit imatrix make` writes it."""

    def layers(
        self, folder: Path, names: Collection[str], tell: Callable[[str], None], with_importance: bool = False
    ) -> Generator[int, None, None]:
        """Numbers of the layers that these tensors are in, ascending: `matrix` has the layer that was given last, until
        the next is asked for. What is asked for again in the same `folder` goes on with the layer that was given last,
        so all that is made of a layer must be on the disk before the next is asked for. `tell` is called with what it
        is at. Raises SourceError, WeightError, OutputError, ResumeError, KernelError."""


def is_by_layer(source: CovarianceSource | None) -> TypeGuard[LayerSource]:
    """Whether it is computed as it is asked for."""
    return hasattr(source, "layers")


def pack(full: F32, out: F32) -> None:
    """The upper triangle of float32 [n, n], by rows, to [n * (n + 1) / 2]."""
    at, n = 0, len(full)
    for row in range(n):
        out[at : at + n - row] = full[row, row:]
        at += n - row


def unpack(packed: F32, n: int) -> F32:
    """The symmetric float32 [n, n] of a packed triangle."""
    out, at = np.empty((n, n), np.float32), 0
    for row in range(n):
        out[row, row:] = out[row:, row] = packed[at : at + n - row]
        at += n - row
    return out


class Covariances:
    """A folder of second moments. Its arrays stay in their files until they are asked for. Raises SourceError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, _Found] = {}
        self._json = sorted(folder.glob("layer-*.json"))
        if not self._json:
            raise SourceError(f"{folder}: holds no covariance; make it with quantkit imatrix make --covariance")
        for path in self._json:
            try:
                about = json.loads(_read(path))
                if not isinstance(about, list) or not about:
                    raise ValueError("it lists no input")
                for one in about:
                    found = _found(folder, one)
                    self._where.update(dict.fromkeys(one["tensors"], found))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise SourceError(f"{path}: cannot be read: {e}; {_AGAIN}") from None

    @property
    def name(self) -> str:
        return str(self.folder)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def counts(self, name: str) -> tuple[float, ...]:
        return self._found(name).counts

    def n_cols(self, name: str) -> int:
        return self._found(name).n_cols

    def input_of(self, name: str) -> str:
        return self._found(name).file.name

    def _found(self, name: str) -> _Found:
        found = self._where.get(name)
        if found is None:
            raise SourceError(f"{self.folder}: has nothing for '{name}'; it is of another model")
        return found

    @property
    def n_tokens(self) -> int:
        """Tokens of the text: the most inputs that were summed for any tensor."""
        return int(max(max(found.counts) for found in self._where.values()))

    @property
    def weighting(self) -> str:
        """How inputs were weighted, of any tensor."""
        return max(found.weighting for found in self._where.values())

    @property
    def files(self) -> tuple[Path, ...]:
        own = (*self._json, *sorted({found.file for found in self._where.values()}))
        return own if self.held_out is None else (*own, *self.held_out.files)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the folder's JSON says, and of each array's length and evenly spaced pieces: a mebibyte of
        each, all of a smaller one. Raises SourceError."""
        h = hashlib.sha256()
        try:
            for path in self._json:
                raw = _read(path)
                h.update(b"%s %d " % (path.name.encode(), len(raw)) + raw)
            for file in sorted({found.file for found in self._where.values()}):
                nbytes = file.stat().st_size
                h.update(b"%s %d " % (file.name.encode(), nbytes))
                step = max(_PIECE, nbytes * _PIECE // _DIGEST_BYTES)
                with open(file, "rb") as f:
                    for at in range(0, nbytes, step):
                        f.seek(at)
                        h.update(f.read(_PIECE))
        except OSError as e:
            raise SourceError(f"{self.folder}: cannot be read: {e.strerror or e}; {_AGAIN}") from None
        return h.hexdigest()

    @cached_property
    def pass_digest(self) -> str:
        """See CovarianceSource."""
        try:
            return (self.folder / PASS).read_text("ascii")[:64]
        except (OSError, ValueError):
            return ""

    @cached_property
    def held_out(self) -> Covariances | None:
        """Of other text, where there is such a folder in this one. Raises SourceError, also where it is of another
        kind: what was chosen by weighted moments is not judged by plain ones, nor the other way round."""
        inside = self.folder / HELD_OUT
        if not inside.is_dir():
            return None
        found = Covariances(inside)
        for name, theirs in found._where.items():
            ours = self._where.get(name)
            if ours is not None and ours.weighting != theirs.weighting:
                with_, without = (found, self) if theirs.weighting == FISHER else (self, found)
                raise SourceError(
                    f"{inside}: judges what is rounded by {self.folder}, but of '{name}' {with_.folder} was made with "
                    f"--fisher and {without.folder} without it; make both alike"
                )
        return found

    def matrix(self, name: str, mat: int, n_cols: int) -> tuple[F32, float]:
        """See CovarianceSource."""
        found = self._found(name)
        at = mat if len(found.counts) > 1 else 0
        try:
            packed = np.load(found.file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as e:
            raise SourceError(f"{found.file}: cannot be read: {e}; {_AGAIN}") from None
        if found.n_cols != n_cols or packed.shape != (len(found.counts), n_cols * (n_cols + 1) // 2):
            raise SourceError(f"{found.file}: is not of '{name}' with {n_cols:,} columns; it is of another model")
        if packed.dtype != np.float32 or at >= len(found.counts):
            raise SourceError(f"{found.file}: is not of float32 for each matrix of '{name}'; {_AGAIN}")
        full = unpack(packed[at], n_cols)
        if not np.isfinite(full).all() or (full.diagonal() < 0).any():
            raise SourceError(f"{found.file}: matrix {at} holds values that are no sums of squares; {_AGAIN}")
        return full, found.counts[at]


class _Found(NamedTuple):
    file: Path
    n_cols: int
    counts: tuple[float, ...]
    weighting: str


def _read(path: Path) -> bytes:
    with open(path, "rb") as f:
        raw = f.read(_MAX_JSON + 1)
    if len(raw) > _MAX_JSON:
        raise ValueError(f"it has more than {_MAX_JSON:,} bytes")
    return raw


def _found(folder: Path, one: dict[str, Any]) -> _Found:
    """What an object of a layer's JSON says. Raises ValueError, KeyError or TypeError where it says nothing."""
    name, counts = one["file"], tuple(map(float, one["counts"]))
    if not isinstance(name, str) or not is_file_name(name):
        raise ValueError(f"{name!r:.60} is no file's name")
    if not counts or not all(math.isfinite(n) and n >= 0 for n in counts):
        raise ValueError("counts are not numbers of inputs")
    if not isinstance(one["tensors"], list) or not all(isinstance(t, str) for t in one["tensors"]):
        raise ValueError("tensors are not a list of names")
    if type(one["n_cols"]) is not int or one["n_cols"] < 1:
        raise ValueError(f"{one['n_cols']!r:.40} columns")
    weighting = one.get("weights", PLAIN)
    if weighting not in (PLAIN, FISHER):
        raise ValueError(f"weights {weighting!r:.40}; known is {FISHER!r}")
    return _Found(folder / name, one["n_cols"], counts, weighting)


# ---------------------------------------------------------------- which matrix has which


class Standing(NamedTuple):
    """How a covariance bears on a tensor."""

    n_mats: int
    thin: frozenset[int]
    """matrices of the tensor, of which the covariance is too thin, or has none"""
    why: str
    """why it is none of use for any of them; '' where it is for some"""
    n_unseen: int = 0
    """how many of those no input reached"""


def standing(tensor: Tensor, source: CovarianceSource) -> Standing:
    """Which matrices of a tensor a covariance is too thin for: where fewer inputs were summed than there are columns.
    Raises SourceError for one of another model."""
    n_mats = math.prod(tensor.shape[2:])
    every = frozenset(range(n_mats))
    if tensor.name not in source:
        return Standing(n_mats, every, "the covariance has none of their inputs")
    counts, n_cols = source.counts(tensor.name), source.n_cols(tensor.name)
    if n_cols != tensor.n_cols or len(counts) not in (1, n_mats):
        raise SourceError(
            f"{source.name}: has {len(counts)} x {n_cols:,} columns for '{tensor.name}', which has {n_mats} x "
            f"{tensor.n_cols:,}; it is of another model"
        )
    if _is_down(tensor.name) and len(counts) == 1 and n_mats > 1:
        why = "experts share one covariance there, and each needs its own (make it without --pooled-experts)"
        return Standing(n_mats, every, why)
    thin = frozenset(i for i, n in enumerate(counts) if n < n_cols)
    why = f"the covariance has fewer tokens than their {n_cols:,} columns" if len(thin) == len(counts) else ""
    return Standing(n_mats, every if why else thin, why, sum(1 for i in thin if counts[i] == 0))


def _is_down(name: str) -> bool:
    return name.endswith(".ffn_down_exps.weight")


class NoInputsError(SourceError):
    """No token reached a matrix, so that it has no second moment."""


class Moments:
    """The second moments that matrices are rounded by, by the rules of the module. Safe for threads."""

    def __init__(self, source: CovarianceSource) -> None:
        self.source = source
        self._pooled: OrderedDict[str, F32] = OrderedDict()
        self._lock = threading.Lock()

    def key(self, name: str, mat: int) -> tuple[str, int]:
        """Matrices with the same key have the same second moment."""
        return self.source.input_of(name), mat if len(self.source.counts(name)) > 1 else 0

    def mean(self, name: str, mat: int, n_cols: int) -> F32:
        """The mean of x x^T, float32 [n_cols, n_cols], of a matrix of a tensor. The same bits however it is asked for.
        Raises SourceError."""
        sums, count = self.source.matrix(name, mat, n_cols)
        if count <= 0:
            raise NoInputsError(f"{self.source.name}: has no inputs for '{name}', matrix {mat}")
        sums /= np.float32(count)
        if not _is_down(name) or len(self.source.counts(name)) == 1:
            return sums
        pooled = self._of_all(name, n_cols)
        trace = math.fsum(pooled.diagonal().tolist())
        if trace > 0:
            scale = math.fsum(sums.diagonal().tolist()) / trace
            sums *= np.float32(count / (count + SHRINK))
            sums += np.float32(scale * SHRINK / (count + SHRINK)) * pooled
        return sums

    def _of_all(self, name: str, n_cols: int) -> F32:
        """The mean over the inputs of all experts."""
        key = self.source.input_of(name)
        with self._lock:
            found = self._pooled.pop(key, None)
            if found is None:
                total = np.zeros((n_cols, n_cols))
                for mat in range(len(self.source.counts(name))):
                    total += self.source.matrix(name, mat, n_cols)[0]
                found = (total / sum(self.source.counts(name))).astype(np.float32)
                if len(self._pooled) >= _POOLED_KEPT:
                    self._pooled.popitem(last=False)
            self._pooled[key] = found
            return found
