"""SOURCE on the Hub: a repository that is a checkpoint, or a GGUF in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..base.errors import SourceError, UnsupportedError
from ..base.text import size as size_text
from ..gguf.shards import split_name
from ..hub import address
from ..hub.address import Address
from ..hub.repo import Repo, open_repo
from .catalogue import Catalogue
from .families.beside import READ
from .sources.gguf_file import GgufHeaders
from .sources.hub_repo import open_hub
from .sources.remote import open_remote
from .sources.safetensors_dir import Checkpoint, open_checkpoint
from .sources.shard_store import store_of

_MAX_LISTED = 24


def open_address(source: str) -> Checkpoint | GgufHeaders:
    """What an address on the Hub names: a repository's checkpoint, or the headers of a GGUF. Raises SourceError, with
    the GGUFs to choose from."""
    where = address.parse(source)
    if _is_offline() and not address.is_gguf(source):
        return _from_cache(where)
    repo = open_repo(where)
    gguf = source if address.is_gguf(source) else _gguf(repo, where)
    if gguf is not None:
        return open_remote(gguf, repo)
    found = open_hub(repo, READ)
    found.commit = repo.commit
    return found


def gguf_address(source: str) -> str:
    """The address of the GGUF that an address names: of itself, or of the only one in a repository or folder, at the
    commit that it is now. Raises SourceError for a checkpoint, and where there is a choice."""
    if not address.is_hub(source) or address.is_gguf(source):
        return source
    where = address.parse(source)
    repo = open_repo(where)
    found = _gguf(repo, where._replace(revision=repo.commit))
    if found is None:
        raise UnsupportedError(f"{source}: is a checkpoint, and a GGUF is wanted; of a model give it with --model")
    return found


def _gguf(repo: Repo, where: Address) -> str | None:
    """The address of the only GGUF in a repository or a folder of it; None for a checkpoint."""
    top = {path for path in repo.files if "/" not in path}
    if where.path or not any(path.endswith(".safetensors") for path in top):
        ggufs = _ggufs(repo, where.path)
        if len(ggufs) == 1:
            return str(where._replace(path=next(iter(ggufs))))
        if ggufs:
            raise SourceError(_choice(repo, ggufs))
    if where.path:
        kind = "a file that is no GGUF" if where.path in repo.files else "no file or folder with a GGUF"
        raise SourceError(
            f"{where}: is {kind}; give a whole repository with a checkpoint, {repo.where()}, or the address of a .gguf"
        )
    if "config.json" not in top:
        raise SourceError(f"{repo.where()}: holds neither a checkpoint (config.json) nor a GGUF")
    return None


def _ggufs(repo: Repo, folder: str) -> dict[str, int]:
    """The GGUFs of models in a folder and those below, first shards only, each with the bytes of all its shards."""
    found: dict[str, int] = {}
    for path, file in sorted(repo.files.items()):
        above, _, name = path.rpartition("/")
        if not name.lower().endswith(".gguf") or not (f"{above}/").startswith(f"{folder}/" if folder else ""):
            continue
        if name.lower().startswith("mmproj") or "imatrix" in name.lower():
            continue
        parts = split_name(name)
        key = (above, parts.prefix, parts.n_shards) if parts else None
        first = next((p for p in found if key and _set_of(p) == key), None)
        if first is not None:
            found[first] += file.size
        elif parts is None or parts.no == 1:
            found[path] = file.size
    return found


def _set_of(path: str) -> tuple[str, str, int] | None:
    above, _, name = path.rpartition("/")
    parts = split_name(name)
    return (above, parts.prefix, parts.n_shards) if parts else None


def _choice(repo: Repo, ggufs: dict[str, int]) -> str:
    lines = [f"{repo.where(path)}  ({size_text(nbytes)})" for path, nbytes in ggufs.items()]
    more = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    said = f"{repo.where()}: holds {len(lines)} GGUFs; give the address of one, or of a folder with one:"
    return "\n".join([said, *lines[:_MAX_LISTED], *more])


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _from_cache(where: Address) -> Checkpoint:
    found = downloaded(where.repo, where.revision) if not where.path else None
    if found is None:
        raise SourceError(
            f"{where}: HF_HUB_OFFLINE is set, and it is not in Hugging Face's cache; unset it, or download it first"
        )
    return open_checkpoint(found)


def downloaded(repo: str, revision: str | None = None) -> Path | None:
    """The snapshot of a Hugging Face repository in the local cache, or None. Never downloads."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:  # not in the cache, or not a repository id
        return None


def with_weights(catalogue: Catalogue, by_range: bool = False) -> Catalogue:
    """The same catalogue, for who reads the weights of a repository shard by shard (sources.shard_store), or a few of
    them by range; of other sources as it is."""
    store = None if catalogue.headers is None else store_of(catalogue.headers)
    if store is not None:
        store.by_range = by_range
    return catalogue if store is None else replace(catalogue, source=catalogue.headers, headers=None, lacks="")


def with_layers(catalogue: Catalogue) -> Catalogue:
    """`with_weights` for what is computed layer by layer, with shards on demand (sources.on_demand). A GGUF on the Hub
    stays as it is: what needs its weights says that it must be downloaded."""
    return with_weights(catalogue) if isinstance(catalogue.headers, Checkpoint) else catalogue


def gguf_headers(source: str) -> GgufHeaders:
    """The headers of the GGUF that an address names. Raises SourceError for a checkpoint."""
    if not address.is_hub(source):
        return open_remote(source)
    found = open_address(gguf_address(source))
    assert isinstance(found, GgufHeaders)
    return found
