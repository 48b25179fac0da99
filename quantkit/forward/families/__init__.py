"""How the layers of each arch compute, by GGUF names: a module an arch, as llama.cpp's graph has it.

Adding one is a module like llama.py and a row in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable

from ...base.errors import UnsupportedError
from ...model.catalogue import Catalogue
from ..layer import Family
from .deepseek2 import Deepseek2
from .llama import Llama
from .qwen2 import Qwen2

FAMILIES: dict[str, Callable[[Catalogue], Family]] = {"deepseek2": Deepseek2, "llama": Llama, "qwen2": Qwen2}


def family_of(catalogue: Catalogue) -> Family:
    """The family that computes a model. Raises UnsupportedError, SourceError."""
    if catalogue.arch not in FAMILIES:
        raise UnsupportedError(
            f"{catalogue.model}: models of the arch '{catalogue.arch}' cannot be computed; there are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[catalogue.arch](catalogue)
