"""Values from config.json, each checked for type and range, with the model's name in every error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...base.errors import SourceError

_LARGEST = 1 << 24
_LARGEST_FLOAT = 3.4e38


class Config:
    """A config.json. `int_`, `float_`, … raise SourceError if a value is missing or invalid."""

    def __init__(self, model: str, values: Mapping[str, Any], prefix: str = "") -> None:
        self.model = model
        self.values = values
        self.prefix = prefix

    def fail(self, key: str, why: str) -> SourceError:
        """Return the error for an invalid value."""
        return SourceError(f"{self.model}: config.json: {self.prefix}{key} {why}; get the model's own config.json")

    def int_(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        if type(value) is not int or not least <= value < _LARGEST:
            raise self.fail(key, f"is {value!r:.60}, not an integer from {least} to {_LARGEST - 1}")
        return value

    def optional_int(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.int_(key)

    def first(self, keys: Sequence[str]) -> str | None:
        """Return the first of several spellings of a key that exists; None if none does or its value is null."""
        key = next((k for k in keys if k in self.values), None)
        return None if key is None or self.values[key] is None else key

    def first_int(self, keys: Sequence[str], least: int = 1) -> int | None:
        key = self.first(keys)
        return None if key is None else self.int_(key, least=least)

    def float_(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        # `not <=` instead of `>`, so that NaN is refused too
        if type(value) not in (int, float) or not abs(value) <= _LARGEST_FLOAT:
            raise self.fail(key, f"is {value!r:.60}, not a number that float32 holds")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.float_(key, default)
        if value <= 0:
            raise self.fail(key, f"is {value:g}, not above 0")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, f"is {value!r:.60}, not true or false")
        return bool(value)

    def section(self, key: str) -> Config | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, f"is {value!r:.60}, not an object")
        return Config(self.model, value, f"{self.prefix}{key}.")
