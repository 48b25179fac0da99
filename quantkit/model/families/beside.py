"""The small files beside a checkpoint's weights: which are read, and the model's name from the folder."""

from __future__ import annotations

import re
from pathlib import Path

from ...base.errors import SourceError
from ...base.first_bytes import ENOUGH, not_json, not_the_file

#: the files from which the metadata is made
READ = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "README.md",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_files(folder: Path) -> None:
    """Raise SourceError if a file from which the metadata is made is not what its name says."""
    for name in READ:
        file = folder / name
        if not file.is_file():
            continue
        try:
            with open(file, "rb") as f:
                head = f.read(ENOUGH)
        except OSError as e:
            raise SourceError(f"{file}: cannot be read: {e.strerror or e}") from None
        # a model card may start with HTML
        says = not_json(head) if name.endswith(".json") else None if name == "README.md" else not_the_file(head)
        if says:
            raise SourceError(f"{file}: {says}")


def folder_name(folder: Path) -> str:
    """Return the model's name from a checkpoint's folder: the folder's name, or for a snapshot in Hugging Face's cache
    (models--org--repo/snapshots/<commit>) the repository's."""
    cache = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cache.startswith("models--") and _COMMIT.fullmatch(folder.name):
        org, _, repo = cache.removeprefix("models--").partition("--")
        return repo or org
    return folder.name
