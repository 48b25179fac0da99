"""Plain values as pandas DataFrames, where pandas is installed: nothing here needs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..base.errors import ToolError


def frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """A DataFrame with a row for each. Raises ToolError where pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise ToolError("pandas is not installed; run: pip install pandas") from None
    return pandas.DataFrame(list(rows))
