"""The llama-quantize engine: runs the stock binary with one anchored rule per tensor, and checks its results.

A GGUF source that becomes one file is quantized in a single run. Anything else goes piece by piece: a GGUF with the
model's hyperparameters and a few tensors, as BF16, is quantized with the whole importance matrix, and the resulting
bytes are put in place. If a policy changes values of the matrix, each piece gets its own matrix. llama-quantize reads
only the hyperparameters, so it accepts such files, and the bytes are those of a run on the whole model. Scratch space
is one piece (the largest tensor, or BATCH_BYTES), never the model.
"""

from __future__ import annotations

import re
import subprocess
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ... import kernels
from ...base.errors import OutputError, SourceError, ToolError
from ...base.files import read_at
from ...base.folders import Folder
from ...gguf.header import (
    KV,
    STRING,
    U32,
    Header,
    TensorInfo,
    header_bytes,
    is_other_alignment,
    kv,
    kv_array,
    pad,
    read_header_of,
)
from ...gguf.shards import is_usual_name
from ...gguf.types import FILE_TYPES, QTYPES
from ...llama_cpp import programs
from ...llama_cpp.tensor_types import tensor_type_file
from ...model.catalogue import Source, Tensor
from ...model.sources.shard_store import Limits
from ...planning.file_layout import POLICY_KEY, ROUNDING_PREFIX, FileLayout
from ...planning.gaps import n_matrices
from ...planning.plan import ImatrixStatus, Plan, Planned, types_asked
from ...weights.rows import RowReader
from . import ImportanceValues, Work

_LINE = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+- \[")
_SLAB_VALUES = 1 << 20
#: scratch bytes for tensors that share a run; starting a run costs seconds (IQ1_S sorts its grid each time), so small
#: tensors share one, and a larger tensor has its own
BATCH_BYTES = 4 << 30
_COPY_BYTES = 1 << 24
_LAST_WORDS = 6
#: names in the scratch folder
_PIECE, _MADE, _RULES, _IMATRIX = "piece.gguf", "made.gguf", "tensor-types.txt", "imatrix.gguf"


class LlamaQuantizeEngine:
    """The llama-quantize engine (see the module). `binary` is the llama-quantize to run."""

    name = "llama-quantize"
    rounds = False
    limits: Limits | None = None

    def __init__(self, binary: Path, batch_bytes: int = BATCH_BYTES) -> None:
        self.binary = binary
        self.batch_bytes = batch_bytes

    def scratch_bytes(self, plan: Plan) -> int:
        stored = [QTYPES[t.tensor.source_type].row_bytes(t.tensor.n_cols) * t.tensor.n_rows for t in plan.tensors]
        piece = min(sum(stored), max(self.batch_bytes, *stored))
        return piece + min(piece, plan.tensor_bytes)

    def run(self, work: Work) -> None:
        source = work.plan.catalogue.source
        assert source is not None
        first = source.files[0]
        whole = len(work.file_layouts) == 1 and first.suffix == ".gguf" and QTYPES.get(_dtype(source, work)) is not None
        whole = whole and (len(source.files) == 1 or is_usual_name(first.name))
        # a whole run copies the source's keys; with --pre or --pad-token the output has others
        whole = whole and getattr(source, "kvs", None) == work.plan.catalogue.kvs
        # a whole run keeps these keys
        kept = [i.key for i in work.plan.catalogue.kvs if i.key == POLICY_KEY or i.key.startswith(ROUNDING_PREFIX)]
        whole = whole and not kept and not any(map(is_other_alignment, work.plan.catalogue.kvs))
        # if a policy changes values, a whole run would record the name of the file with these values
        whole = whole and not work.plan.applied
        if whole and work.sink.is_empty:
            self._whole(work, source)
        else:
            self._piecewise(work, source)

    def _whole(self, work: Work, source: Source) -> None:
        file_layout = work.file_layouts[0]
        work.sink.discard_rows()
        self._quantize(work, source.path, [p.planned for p in file_layout.tensors])
        with self._opened(work.scratch) as made:
            self._check_whole(file_layout, made, work.scratch)
        work.sink.accept_whole_file(_MADE)

    def _check_whole(self, file_layout: FileLayout, made: BinaryIO, scratch: Folder) -> None:
        """Raise ToolError unless a whole file has the planned tensors and header."""
        header = self._header(made, scratch)
        got = {t.name: t for t in header.tensors}
        for p in file_layout.tensors:
            self._check(p.planned, got.get(p.planned.tensor.name))
        made.seek(0)
        if made.read(len(file_layout.header)) != file_layout.header or header.file_bytes != file_layout.nbytes:
            raise ToolError(
                f"llama-quantize wrote other metadata than planned ({header.file_bytes:,} bytes in all, planned "
                f"{file_layout.nbytes:,}); is {self.binary} a llama-quantize of another version?"
            )

    def _piecewise(self, work: Work, source: Source) -> None:
        reader = RowReader(source)
        hparams = [
            item for item in work.plan.catalogue.kvs
            if item.key == "general.architecture" or item.key.startswith(f"{work.plan.catalogue.arch}.")
        ]  # fmt: skip
        scratch = work.scratch
        missing = [t for t in work.plan.tensors if not work.sink.has(t.tensor.name, 0, t.tensor.n_rows)]
        for planned in _batches(missing, self.batch_bytes):
            _write_piece(scratch, planned, hparams, reader)
            changes = any(t.tensor.quantizable and t.tensor.source_type != t.type for t in planned)
            if changes:
                self._quantize(work, scratch.for_a_program() / _PIECE, planned)
                scratch.unlink(_PIECE)
            else:
                scratch.rename(_PIECE, scratch, _MADE)
                for t in planned:
                    work.progress(t.tensor.name, t.tensor.n_elements)
            with self._opened(scratch) as made:
                got = {t.name: t for t in self._header(made, scratch).tensors}
                for t in planned:
                    _copy(made, self._check(t, got.get(t.tensor.name)).offset, work, t)
            scratch.unlink(_MADE)

    def _quantize(self, work: Work, source: Path, tensors: Sequence[Planned]) -> None:
        """Run the binary once, to _MADE; reports its progress, and on failure its last lines of output."""
        scratch, folder = work.scratch, work.scratch.for_a_program()
        scratch.remove(_RULES)
        with open(scratch.create(_RULES), "w") as f:
            f.write(tensor_type_file(types_asked(tensors)))
        command = [str(self.binary)]
        if work.imatrix is not None and work.plan.applied:
            if _write_imatrix(scratch, tensors, work.imatrix):
                command += ["--imatrix", str(folder / _IMATRIX)]
        elif work.imatrix is not None:
            command += ["--imatrix", work.imatrix.path_as_given]
        if any(t.tensor.quantizable and not QTYPES[t.tensor.source_type].is_float for t in tensors):
            command.append("--allow-requantize")
        base = work.plan.recipe.file_type
        if base in ("F32", "F16", "BF16"):
            # with a float base type, llama-quantize silently ignores every rule
            command += ["--override-kv", f"general.file_type=int:{FILE_TYPES[base]}"]
            base = "Q8_0"
        for override in work.plan.recipe.metadata:
            command += ["--override-kv", override.text]
        command += ["--tensor-type-file", str(folder / _RULES), str(source), str(folder / _MADE)]
        command += [base, str(work.n_threads)]
        last = deque[str](maxlen=_LAST_WORDS)
        sizes = {t.tensor.name: t.tensor.n_elements for t in tensors}
        at_work = 0
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                text=True, errors="replace", start_new_session=True, pass_fds=(scratch.fd,),
            )  # fmt: skip
        except OSError as e:
            raise programs.cannot_run(self.binary, e) from None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip("= \n"):
                    last.append(line.rstrip().replace(str(folder), str(scratch.path)))
                m = _LINE.match(line)  # a tensor begins: the one before is done
                if m:
                    work.progress(m[3], at_work)
                    at_work = sizes.get(m[3], 0)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
        if code != 0:
            raise programs.failure(self.binary, code, last)
        work.progress(tensors[-1].tensor.name, at_work)

    def _opened(self, scratch: Folder) -> BinaryIO:
        """Open the output of a run. Raises ToolError if there is none, OutputError if it is not a regular file."""
        try:
            return open(scratch.open(_MADE), "rb")
        except OSError:
            raise self._no_llama_quantize("made no file") from None

    def _header(self, made: BinaryIO, scratch: Folder) -> Header:
        """Read its header. Raises ToolError if it is no GGUF."""
        try:
            return read_header_of(made, scratch.path / _MADE)
        except SourceError as e:
            raise self._no_llama_quantize(f"made no sound GGUF ({e})") from None

    def _no_llama_quantize(self, what: str) -> ToolError:
        return ToolError(f"{self.binary} ended without an error, but {what}; is it a llama-quantize?")

    def _check(self, planned: Planned, info: TensorInfo | None) -> TensorInfo:
        t = planned.tensor
        if info is None or info.type != planned.type or info.nbytes != planned.nbytes:
            what = "left out" if info is None else f"made {info.type} of {info.nbytes:,} bytes"
            raise ToolError(
                f"llama-quantize {what} for '{t.name}', but the plan says {planned.type} of {planned.nbytes:,}; is "
                f"{self.binary} a llama-quantize of another version?"
            )
        return info


def _batches(tensors: Sequence[Planned], limit: int) -> Iterator[list[Planned]]:
    """Batches of consecutive tensors whose total size, as the converter would store them, is within the limit. A larger
    tensor is a batch of its own."""
    batch: list[Planned] = []
    size = 0
    for planned in tensors:
        t = planned.tensor
        n = QTYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows
        if batch and size + n > limit:
            yield batch
            batch, size = [], 0
        batch.append(planned)
        size += n
    if batch:
        yield batch


def _write_piece(scratch: Folder, tensors: Sequence[Planned], hparams: Sequence[KV], reader: RowReader) -> None:
    """Write a GGUF with these tensors, stored as a converter would, or as in the source GGUF."""
    infos, at = [], 0
    for planned in tensors:
        t = planned.tensor
        infos.append((t.name, t.shape, t.source_type, at))
        at += pad(QTYPES[t.source_type].row_bytes(t.n_cols) * t.n_rows)
    try:
        with open(scratch.create(_PIECE), "wb") as f:
            f.write(header_bytes(hparams, infos))
            for planned in tensors:
                for raw in _stored_rows(planned.tensor, reader):
                    f.write(raw.data)
                f.write(bytes(pad(f.tell()) - f.tell()))
    except OSError as e:
        path = scratch.path / _PIECE
        raise OutputError(f"{path}: writing a piece for llama-quantize failed: {e.strerror or e}") from None


def _write_imatrix(scratch: Folder, tensors: Sequence[Planned], weights: ImportanceValues) -> bool:
    """Write an importance matrix with the values these tensors are quantized with, after the policy, each as the sum
    over one token. Returns False if none of them uses any."""
    kvs = [
        kv("general.type", STRING, "imatrix"), kv_array("imatrix.datasets", STRING, ["quantkit"]),
        kv("imatrix.chunk_count", U32, 0), kv("imatrix.chunk_size", U32, 0),
    ]  # fmt: skip
    used = [t.tensor for t in tensors if t.imatrix_status == ImatrixStatus.USED]
    infos, at = [], 0
    for t in used:
        for kind, shape in (("in_sum2", (t.n_cols, n_matrices(t))), ("counts", (1, n_matrices(t)))):
            infos.append((f"{t.name}.{kind}", shape, "F32", at))
            at += pad(4 * shape[0] * shape[1])
    scratch.remove(_IMATRIX)
    try:
        with open(scratch.create(_IMATRIX), "wb") as f:
            f.write(header_bytes(kvs, infos))
            for t in used:
                for mat in range(n_matrices(t)):
                    f.write(np.ascontiguousarray(weights.weights(t.name, mat, t.n_cols), np.float32).data)
                f.write(bytes(pad(f.tell()) - f.tell()))
                f.write(np.ones(n_matrices(t), np.float32).data)
                f.write(bytes(pad(f.tell()) - f.tell()))
    except OSError as e:
        path = scratch.path / _IMATRIX
        raise OutputError(f"{path}: writing what llama-quantize reads failed: {e.strerror or e}") from None
    return bool(used)


def _stored_rows(t: Tensor, reader: RowReader) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield a tensor's rows in its source type, a slab at a time."""
    qt = QTYPES[t.source_type]
    step = max(1, _SLAB_VALUES // t.n_cols)
    for part in t.parts:
        for row in range(0, part.out_rows, step):
            n = min(step, part.out_rows - row)
            if reader.source.tensor(part.source).dtype == qt.name and not part.transposed:
                raw = np.empty((n, qt.row_bytes(t.n_cols)), np.uint8)
                reader.raw(part, row, raw)
                yield raw
            else:
                rows = np.empty((n, t.n_cols), np.float32)
                reader.rows(t, part, row, rows)
                yield kernels.quantize(rows, qt.name)


def _dtype(source: Source, work: Work) -> str:
    part = work.plan.tensors[0].tensor.parts[0]
    return source.tensor(part.source).dtype


def _copy(made: BinaryIO, offset: int, work: Work, planned: Planned) -> None:
    """Copy a tensor's bytes to the sink."""
    t = planned.tensor
    row_bytes = QTYPES[planned.type].row_bytes(t.n_cols)
    step = max(1, _COPY_BYTES // row_bytes)
    for row in range(0, t.n_rows, step):
        n = min(step, t.n_rows - row)
        raw = np.frombuffer(bytearray(read_at(made.fileno(), n * row_bytes, offset + row * row_bytes)), np.uint8)
        if raw.size != n * row_bytes:
            ends = row + raw.size // row_bytes
            raise ToolError(f"{work.scratch.path / _MADE}: ended within '{t.name}', row {ends}")
        work.sink.put(t.name, row, raw.reshape(n, row_bytes))
