"""What a pass keeps between layers, so that the same command goes on after whatever stopped it.

One file, replaced after a layer: hidden states of every group of models, and the sums of those who watch. It says
what it is of (`identity`), the layer that comes next, and the digest of its data:

    a line of JSON: identity, layer, groups, arrays [[name, dtype, shape], …], digest
    the arrays' bytes, one after the other
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from ..base.errors import OutputError, ResumeError
from ..base.folders import Folder
from ..base.lock import HeldError, Lock
from .layer import Input

_STATE, _NEXT, _LOCK = "state", "state.next", "lock"
_NO_DIGEST = "0" * 32
#: bytes of an array that are copied at a time
_PIECE = 1 << 24
_DTYPES = ("float32", "float64", "int32", "int64", "uint8", "bool")

Array = npt.NDArray[Any] | torch.Tensor
Groups = list[tuple[list[int], torch.Tensor]]


class Observer(Protocol):
    """Watches the inputs of a model's matrices."""

    def see(self, given: Input) -> None: ...
    def end_of_layer(self, number: int) -> None:
        """All inputs of a layer were seen: what is summed of it may be written, before the pass keeps its own."""

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What it has summed so far, to be kept between layers."""

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Go on from what was kept."""


class Kept(AbstractContextManager["Kept"]):
    """A folder that one run at a time uses. Raises OutputError where it cannot be written, ResumeError where another
    run uses it or what lies there is of another run."""

    def __init__(self, folder: Path, identity: str, seconds: float = 0.0) -> None:
        self.folder, self.identity = folder, identity
        self._seconds, self._saved = seconds, time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with Folder.hold(folder) as held:
                self._lock = Lock.of_file(held, _LOCK)
        except HeldError:
            raise ResumeError(f"{folder}: another run is using it; wait for it, or give another output") from None
        except OSError as e:
            raise OutputError(f"{folder}: cannot be written: {e.strerror or e}") from None

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def save(
        self, layer: int, groups: Sequence[tuple[list[int], torch.Tensor]], observers: Sequence[Observer | None],
        last: bool = False,
    ) -> None:  # fmt: skip
        """Keep what is before layer number `layer`, in place of what was kept; not before the time for it has come,
        unless it is the `last`. Raises OutputError."""
        if not last and time.monotonic() - self._saved < self._seconds:
            return
        arrays: list[tuple[str, Array]] = []
        for i, (_, hidden) in enumerate(groups):
            arrays.append((f"hidden.{i}", hidden))
        for i, observer in enumerate(observers):
            for name, summed in observer.state().items() if observer is not None else ():
                arrays.append((f"observer.{i}.{name}", np.asarray(summed, order="C")))
        about = {
            "identity": self.identity,
            "layer": layer,
            "groups": [members for members, _ in groups],
            "arrays": [[name, str(values.dtype).removeprefix("torch."), list(values.shape)] for name, values in arrays],
            "digest": _NO_DIGEST,
        }
        digest = xxhash.xxh3_128()
        try:
            with (self.folder / _NEXT).open("wb") as f:
                f.write(_line(about))
                for _, values in arrays:
                    for piece in _pieces(values):
                        digest.update(piece)
                        f.write(piece)
                f.seek(0)
                f.write(_line({**about, "digest": digest.hexdigest()}))
                f.flush()
                os.fsync(f.fileno())
            os.replace(self.folder / _NEXT, self.folder / _STATE)
            _sync_folder(self.folder)
        except OSError as e:
            nbytes = sum(values.itemsize * int(np.prod(values.shape)) for _, values in arrays)
            raise OutputError(
                f"{self.folder}: {nbytes:,} bytes of what is kept between layers cannot be written: "
                f"{e.strerror or e}; free some space, and run the same command again: it continues after the last "
                "saved layer"
            ) from None
        self._saved = time.monotonic()

    def load(self, observers: Sequence[Observer | None], make: Callable[[], torch.Tensor]) -> tuple[int, Groups] | None:
        """The layer to go on with and the hidden states before it, in tensors that `make` makes, if something is kept.
        Raises ResumeError for what is of another run, or damaged."""
        path = self.folder / _STATE
        states: dict[int, dict[str, npt.NDArray[Any]]] = {}
        groups: Groups = []
        try:
            with path.open("rb") as f:
                about: dict[str, Any] = json.loads(f.readline(1 << 24))
                if about["identity"] != self.identity:
                    raise ResumeError(
                        f"{path}: is of another run (other model, text or settings); give another output, or remove "
                        f"{self.folder}"
                    )
                layer, digest = int(about["layer"]), xxhash.xxh3_128()
                for name, dtype, shape in about["arrays"]:
                    what, _, rest = str(name).partition(".")
                    if what == "hidden":
                        hidden = make()
                        groups.append((list(about["groups"][int(rest)]), hidden))
                        _read_into(f, hidden, tuple(shape), digest)
                        continue
                    if dtype not in _DTYPES:
                        raise ValueError(f"an array of {dtype}")
                    number, _, name_there = rest.partition(".")
                    values = np.empty(tuple(shape), dtype)
                    _read_into(f, values, tuple(shape), digest)
                    states.setdefault(int(number), {})[name_there] = values
                if f.read(1) or digest.hexdigest() != about["digest"]:
                    raise ValueError("its data is not what was written")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, IndexError, TypeError, MemoryError) as e:
            raise ResumeError(f"{path}: cannot be continued: {_reason(e)}; remove {self.folder}") from None
        for i, state in states.items():
            observer = observers[i] if i < len(observers) else None
            if observer is not None:
                observer.restore(state)
        return layer, groups


def _line(about: dict[str, Any]) -> bytes:
    return json.dumps(about).encode() + b"\n"


def _pieces(values: Array) -> Iterator[memoryview]:
    """The bytes of an array or a tensor, a few at a time."""
    flat = values.reshape(-1)
    step = _PIECE // values.itemsize
    for at in range(0, len(flat), step):
        piece = flat[at : at + step]
        yield (piece.cpu().numpy() if isinstance(piece, torch.Tensor) else piece).data.cast("B")


def _read_into(f: BufferedReader, out: Array, shape: tuple[int, ...], digest: xxhash.xxh3_128) -> None:
    """Fill an array or a tensor from a file. Raises ValueError when it is of another shape or the file too short."""
    if tuple(out.shape) != shape:
        raise ValueError(f"it has an array {list(shape)} where there should be {list(out.shape)}")
    flat = out.reshape(-1)
    step = _PIECE // out.itemsize
    for at in range(0, len(flat), step):
        piece = np.empty(min(step, len(flat) - at), np.float32 if isinstance(out, torch.Tensor) else out.dtype)
        if f.readinto(piece.data.cast("B")) != piece.nbytes:
            raise ValueError("it is too short")
        digest.update(piece.data.cast("B"))
        if isinstance(flat, torch.Tensor):
            flat[at : at + len(piece)] = torch.from_numpy(piece)
        else:
            flat[at : at + len(piece)] = piece


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reason(e: BaseException) -> str:
    """Why a kept file cannot be read, in a few words."""
    if isinstance(e, json.JSONDecodeError | KeyError | TypeError | UnicodeDecodeError):
        return "it is not what a run keeps"
    return getattr(e, "strerror", None) or str(e)
