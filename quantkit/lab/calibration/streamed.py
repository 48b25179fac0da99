"""Second moments computed while a build goes on: a layer of the pass, then what the build makes of it, then the next.

In the folder lie what the pass keeps between layers, and the files of one layer, as `imatrix make --covariance` writes
them: the same sums, so the same bytes of a file. A layer's files are removed when the next layer is asked for.
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
from ...model.catalogue import Catalogue, layer_of
from ...rounding.covariance import F32, PLAIN, Covariances, CovarianceSource
from ..identity import of_pass, of_run
from .covariance import Covariance
from .estimate import KEEP_SECONDS, LARGE_STATE
from .inputs import Planned, planned
from .unfinished import make_folder

_STATE = "state"


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

    # ------------------------------------------------------------ the pass

    def layers(
        self, folder: Path, names: Collection[str], tell: Callable[[str], None]
    ) -> Generator[int, None, None]:  # fmt: skip
        """See LayerSource."""
        files = make_folder(folder / "layers")
        needed = sorted({number for name in names if (number := layer_of(name)) is not None})
        steps = self._steps(folder, files, names, tell)
        try:
            n_done = next(steps)
            if any(number < n_done and not _json(files, number).exists() for number in needed):
                steps.close()  # a layer is asked for again, after it was done with
                (folder / _STATE).unlink(missing_ok=True)
                steps = self._steps(folder, files, names, tell)
                n_done = next(steps)
            for path in files.iterdir():
                number = int(path.name.split("-")[1].removesuffix(".json")) if path.name.startswith("layer-") else -1
                if number not in needed or number >= n_done:
                    path.unlink()
            for number in needed:
                while n_done <= number:
                    n_done = next(steps)
                self._now = Covariances(files)
                yield number
                self._now = None
                _json(files, number).unlink()  # first: without it the arrays count for nothing
                for path in files.glob(f"layer-{number:05d}-*.npy"):
                    path.unlink()
        finally:
            self._now = None
            steps.close()

    def _steps(
        self, folder: Path, files: Path, names: Collection[str], tell: Callable[[str], None]
    ) -> Generator[int, None, None]:
        model = Model(self.catalogue)
        identity = of_run(model.weights.source, self.tokens, (__version__, self.pass_digest))
        large = 4 * self.tokens.size * model.family.n_embd > LARGE_STATE
        options = replace(
            self._forward, folder=folder, identity=identity, keep_seconds=KEEP_SECONDS if large else 0.0
        )  # fmt: skip
        watch = Covariance(self.catalogue, files, names=names)
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
