"""A checkpoint in a repository on the Hub, by its headers: its small files come to Hugging Face's cache, of each shard
the header is read by range, many at a time. What is checked of a folder's headers is checked of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ...base.errors import SourceError, UnsupportedError
from ...hub import watching
from ...hub.parallel import each
from ...hub.repo import Repo
from ..catalogue import SourceTensor
from .kinds import other_names
from .quantization import MODELOPT_CONFIG
from .safetensors_dir import SINGLE, Checkpoint, open_checkpoint, read_json, read_shard, read_small
from .safetensors_header import INDEX, MAX_HEADER, check_shard, header_bytes, parse_index, parse_shard
from .shard_store import ShardStore

#: bytes of a tensor's entry in a header, beside its name: {"dtype":"F8_E4M3","shape":[…],"data_offsets":[…]}
_ENTRY = 100
#: of the rest of a header, and of what is fetched of one whose tensors no index names
_REST, _UNKNOWN = 512, 1 << 20


def open_hub(repo: Repo, beside: Iterable[str]) -> Checkpoint:
    """The checked checkpoint of a repository. `beside` are the small files that are wanted of it, where it has them.
    If all its shards are in Hugging Face's cache, it is the folder there. Raises SourceError, UnsupportedError."""
    top = {path for path in repo.files if "/" not in path}
    small = [p for p in ("config.json", INDEX, MODELOPT_CONFIG, *beside) if p in top]
    if says := other_names(top, Path()):
        raise UnsupportedError(f"{repo.where()}: {says}")
    for path in small:
        if repo.files[path].size > MAX_HEADER:
            raise SourceError(
                f"{repo.where(path)}: {repo.files[path].size:,} bytes are too many for it (at most {MAX_HEADER:,})"
            )
    if "config.json" not in top:
        raise SourceError(f"{repo.where()}: has no config.json, so it is not a checkpoint")
    folder = repo.small(small)
    if INDEX in top:
        shards = parse_index(repo.where(INDEX), read_small(folder / INDEX))
    else:
        found = [SINGLE] if SINGLE in top else sorted(p for p in top if p.endswith(".safetensors"))
        if len(found) != 1:
            what = f"{len(found)} safetensors files ({found[0]}, …) but no {INDEX}" if found else "no safetensors files"
            raise SourceError(f"{repo.where()}: a checkpoint needs {INDEX} or {SINGLE}; the repository has {what}")
        shards = {found[0]: set()}
    missing = [file for file in sorted(shards) if file not in repo.files]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{repo.where()}: shard {missing[0]}{more} of the {len(shards)} that {INDEX} names is not in the "
            f"repository at commit {repo.commit[:12]}; is its upload complete?"
        )
    if all(repo.cached(file) for file in shards):
        return open_checkpoint(folder)
    lacks = (
        f"{repo.where()}: only the headers are read from the Hub here, and this needs the weights; download it "
        f"(`hf download {repo.name}`) and give {repo.name}"
    )
    config, headers = read_json(folder / "config.json"), _headers(repo, folder, shards)
    return Checkpoint(folder, config, headers, lacks=lacks, reader=ShardStore(repo, folder))


def _headers(repo: Repo, folder: Path, shards: Mapping[str, set[str]]) -> dict[str, SourceTensor]:
    """The tensors of all shards. Raises SourceError for the first thing wrong, in the order of their names."""
    names = sorted(shards)
    tensors: dict[str, SourceTensor] = {}
    for i, here in enumerate(each(lambda file: _shard(repo, folder, file, shards), names)):
        watching.step(f"headers of {repo.name}", i + 1, len(names))
        tensors.update(here)
    return tensors


def _shard(repo: Repo, folder: Path, file: str, shards: Mapping[str, set[str]]) -> dict[str, SourceTensor]:
    """The tensors of one shard, which should be those that the index names, if there is one."""
    size, where, names = repo.files[file].size, repo.where(file), shards[file]
    here = repo.cached(file)
    if here is not None and here.stat().st_size == size:
        found = read_shard(here)
    else:
        guess = 8 + sum(len(name) + _ENTRY for name in names) + _REST if names else _UNKNOWN
        raw = read_head(where, size, guess, lambda at, n: repo.read(file, at, n))
        found = parse_shard(where, raw, size, folder / file)
    if names:
        check_shard(where, found, shards, file)
    return found


def read_head(where: str, size: int, guess: int, read: Callable[[int, int], bytes]) -> bytes:
    """The header of a file in safetensors, without its length, by `read(start, n)`: `guess` bytes first, then what is
    missing. Raises SourceError."""
    head = read(0, min(size, guess)) if size else b""
    n = header_bytes(where, head, size)
    if len(head) < 8 + n:
        head += read(len(head), 8 + n - len(head))
    return head[8 : 8 + n]
