"""Plain values as pandas DataFrames. pandas is optional."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..base.errors import ToolError


def frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Return a DataFrame with one line per entry of `rows`. Raises ToolError if pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise ToolError("pandas is not installed; run: pip install pandas") from None
    return pandas.DataFrame(list(rows))
