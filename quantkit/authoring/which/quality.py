"""What is known about a quantization's quality: the user's own measurements, or published statements with their
source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ...base.errors import SourceError
from ...base.files import text_within
from ...gguf.quant_names import quant_name

_MAX_BYTES = 1 << 28
_MAKERS_WORD = "its makers' word for their own file of R1 (unsloth.ai/blog/deepseekr1-dynamic, 27 January 2025)"
#: recipe -> its makers' word for their file of DeepSeek-R1
_OF_R1 = {"UD-IQ1_S": "fair", "UD-IQ1_M": "good", "UD-IQ2_XXS": "better", "UD-Q2_K_XL": "best"}
_UNKNOWN = "not measured"


class Quality(NamedTuple):
    """The known quality of a candidate."""

    text: str
    source: str
    """who says so; "" if nothing is known"""
    mean_kld: float | None = None
    """if it was measured"""


UNKNOWN = Quality(_UNKNOWN, "")


class Measured(NamedTuple):
    """The results of `quantkit eval --json`, by lower-case candidate name."""

    of: dict[str, Quality]

    def find(self, name: str) -> Quality | None:
        """The result for a candidate: by its name, or by the quantization in a file's name."""
        key = name.lower()
        if key in self.of:
            return self.of[key]
        by_quant = [q for file, q in self.of.items() if (quant_name(file) or "").lower() == key]
        return by_quant[0] if len(by_quant) == 1 else None


def published(model: str, name: str) -> Quality:
    """The published quality of a recipe on a model."""
    is_r1 = model.lower().rpartition("/")[2] == "deepseek-r1"
    return Quality(f'"{_OF_R1[name]}"', _MAKERS_WORD) if is_r1 and name in _OF_R1 else UNKNOWN


def read_measured(path: Path) -> Measured:
    """The results of `quantkit eval --json`. Raises SourceError."""
    try:
        text = text_within(path, _MAX_BYTES)
        said = None if text is None else json.loads(text)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (UnicodeDecodeError, ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or said.get("quantkit_eval") != 1:
        raise SourceError(f"{path}: is not what `quantkit eval --json` prints, of version 1; make it again")
    try:
        source = f"measured: {path.name}, {said['n_chunks']:,} chunks of {', '.join(said['texts'])}"
        found = {str(c["name"]).lower(): _quality(c, source) for c in said["candidates"]}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise SourceError(f"{path}: is damaged, or not an evaluation: {type(e).__name__} {e}; make it again") from None
    return Measured(found)


def _quality(candidate: dict[str, Any], source: str) -> Quality:
    kld, error = float(candidate["mean_kld"]), float(candidate["mean_kld_se"])
    return Quality(f"KLD {kld:.4f} ± {error:.4f}", source, kld)
