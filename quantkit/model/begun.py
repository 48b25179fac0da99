"""The commit at which a download into a folder began, until its files are whole: a small file in that folder, so that
the same command does not mix two commits of a repository unseen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..base.errors import OutputError, ResumeError
from ..base.files import text_within
from ..base.outputs import write_text
from ..hub.repo import Repo

_MOST = 1 << 24


class Begun(NamedTuple):
    commit: str
    files: Mapping[str, str | None]
    """path -> the hash that it has at the commit; those that are not whole yet"""


def place(repo: Repo, folder: Path) -> Path:
    return folder / f".quantkit-download-{repo.name.replace('/', '--')}.json"


def check(repo: Repo, paths: Sequence[str], folder: Path, force: bool) -> str:
    """A note where the repository has moved since the download began, and the files have not, or it begins anew; else
    "". Raises ResumeError, with both commits, where they have and `force` is not given."""
    begun = _read(place(repo, folder))
    if begun is None or begun.commit == repo.commit:
        return ""
    moved = f"{repo.where()}: the download began at commit {begun.commit}, and the repository is at {repo.commit} now"
    others = changed(repo, paths, folder)
    if not others:
        same = any(path in begun.files for path in paths)
        return f"{moved}; {'its files here are the same' if same else 'other files are wanted'}: going on"
    if force:
        return f"{moved}; {len(others):,} of its files are fetched anew"
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    raise ResumeError(
        f"{moved}, with other content of {', '.join(others[:3])}{more}; "
        f"give --revision {begun.commit} to go on with the old one, or --force for the new one"
    )


def changed(repo: Repo, paths: Sequence[str], folder: Path) -> list[str]:
    """Those of the files that were on their way, and have other content now."""
    begun = _read(place(repo, folder))
    known = {} if begun is None else begun.files
    return [path for path in paths if path in known and known[path] != repo.files[path].expected]


def write(repo: Repo, paths: Sequence[str], folder: Path) -> None:
    """Note that these files are on their way; with none, that nothing is. Files of other runs stay noted, if they are
    the same now. Raises OutputError."""
    at = place(repo, folder)
    begun = _read(at)
    files = {path: repo.files[path].expected for path in paths}
    if begun is not None:
        files |= {p: sha for p, sha in begun.files.items() if p in repo.files and repo.files[p].expected == sha}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder}: cannot be made: {e.strerror or e}") from None
    said = {"quantkit_download_begun": 1, "repository": repo.name, "commit": repo.commit, "files": files}
    write_text(at, json.dumps(said, indent=1), replace=True)


def end(repo: Repo, paths: Sequence[str], folder: Path) -> None:
    """These files are whole. Raises OutputError."""
    at = place(repo, folder)
    begun = _read(at)
    if begun is None:
        return
    left = [path for path in begun.files if path not in paths and path in repo.files]
    try:
        at.unlink()
    except OSError as e:
        raise OutputError(f"{at}: cannot be removed: {e.strerror or e}; remove it") from None
    if left:
        write(repo, left, folder)


def _read(at: Path) -> Begun | None:
    """What is noted; None for nothing, and for what is damaged: every file is checked by its hash all the same."""
    try:
        said = json.loads(text_within(at, _MOST) or "")
        commit, files = said["commit"], said["files"]
        if isinstance(commit, str) and isinstance(files, dict):
            return Begun(commit, files)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
