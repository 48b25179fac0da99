"""An environment in which a package is not installed."""

from __future__ import annotations

import os
from pathlib import Path

_SITE = """\
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def without(folder: Path, name: str) -> dict[str, str]:
    """What to add to the environment of a child; `folder` gets what makes the package unfindable."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE.format(name=name))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
