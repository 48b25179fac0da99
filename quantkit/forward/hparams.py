"""The numbers of a model that its computation follows from, out of a GGUF's metadata."""

from __future__ import annotations

import math
from typing import Any

from ..base.errors import SourceError
from ..gguf.header import decode
from ..model.catalogue import Catalogue


class Hparams:
    """Metadata of one arch by the keys that follow its name. Raises SourceError where a key is missing or mistyped."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.model = catalogue.model
        self.arch = catalogue.arch
        self.n_tensors = len(catalogue.tensors)
        self._values: dict[str, Any] = {
            item.key.removeprefix(f"{catalogue.arch}."): decode(item)
            for item in catalogue.kvs
            if item.key.startswith(f"{catalogue.arch}.")
        }

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def _get(self, key: str, kind: tuple[type, ...], default: Any) -> Any:
        value = self._values.get(key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # a number for each layer, alike in all
        if value is None:
            raise SourceError(f"{self.model}: the metadata has no {self.arch}.{key}, which computing the model needs")
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise SourceError(f"{self.model}: {self.arch}.{key} is {value!r:.60}, which is not what this key holds")
        return value

    def int_(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = int(self._get(key, (int,), default))
        if value < least:
            raise SourceError(f"{self.model}: {self.arch}.{key} is {value:,}; it must be at least {least}")
        return value

    def float_(self, key: str, default: float | None = None, above: float | None = None) -> float:
        value = float(self._get(key, (int, float), default))
        if not math.isfinite(value) or (above is not None and value <= above):
            bound = "finite" if above is None else f"finite and above {above:g}"
            raise SourceError(f"{self.model}: {self.arch}.{key} is {value:g}; it must be {bound}")
        return value

    def layers(self) -> int:
        """block_count without the layers of multi-token prediction behind the last one."""
        n_all, n_mtp = self.int_("block_count"), self.int_("nextn_predict_layers", 0, least=0)
        if n_mtp >= n_all or n_all > self.n_tensors:
            raise SourceError(
                f"{self.model}: {self.arch}.block_count is {n_all:,} and nextn_predict_layers {n_mtp:,}, but there are "
                f"{self.n_tensors:,} tensors; that is no model"
            )
        return n_all - n_mtp

    def flag(self, key: str) -> bool:
        return bool(self._get(key, (bool,), False))

    def text(self, key: str, default: str) -> str:
        return str(self._get(key, (str,), default))
