"""constraints.txt pins one version of each package for every Python that quantkit is for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LINES = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()]
PINS = [Requirement(line) for line in LINES if line]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_package_has_one_version(python: str) -> None:
    here = [p for p in PINS if p.marker is None or p.marker.evaluate({"python_version": python})]
    assert {name: n for name, n in Counter(p.name for p in here).items() if n > 1} == {}
    assert {p.name for p in here} == {p.name for p in PINS}
    assert all(len(p.specifier) == 1 and str(p.specifier).startswith("==") for p in here)


def test_the_oldest_python_gets_a_numpy_that_serves_it() -> None:
    """numpy 2.3 and later need 3.11."""
    (pin,) = (p for p in PINS if p.name == "numpy" and p.marker and p.marker.evaluate({"python_version": "3.10"}))
    assert pin.specifier.contains("2.2.6")
    assert not pin.specifier.contains("2.3.0")
