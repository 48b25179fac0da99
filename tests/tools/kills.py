"""Importance matrices in the making, killed (SIGKILL) before the n-th rename or removal, then made again to the end.
For tests; prints JSON: for each n, whether the run was killed, and the SHA-256 of what is there.

    python kills.py MODEL TEXT FOLDER [--covariance] [--target]

Processes are forked, so torch is imported once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from making import make

from quantkit.lab.calibration.make_imatrix import Target

EVENTS = ("os.rename", "os.remove", "os.rmdir")


def run(model: Path, file: Path, folder: Path, flags: list[str], kill_at: int | None) -> int:
    """In a process of its own; how it ended."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0

    def hook(event: str, _args: object) -> None:
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(hook)
    code = 1
    try:
        options = {"covariance": folder / "cov"} if "--covariance" in flags else {}
        target = {"target": Target(1.0, 10**6)} if "--target" in flags else {}
        make(model, file, folder / "out.gguf", n_chunks=2, **options, **target)
        code = 0
    finally:
        os._exit(code)


def digest(folder: Path) -> dict[str, str]:
    """Of every file, but that a covariance's identity has its path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "identity")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> None:
    model, file, base, *flags = sys.argv[1:]
    out = []
    whole = Path(base) / "whole"
    whole.mkdir()
    assert run(Path(model), Path(file), whole, flags, None) == 0
    n = 0
    while True:
        n += 1
        folder = Path(base) / str(n)
        folder.mkdir()
        how = run(Path(model), Path(file), folder, flags, n)
        if how == 0:
            break
        left = digest(folder)
        # killed between the last name and the end, the output is there: nothing is left to do
        again = 0 if "out.gguf" in left else run(Path(model), Path(file), folder, flags, None)
        out.append({"n": n, "how": how, "again": again, "made": digest(folder), "left": sorted(left)})
        shutil.rmtree(folder)
    print(json.dumps({"whole": digest(whole), "kills": out}))


if __name__ == "__main__":
    main()
