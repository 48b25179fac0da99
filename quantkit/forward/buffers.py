"""Memory for matrices that is used again: pages that are new to a process cost more than decoding FP8 into them."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

F32 = npt.NDArray[np.float32]

#: bytes of memory that is free and kept
_KEPT = 1 << 28
#: smaller arrays are not worth it
_LEAST = 1 << 20


class Buffers:
    """Makes float32 arrays of any values. The memory of one is used for another when nothing refers to it any more, be
    it a tensor or a view. Any number of threads may ask."""

    def __init__(self, pinned: bool = False) -> None:
        """`pinned`: the memory stays where it is, so that a GPU can fetch it without the processor's help."""
        self._pinned = pinned
        self._lock = threading.Lock()
        self._given_back: deque[Any] = deque()
        """filled by finalizers, which run in any thread at any time, so under no lock"""
        self._free: list[Any] = []

    def empty(self, shape: tuple[int, ...]) -> F32:
        n = int(np.prod(shape))
        if not self._pinned and 4 * n < _LEAST:
            return np.empty(shape, np.float32)
        owner = self._take(4 * n)
        # its base is no array, so whatever is made of it refers to it and not to what is below
        out: F32 = np.frombuffer(owner, np.float32, n)
        weakref.finalize(out, self._given_back.append, owner).atexit = False
        return out.reshape(shape)

    def _take(self, nbytes: int) -> Any:
        with self._lock:
            while self._given_back:
                self._free.append(self._given_back.popleft())
            fits = [one for one in self._free if nbytes <= len(one) <= 2 * nbytes]
            found = min(fits, key=len, default=None)
            if found is not None:
                self._free = [one for one in self._free if one is not found]
            while sum(map(len, self._free)) > _KEPT:
                self._free.pop(0)  # the one that was not needed for longest
        return self._new(nbytes) if found is None else found

    def _new(self, nbytes: int) -> Any:
        if self._pinned:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy().data
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
