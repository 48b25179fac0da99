"""Second moments computed while a build goes on: a layer of the pass, then what the build makes of it, then the next.

In the folder lie what the pass keeps between layers, and the files of one layer, as `imatrix make --covariance` writes
them: the same sums, so the same bytes of a file. A layer's files are removed when the next layer is asked for. So it
is with the layer's importance matrix, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...base.errors import SourceError
from ...base.version import __version__
from ...forward.model import Model
from ...forward.stream import Options, Pass, threads_of
from ...imatrix.write import Facts, write_gguf
from ...model.catalogue import Catalogue, layer_of
from ...rounding.covariance import F32, PLAIN, Covariances, CovarianceSource
from ..identity import of_pass, of_run
from .covariance import Covariance
from .estimate import KEEP_SECONDS, LARGE_STATE
from .inputs import Planned, planned
from .sums import InputSums, Observers, Saved
from .unfinished import make_folder

_STATE = "state"
_SUMS = "sums-%05d.safetensors"


class Streamed:
    """See quantkit.rounding.covariance.LayerSource. `texts`: the files that the tokens [n_chunks, n_ctx] are of."""

    def __init__(
        self, catalogue: Catalogue, tokens: npt.NDArray[np.int32], texts: Iterable[Path] = (),
        forward: Options | None = None,
    ) -> None:  # fmt: skip
        self.catalogue, self.tokens = catalogue, tokens
        self.files = tuple(texts)
        self._forward = forward or Options()
        self._planned = {name: p for p in planned(catalogue) for name in p.names}
        self._now: Covariances | None = None
        self._importance: Path | None = None

    # ------------------------------------------------------------ what is known before

    @property
    def name(self) -> str:
        n = threads_of(self._forward)
        return f"the pass over {self.n_tokens:,} tokens on {n} thread{'s' * (n != 1)}"

    @cached_property
    def pass_digest(self) -> str:
        """See CovarianceSource."""
        return of_pass(self.catalogue, self.tokens, self._forward, threads_of(self._forward), own_experts=True)

    @property
    def digest(self) -> str:
        return self.pass_digest

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.size)

    @property
    def weighting(self) -> str:
        return PLAIN

    @property
    def held_out(self) -> CovarianceSource | None:
        return None

    @property
    def scratch_bytes(self) -> int:
        """Hidden states, as they are and as they are kept, and the largest layer's second moments."""
        layers: dict[int, int] = {}
        for p in set(self._planned.values()):
            number = layer_of(p.names[0]) or 0
            layers[number] = layers.get(number, 0) + p.nbytes
        hidden = 4 * self.tokens.size * next(t.n_cols for t in self.catalogue.tensors if t.name == "token_embd.weight")
        return 3 * hidden + max(layers.values(), default=0)

    def __contains__(self, name: str) -> bool:
        return name in self._planned

    def counts(self, name: str) -> tuple[float, ...]:
        """Of an expert, before its layer is there: as many as there are tokens."""
        if self._now is not None and name in self._now:
            return self._now.counts(name)
        return (float(self.n_tokens),) * self._of(name).n_mats

    def n_cols(self, name: str) -> int:
        return self._of(name).n_cols

    def fits(self, name: str, n_cols: int, n_mats: int) -> bool:
        """As an importance matrix (quantkit.planning.plan.ImatrixEntries): it is of this model."""
        return self.n_cols(name) == n_cols

    def _of(self, name: str) -> Planned:
        found = self._planned.get(name)
        if found is None:
            raise SourceError(f"{self.name}: has nothing for '{name}'")
        return found

    # ------------------------------------------------------------ of the layer that is there

    def _layer(self, name: str) -> Covariances:
        if self._now is None or name not in self._now:
            raise SourceError(f"{self.name}: has not come to '{name}'")
        return self._now

    def input_of(self, name: str) -> str:
        return self._layer(name).input_of(name)

    def matrix(self, name: str, mat: int, n_cols: int) -> tuple[F32, float]:
        return self._layer(name).matrix(name, mat, n_cols)

    @property
    def importance(self) -> Path:
        """See LayerSource."""
        if self._importance is None:
            raise SourceError(f"{self.name}: has not come to a layer")
        return self._importance

    # ------------------------------------------------------------ the pass

    def layers(
        self, folder: Path, names: Collection[str], tell: Callable[[str], None], with_importance: bool = False
    ) -> Generator[int, None, None]:  # fmt: skip
        """See LayerSource."""
        files = make_folder(folder / "layers")
        sums = make_folder(folder / "sums") if with_importance else None
        needed = sorted({number for name in names if (number := layer_of(name)) is not None})
        steps = self._steps(folder, (files, sums), names, tell)
        try:
            n_done = next(steps)
            if any(number < n_done and not _json(files, number).exists() for number in needed):
                steps.close()  # a layer is asked for again, after it was done with
                (folder / _STATE).unlink(missing_ok=True)
                steps = self._steps(folder, (files, sums), names, tell)
                n_done = next(steps)
            for path in files.iterdir():
                number = int(path.name.split("-")[1].removesuffix(".json")) if path.name.startswith("layer-") else -1
                if number not in needed or number >= n_done:
                    path.unlink()
            for number in needed:
                while n_done <= number:
                    n_done = next(steps)
                self._now = Covariances(files)
                self._importance = None if sums is None else self._importance_of(sums, number)
                yield number
                self._now = self._importance = None
                _json(files, number).unlink()  # first: without it the arrays count for nothing
                for path in files.glob(f"layer-{number:05d}-*.npy"):
                    path.unlink()
                if sums is not None:
                    (sums / (_SUMS % number)).unlink(missing_ok=True)
        finally:
            self._now = self._importance = None
            steps.close()

    def _importance_of(self, sums: Path, number: int) -> Path:
        saved, out = Saved([sums], _SUMS % number), sums / "imatrix.gguf"
        names = tuple(str(path) for path in self.files)
        write_gguf(out, Facts(names, *self.tokens.shape), saved.entries(), saved.shapes, replace=True)
        return out

    def _steps(
        self, folder: Path, to: tuple[Path, Path | None], names: Collection[str], tell: Callable[[str], None]
    ) -> Generator[int, None, None]:
        """`to`: where second moments go, and sums of an importance matrix, if any."""
        files, sums = to
        model = Model(self.catalogue)
        identity = of_run(model.weights.source, self.tokens, (__version__, self.pass_digest, sums is not None))
        large = 4 * self.tokens.size * model.family.n_embd > LARGE_STATE
        options = replace(
            self._forward, folder=folder, identity=identity, keep_seconds=KEEP_SECONDS if large else 0.0
        )  # fmt: skip
        moments = Covariance(self.catalogue, files, names=names)
        watch = moments if sums is None else Observers(InputSums(sums), moments)  # what is there last says that all is
        said = ""

        def progress(what: str, n_done: int, n_total: int) -> None:
            nonlocal said
            if said != (said := f"second moments, {what}, {100 * n_done // max(1, n_total)} %"):
                tell(said)

        again: dict[int | None, list[str]] = {}
        for name in names:
            again.setdefault(layer_of(name), []).append(name)
        yield from Pass(
            [model], self.tokens, options, [watch], progress=progress, read_again=lambda number: again.get(number, [])
        ).steps()


def _json(files: Path, number: int) -> Path:
    return files / f"layer-{number:05d}.json"
