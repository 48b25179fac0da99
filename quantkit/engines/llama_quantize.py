"""The llama-quantize engine: drives the stock binary, one anchored rule a tensor, and checks what it did.

A GGUF source that becomes one file is quantized in one run, as a person would. Anything else goes
tensor by tensor: a GGUF with the model's hyperparameters and that one tensor, as BF16, is quantized
with the whole importance matrix, and its bytes are put in their place. llama-quantize reads only the
hyperparameters, so it takes such files, and the bytes are those of a run on the whole model. Scratch
space is one tensor, never the model.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .. import kernels
from ..catalogue import Source
from ..errors import InternalCheckError, OutputError, ToolError
from ..gguf_format import KV, header_bytes, pad, read_header
from ..layout import Placed
from ..plan import Planned
from ..qtypes import QTYPES
from ..rows import RowReader
from . import Work

_LINE = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+- \[")
_SLAB_VALUES = 1 << 20
_COPY_BYTES = 1 << 24
_LAST_WORDS = 6


def tensor_type_file(tensors: Sequence[Planned]) -> str:
    """A --tensor-type-file with one anchored rule for each quantizable tensor: total, so that
    llama-quantize's own mixture and its counters decide nothing."""
    lines = []
    for t in tensors:
        if t.tensor.quantizable:
            name = re.sub(r"([.\\+*?\[\]^$(){}|])", r"\\\1", t.tensor.name)
            lines.append(f"^{name}$={t.type.lower()}")
    return "\n".join(lines) + "\n"


class LlamaQuantizeEngine:
    """See the module. `binary` is the llama-quantize to drive."""

    name = "llama-quantize"

    def __init__(self, binary: Path) -> None:
        self.binary = binary

    def run(self, work: Work) -> None:
        source = work.plan.catalogue.source
        assert source is not None
        first = source.files[0]
        whole = len(work.files) == 1 and first.suffix == ".gguf" and QTYPES.get(_dtype(source, work)) is not None
        if whole:
            self._whole(work, source)
        else:
            self._piecewise(work, source)

    def _whole(self, work: Work, source: Source) -> None:
        path, layout = work.files[0]
        made = work.scratch / "whole.gguf"
        sizes = {p.planned.tensor.name: p.planned.tensor.n_elements for p in layout.tensors}
        last: list[str] = []

        def seen(name: str) -> None:
            if last:
                work.progress(name, sizes.get(last.pop(), 0))
            last.append(name)

        path.unlink()  # the space it reserves is needed for what llama-quantize writes
        self._quantize(work, source.path, made, [p.planned for p in layout.tensors], seen)
        if last:
            work.progress(last[0], sizes.get(last[0], 0))
        header = read_header(made)
        got = {t.name: t for t in header.tensors}
        for p in layout.tensors:
            self._check(p.planned, got.get(p.planned.tensor.name))
        if header.file_bytes != layout.nbytes:
            raise InternalCheckError(
                f"llama-quantize made {header.file_bytes:,} bytes, not the plan's {layout.nbytes:,}; please report it"
            )
        os.replace(made, path)

    def _piecewise(self, work: Work, source: Source) -> None:
        reader = RowReader(source)
        hparams = [
            item for item in work.plan.catalogue.kvs
            if item.key == "general.architecture" or item.key.startswith(f"{work.plan.catalogue.arch}.")
        ]  # fmt: skip
        for path, layout in work.files:
            with open(path, "r+b") as out:
                for p in layout.tensors:
                    t = p.planned.tensor
                    stored = t.source_type  # as in a converter's file, or in the source GGUF
                    piece = work.scratch / "piece.gguf"
                    self._write_piece(piece, p.planned, stored, hparams, reader, source)
                    if t.quantizable and stored != p.planned.type:
                        made = work.scratch / "made.gguf"
                        self._quantize(work, piece, made, [p.planned], lambda _: None)
                    else:
                        made = piece
                    header = read_header(made)
                    self._check(p.planned, header.tensors[0] if header.tensors else None)
                    _copy(made, header.tensors[0].offset, out.fileno(), p, path)
                    made.unlink()
                    piece.unlink(missing_ok=True)
                    work.progress(t.name, t.n_elements)

    def _write_piece(
        self, path: Path, planned: Planned, stored: str, hparams: list[KV], reader: RowReader, source: Source
    ) -> None:
        """A GGUF with one tensor as a converter would store it."""
        t = planned.tensor
        row_bytes = QTYPES[stored].row_bytes(t.n_cols)
        header = header_bytes(hparams, [(t.name, t.shape, stored, 0)])
        step = max(1, _SLAB_VALUES // t.n_cols)
        try:
            with open(path, "wb") as f:
                f.write(header)
                for part in t.parts:
                    for row in range(0, part.out_rows, step):
                        n = min(step, part.out_rows - row)
                        if not QTYPES[stored].is_float:
                            raw = np.empty((n, row_bytes), np.uint8)
                            reader.raw(part, row, raw)
                        else:
                            rows = np.empty((n, t.n_cols), np.float32)
                            reader.rows(t, part, row, rows)
                            raw = kernels.quantize(rows, stored)
                        f.write(raw.data)
                size = row_bytes * t.n_rows
                f.write(bytes(pad(size) - size))
        except OSError as e:
            raise OutputError(f"{path}: writing the piece of '{t.name}' failed: {e.strerror or e}") from None

    def _quantize(
        self, work: Work, source: Path, made: Path, tensors: Sequence[Planned], seen: Callable[[str], None]
    ) -> None:
        rules = work.scratch / "tensor-types.txt"
        rules.write_text(tensor_type_file(tensors))
        command = [str(self.binary)]
        if work.imatrix is not None:
            command += ["--imatrix", work.imatrix.typed]
        if any(t.tensor.quantizable and not QTYPES[t.tensor.source_type].is_float for t in tensors):
            command.append("--allow-requantize")
        command += ["--tensor-type-file", str(rules), str(source), str(made)]
        command += [work.plan.recipe.file_type, str(work.n_threads)]
        last = deque[str](maxlen=_LAST_WORDS)
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as e:
            raise ToolError(f"{self.binary}: cannot be run: {e.strerror or e}") from None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip("= \n"):
                    last.append(line.rstrip())
                m = _LINE.match(line)
                if m:
                    seen(m[3])
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
        if code != 0:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            raise ToolError(f"{self.binary} {how}; its last words:\n  " + "\n  ".join(last))

    def _check(self, planned: Planned, got: object) -> None:
        info = got
        t = planned.tensor
        kind, size = getattr(info, "type", None), getattr(info, "nbytes", 0)
        if kind != planned.type or size != planned.nbytes:
            raise InternalCheckError(
                f"llama-quantize made '{t.name}' {kind} of {size:,} bytes, but the plan says {planned.type} of "
                f"{planned.nbytes:,}; is {self.binary} a llama-quantize of another version?"
            )


def _dtype(source: Source, work: Work) -> str:
    part = work.plan.tensors[0].tensor.parts[0]
    return source.tensor(part.source).dtype


def _copy(made: Path, offset: int, out: int, placed: Placed, path: Path) -> None:
    """Put a tensor's bytes into their place; the kernel copies where it can."""
    left, at = placed.planned.nbytes, placed.offset
    try:
        with open(made, "rb") as f:
            while left:
                n = os.copy_file_range(f.fileno(), out, min(left, _COPY_BYTES), offset, at)
                if n == 0:
                    raise OutputError(f"{made}: ended {left:,} bytes early")
                left, offset, at = left - n, offset + n, at + n
    except OSError:
        try:
            with open(made, "rb") as f:
                f.seek(offset)
                while left:
                    chunk = f.read(min(left, _COPY_BYTES))
                    done = os.pwrite(out, chunk, at)
                    f.seek(offset + done)
                    left, offset, at = left - done, offset + done, at + done
        except OSError as e:
            raise OutputError(f"{path}: writing '{placed.planned.tensor.name}' failed: {e.strerror or e}") from None
