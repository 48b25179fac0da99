"""Recognizing, by its first bytes, a file that is not what its name says: a Git LFS pointer, a web page, text with a
byte-order mark.

    version https://git-lfs.github.com/spec/v1
    oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
    size 4302350824

is the whole file that `git clone` without git-lfs leaves for a file kept in Git LFS.
"""

from __future__ import annotations

import re

#: how many bytes suffice
ENOUGH = 1024
_POINTER = re.compile(rb"version https?://(?:git-lfs\.github\.com|hawser\.github\.com|git-media\.io)/\S+\s")
_SIZE = re.compile(rb"^size ([0-9]{1,18})\s*$", re.MULTILINE)
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html)\b", re.IGNORECASE)
_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def not_the_file(head: bytes) -> str | None:
    """Explain what a file is instead, and how to get the right one, from its first `ENOUGH` bytes: a sentence to follow
    its name and a colon. None if nothing looks wrong."""
    if _POINTER.match(head):
        size = _SIZE.search(head)
        has = f"; the file itself has {int(size[1]):,} bytes" if size else ""
        return f"is a Git LFS pointer, not the file{has}: in the repository's folder, run `git lfs pull`"
    if _PAGE.match(head):
        return "is a web page, not the file: download the file itself, not the page that shows it"
    return None


def not_json(head: bytes) -> str | None:
    """Do the same for a JSON file, which may not begin with a byte-order mark either."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return f"begins with the byte-order mark of {encoding}, which JSON has not; save it as UTF-8 without one"
    return not_the_file(head)
