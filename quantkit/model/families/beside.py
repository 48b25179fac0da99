"""The small files beside the weights of a checkpoint: which are read, and what the folder is called."""

from __future__ import annotations

import re
from pathlib import Path

from ...base.errors import SourceError
from ...base.first_bytes import ENOUGH, not_json, not_the_file

#: those the metadata is made from
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
    """Raise SourceError for a file that the metadata is made from and that is not what its name says."""
    for name in READ:
        file = folder / name
        if not file.is_file():
            continue
        try:
            with open(file, "rb") as f:
                head = f.read(ENOUGH)
        except OSError as e:
            raise SourceError(f"{file}: cannot be read: {e.strerror or e}") from None
        # a model card may well begin with HTML
        says = not_json(head) if name.endswith(".json") else None if name == "README.md" else not_the_file(head)
        if says:
            raise SourceError(f"{file}: {says}")


def folder_name(folder: Path) -> str:
    """What a checkpoint's folder says the model is called: its name or, of a snapshot in Hugging Face's cache
    (models--org--repo/snapshots/<commit>), the repository's."""
    cache = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cache.startswith("models--") and _COMMIT.fullmatch(folder.name):
        org, _, repo = cache.removeprefix("models--").partition("--")
        return repo or org
    return folder.name
