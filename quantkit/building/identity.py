"""Describes everything a build is made of, in comparable words: a build resumes only if all of it is the same.

Each entry is a name and a readable line, with a short digest where the line alone would not be enough. Sources are
identified by size, time and header, not by content: reading 688 GB to resume would cost as much as resuming saves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from .. import kernels
from ..base.errors import ResumeError, SourceError
from ..base.files import file_sha256
from ..gguf.header import ARRAY, KV, array_head, decode
from ..model.sources.shard_store import store_of
from ..planning.plan import Plan
from ..rounding.options import VERSION as ROUNDING_VERSION
from .supply import check_not_moved, identity_of_source

_HEAD_BYTES = 1 << 16
#: prefix of the entries for metadata keys
_KEY = "metadata "
_MAX_VALUE = 80


class FileStat(NamedTuple):
    """The properties by which a change of a file is detected."""

    nbytes: int
    mtime_ns: int
    inode: int


def short(*parts: bytes | str) -> str:
    """12 hex digits of SHA-256 over the parts."""
    h = hashlib.sha256()
    for p in parts:
        raw = p.encode("utf-8", "surrogateescape") if isinstance(p, str) else p
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.hexdigest()[:12]


def stat_of(path: Path) -> FileStat:
    """Stat a file. Raises SourceError if it is gone."""
    try:
        s = os.stat(path)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read any more: {e.strerror or e}") from None
    return FileStat(s.st_size, s.st_mtime_ns, s.st_ino)


def check_unchanged(before: Mapping[Path, FileStat]) -> None:
    """Raise SourceError if a file has changed."""
    for path, was in before.items():
        now = stat_of(path)
        if now != was:
            what = f"had {was.nbytes:,} bytes and has {now.nbytes:,}" if now.nbytes != was.nbytes else "was written to"
            raise SourceError(
                f"{path}: changed during the build: it {what}; put it back as it was, or start again with --restart"
            )


def identity_of(plan: Plan, kvs: Iterable[KV], split_max_size: int | None, imatrix: Path | None) -> dict[str, str]:
    """Return everything that the bytes of a build depend on. Raises SourceError or OSError for files that are gone."""
    catalogue = plan.catalogue
    assert catalogue.source is not None
    items = list(kvs)
    types = [f"{t.tensor.name} {t.type}" for t in plan.tensors]
    rows = [repr((t.tensor.name, t.tensor.shape, t.tensor.parts)) for t in plan.tensors]
    policy = f", policy {plan.policy.text}" if plan.applied else ""
    out = {
        "recipe": f"{plan.recipe.name} (types {short(*types)})",
        "model": f"{catalogue.arch}, {len(types)} tensors (rows {short(*rows)})",
        "metadata": short(*(b"%s %d %s" % (i.key.encode(), i.type, i.payload) for i in items)),
        "layout": f"{catalogue.layout}, "
        + ("one file" if split_max_size is None else f"shards of at most {split_max_size:,} bytes"),
        "imatrix": ("of the pass" if plan.weights_in_pass else "none")
        if imatrix is None
        else f"{imatrix.name} (sha256 {file_sha256(imatrix)[:12]}){policy}",
        "kernels": kernels.version(),
        **_rounding(plan),
    }
    store = store_of(catalogue.source)
    if store is not None:
        out |= identity_of_source(store)
    for path in () if store is not None else catalogue.source.files:
        s = stat_of(path)
        when = datetime.fromtimestamp(s.mtime_ns / 1e9, timezone.utc).isoformat(sep=" ")[:23]
        with open(path, "rb") as f:
            head = f.read(_HEAD_BYTES)
        out[f"source {path.name}"] = f"{s.nbytes:,} bytes of {when} (head {short(head, str(s.mtime_ns))})"
    return out | {_KEY + i.key: _value(i) for i in items}


def _rounding(plan: Plan) -> dict[str, str]:
    """Entries for roundings other than ggml's; empty if there are none."""
    rounding = plan.rounding
    if rounding is None or rounding.covariance is None:
        return {}
    listed, covariance = rounding.listed(), rounding.covariance
    if not listed:
        return {}
    policy = "" if rounding.policy is None else f", policy {rounding.policy.name} ({rounding.policy.digest})"
    on = "" if rounding.device is None else f", on {rounding.device.text}"
    weights = f", weights {covariance.weighting}" if covariance.weighting else ""
    judge = "" if covariance.held_out is None else f", held-out {covariance.held_out.digest[:12]}"
    said = covariance.name if rounding.in_pass else f"{covariance.n_tokens:,} tokens"
    return {
        "rounding": f"{rounding.options}{policy}{on} (method {ROUNDING_VERSION}, tensors {short(*listed)})",
        "covariance": f"{said}{weights} (sha256 {covariance.digest[:12]}{judge})",
    }


def _value(item: KV) -> str:
    """A key's value: itself if it is short, else its beginning or its length, and a digest."""
    digest = short(item.payload)
    if item.type == ARRAY:
        return f"{array_head(item)[1]:,} values ({digest})"
    text = repr(decode(item))
    return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 20]}… ({digest})"


def difference(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The differences in words; '' if there are none. Metadata is listed key by key if both sides have the keys."""
    names = [n for n in {**was, **now} if was.get(n) != now.get(n)]
    keys = [n for n in names if n.startswith(_KEY)]
    if len(keys) == len(names):  # `metadata` is equal; the keys only show where it differs
        return ""
    by_key = keys and all(any(n.startswith(_KEY) for n in side) for side in (was, now))
    names = [n for n in names if (n != "metadata" if by_key else n not in keys)]
    shown = [f"{n} was {was.get(n, 'absent')}, is {now.get(n, 'absent')}" for n in names[:3]]
    return "; ".join(shown) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def require_same(folder: Path, was: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ResumeError with the differences, unless the unfinished build in a folder is made of the same."""
    check_not_moved(was, now)
    differs = difference(was, now)
    if differs:
        raise ResumeError(
            f"{folder}: is an unfinished build of something else: {differs}; start again with --restart, or give "
            "another output"
        )
