"""What llama-quantize chooses for each tensor of a mixture, and what quantkit does."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from conftest import Tools

from quantkit.gguf.types import QTYPES, fitting_type
from quantkit.model.catalogue import Catalogue
from quantkit.planning.mixtures import facts, mixture_types


def dry_run(
    tools: Tools, model: Path, file_type: str, imatrix: Path | None, options: Sequence[str] = ()
) -> dict[str, str]:
    """The type that llama-quantize gives each tensor, shape fallback included; `options` are those of its command."""
    command = [
        str(tools.quantize),
        "--dry-run",
        *(["--imatrix", str(imatrix)] if imatrix else []),
        *options,
        str(model),
        file_type,
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    line = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[[^\]]*\], type =\s*(\S+),.*?(?:\((\w+)\))?$", re.M)
    return {m[1]: (m[3] or m[2]).upper() for m in line.finditer(done.stdout + done.stderr)}


def our_types(c: Catalogue, file_type: str, has_imatrix: bool, version: str = "current") -> dict[str, str]:
    types = mixture_types(file_type, c.tensors, facts(c, has_imatrix, version))
    asked = {t.name: next(types) if t.quantizable else t.source_type for t in c.tensors}
    return {t.name: fitting_type(QTYPES[asked[t.name]], t.n_cols).name for t in c.tensors}
