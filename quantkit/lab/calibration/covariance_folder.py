"""Where second moments are made and go: DIR.partial beside DIR, which gets its name when all layers are in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from ...base import outputs
from ...base.errors import OutputError
from ...base.outputs import Output
from ...base.text import size
from ...building.folder import folder_of
from ...model.catalogue import Catalogue
from ...rounding.covariance import PASS
from ..identity import said
from .inputs import covariance_bytes, planned
from .unfinished import make_folder, unfinished

_INSIDE, _OWN, _POOLED = "layers", "own-experts", "pooled-experts"
_IDENTITY = "identity"


class CovarianceFolder:
    """A context: DIR is not there or empty, and DIR.partial is held. Where DIR is what a run of this identity has given
    its name just before it was stopped, nothing is left to do. Raises OutputError, ResumeError."""

    def __init__(self, folder: Path, read: Iterable[Path], identity: str, is_made: bool) -> None:
        """`is_made`: all layers were computed by an earlier run."""
        self.folder, self._identity = Path(os.path.normpath(folder)), identity
        outputs.check(read, [Output(self.folder, "--covariance", is_folder=True, suffix=".partial")])
        self.is_given = is_made and said(self.folder / _IDENTITY) == identity
        if not self.is_given:
            check_empty(self.folder)
        self._stack = ExitStack()

    def __enter__(self) -> CovarianceFolder:
        partial = self._stack.enter_context(unfinished(self.folder, lambda path: any(path.glob(f"{_INSIDE}/*.json"))))
        self.inside = make_folder(partial / _INSIDE)
        for stray in self.inside.glob(".quantkit-*.tmp"):  # of a run that was killed
            stray.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, e, traceback)

    def require_space(self, catalogue: Catalogue, own_experts: bool) -> None:
        """Note the choice for a run that goes on, and raise OutputError where what is still to be written has no
        room."""
        note = self.inside.with_name(_OWN if own_experts else _POOLED)
        need = covariance_bytes(catalogue, own_experts) - _there(self.inside)
        free = shutil.disk_usage(self.inside).free
        if need > free:
            pooled = covariance_bytes(catalogue, False)
            less = f", or give --pooled-experts ({pooled:,})" if own_experts and pooled <= free else ""
            raise OutputError(
                f"{self.folder}: the covariance needs {need:,} bytes more, but {free:,} are free; free "
                f"{need - free:,} more{less}, or choose another place"
            )
        outputs.write_text(note, "", replace=True)

    def give(self, pass_digest: str) -> None:
        """Let the finished folder have its name. `pass_digest`: of the pass (lab.identity.of_pass). Raises
        OutputError."""
        if self.is_given:
            return
        outputs.write_text(self.inside / PASS, pass_digest, replace=True)
        outputs.write_text(self.inside / _IDENTITY, self._identity, replace=True)
        try:
            if self.folder.is_dir():
                self.folder.rmdir()
            os.rename(self.inside, self.folder)
        except OSError as e:
            raise OutputError(
                f"{self.folder}: cannot be written: {e.strerror or e}; the covariance is in {self.inside}"
            ) from None


def check_empty(folder: Path) -> None:
    """Raise OutputError for a covariance's folder that has something in it."""
    try:
        there = next(iter(sorted(os.listdir(folder))), None)
    except FileNotFoundError:
        return
    except OSError as e:
        raise OutputError(f"{folder}: cannot be read: {e.strerror or e}; give another folder") from None
    if there is not None:
        raise OutputError(f"{folder}: is not empty (it has '{there}'); give a new folder to --covariance")


def choose_own(catalogue: Catalogue, folder: Path, room: int | None) -> bool:
    """Whether every expert's ffn_down has a matrix of its own: where they fit `room` bytes, or without it the disk; as
    an unfinished run has chosen. Raises OutputError where not even one a layer fits."""
    partial = folder_of(Path(os.path.normpath(folder)))
    begun = [name for name in (_OWN, _POOLED) if os.path.lexists(partial / name)]
    if room is None and len(begun) == 1:
        return begun[0] == _OWN
    own, pooled = covariance_bytes(catalogue), covariance_bytes(catalogue, False)
    if room is None:
        above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        return own <= shutil.disk_usage(above).free + _there(partial / _INSIDE)
    if pooled > room:
        raise OutputError(
            f"{folder}: the covariance needs {pooled:,} bytes even with one matrix a layer for the experts' ffn_down, "
            f"and --disk allows {room:,}; allow more, or leave --covariance out"
        )
    return own <= room


def _there(folder: Path) -> int:
    """Bytes on the disk of the files in a folder."""
    try:
        return sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    except OSError:
        return 0


def described(catalogue: Catalogue, own_experts: bool) -> str:
    """What a covariance will be, in a line."""
    plan = planned(catalogue, own_experts)
    nbytes = sum(p.nbytes for p in plan)
    experts = [p for p in plan if p.names[0].endswith(".ffn_down_exps.weight")]
    how = ""
    if experts:
        each = f"{sum(p.n_mats for p in experts):,} of experts' ffn_down" if own_experts else "one a layer for ffn_down"
        how = f", {each}"
    n = sum(p.n_mats for p in plan)
    return f"{size(nbytes)}: {n:,} matrices of {len(plan):,} inputs{how}"
