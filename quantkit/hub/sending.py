"""Files into a repository on the Hub, in one commit: what is there is not sent, and nothing is replaced unasked.

Large files go to the Hub's storage first, one after the other; what has arrived is not sent again, so that the same
call goes on after whatever ended it. The commit names the one before it, so that a change in between is seen.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from ..base.errors import OutputError, SourceError
from .address import Address
from .patience import PassingError, asked_wait, failures_of_session, persist
from .repo import RemoteFile, Repo, client, open_repo, quiet

T = TypeVar("T")
_CHUNK = 1 << 20
#: a file that a repository keeps unless it is to be replaced
KEPT = "README.md"
_REFUSED = {
    401: "the server does not know the token; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; check the name, and make a token with write access",
    404: "there is no such repository; check the name",
    413: "the server says that it is too large",
}


class Item(NamedTuple):
    """A file by its name in the repository: its bytes, or where they are."""

    name: str
    content: Path | bytes

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


class Told(Protocol):
    """Who is told how it goes."""

    def hashed(self, item: Item, n: int) -> None:
        """`n` bytes more of it."""

    def sending(self, item: Item) -> None: ...
    def note(self, sentence: str) -> None: ...


@dataclass(frozen=True)
class Wish:
    to: Address
    """the repository, and the branch if not main"""
    public: bool = False
    force: bool = False
    bars: bool = False
    """huggingface_hub's own, of each large file"""
    expected: Mapping[str, Sequence[tuple[Path, str]]] = field(default_factory=dict)
    """name -> what papers say its SHA-256 is, each with the paper"""

    @property
    def where(self) -> str:
        return str(self.to)


class Sent(NamedTuple):
    """What was done. `commit` is the one that has all files; `url` where people look at it."""

    commit: str
    url: str
    sent: tuple[str, ...]
    skipped: tuple[str, ...]
    kept: tuple[str, ...]


def send(items: Sequence[Item], wish: Wish, told: Told) -> Sent:
    """Put all items into the repository, which is made if need be. Raises OutputError: nothing is in the repository
    then that was not in it."""
    from huggingface_hub import get_token

    if not get_token():
        raise OutputError(f"{wish.where}: sending needs a token; log in with `hf auth login`, or set HF_TOKEN")
    repo = _look(wish, told)
    there_now = {} if repo is None else repo.files
    sized = [i for i in items if i.name in there_now and there_now[i.name].size != i.nbytes]
    _refuse_others(wish, [item for item in sized if item.name != KEPT])  # before hours of hashing
    digests = {item.name: _hashed(item, there_now.get(item.name), told) for item in items}
    _check_papers(wish, digests)
    there = {i.name for i in items if _is_there(there_now.get(i.name), digests[i.name])}
    kept = {KEPT} & there_now.keys() - there if not wish.force else set()
    new = [item for item in items if item.name not in there | kept]
    _refuse_others(wish, [item for item in new if item.name in there_now])
    if repo is None or new:
        repo = _made(wish, repo)
        commit = _commit(wish, repo, new, digests, told)
    else:
        commit = repo.commit
    skipped = tuple(item.name for item in items if item.name in there)
    url = f"{client().endpoint}/{wish.to.repo}"
    return Sent(commit, url, tuple(item.name for item in new), skipped, tuple(kept))


def _look(wish: Wish, told: Told) -> Repo | None:
    """The repository as it is, at the branch; None where there is none, or no such branch. Raises OutputError for a
    public one where that was not asked for."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = client()

    def info() -> Any:
        try:
            return api.model_info(wish.to.repo)
        except RepositoryNotFoundError:
            return None

    def at_branch() -> Repo | None:
        try:
            api.model_info(wish.to.repo, revision=wish.to.revision)
        except RevisionNotFoundError:
            return None
        return open_repo(wish.to)

    found = _do(wish.where, info)
    if found is None:
        return None
    if not found.private and not wish.public:
        raise OutputError(f"{wish.where}: the repository is public; give --public to publish there all the same")
    if found.private and wish.public:
        told.note(f"{wish.where} is private and stays so; its settings on the Hub change that")
    return _do(wish.where, at_branch)


def _made(wish: Wish, repo: Repo | None) -> Repo:
    """The repository with its branch, made if it is not there."""
    if repo is not None:
        return repo
    api = client()
    _do(wish.where, lambda: api.create_repo(wish.to.repo, private=not wish.public, exist_ok=True))
    if wish.to.revision is not None:
        _do(wish.where, lambda: api.create_branch(wish.to.repo, branch=wish.to.revision, exist_ok=True))
    return _do(wish.where, lambda: open_repo(wish.to))


def _refuse_others(wish: Wish, others: Sequence[Item]) -> None:
    if others and not wish.force:
        names = ", ".join(item.name for item in others[:5]) + (
            f" and {len(others) - 5} more" if len(others) > 5 else ""
        )
        raise OutputError(
            f"{wish.where}: has {names} already, with other content; give --force to replace "
            f"{'it' if len(others) == 1 else 'them'}, or another repository"
        )


def _hashed(item: Item, remote: RemoteFile | None, told: Told) -> tuple[str, str | None]:
    """The SHA-256 of an item, and the hash that the repository would have of it if it is there without one."""
    sha256 = hashlib.sha256()
    other = remote.digest() if remote is not None and remote.sha256 is None else None
    for chunk in _chunks(item):
        sha256.update(chunk)
        if other is not None:
            other.update(chunk)
        told.hashed(item, len(chunk))
    return sha256.hexdigest(), None if other is None else other.hexdigest()


def _chunks(item: Item) -> Any:
    if isinstance(item.content, bytes):
        yield item.content
        return
    try:
        with open(item.content, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as e:
        raise SourceError(f"{item.content}: cannot be read: {e.strerror or e}") from None


def _is_there(remote: RemoteFile | None, digests: tuple[str, str | None]) -> bool:
    return remote is not None and remote.expected is not None and remote.expected in digests


def _check_papers(wish: Wish, digests: Mapping[str, tuple[str, str | None]]) -> None:
    for name, said in wish.expected.items():
        for paper, digest in said:
            if name in digests and digest != digests[name][0]:
                raise OutputError(
                    f"{paper}: says another SHA-256 of {name} than it has; make it again, or move it elsewhere"
                )


def _commit(
    wish: Wish, repo: Repo, new: Sequence[Item], digests: Mapping[str, tuple[str, str | None]], told: Told
) -> str:
    """Send the items, and make the commit that has them; its id."""
    from huggingface_hub import CommitOperationAdd

    api = client()
    additions = []
    for item in new:
        content = item.content if isinstance(item.content, bytes) else str(item.content)
        addition = CommitOperationAdd(item.name, content)
        info: Any = addition.upload_info
        if not getattr(info, "is_hashed", True):
            info.sha256 = bytes.fromhex(digests[item.name][0])
        additions.append(addition)
    for item, addition in zip(new, additions, strict=True):
        told.sending(item)
        one = [addition]
        _do(
            f"{wish.where}/{item.name}",
            lambda one=one: api.preupload_lfs_files(  # type: ignore[misc]
                wish.to.repo, one, revision=wish.to.revision, free_memory=False
            ),
            wish.bars,
            stores=True,
        )

    def is_all_there(now: Repo) -> bool:
        return all(_has(now.files.get(item.name), item, digests[item.name][0]) for item in new)

    def commit() -> str:
        now = open_repo(wish.to)
        if now.commit != repo.commit:
            if is_all_there(now):  # the answer to the last try was lost
                return now.commit
            raise OutputError(
                f"{wish.where}: has got commit {now.commit[:12]} meanwhile; give the same command again, which sends "
                "nothing twice"
            )
        made = api.create_commit(
            wish.to.repo,
            additions,
            commit_message=_title(new),
            revision=wish.to.revision,
            parent_commit=repo.commit,
        )
        return str(made.oid)

    made = _do(wish.where, commit)
    if not is_all_there(now := open_repo(wish.to)):
        missing = ", ".join(
            item.name for item in new if not _has(now.files.get(item.name), item, digests[item.name][0])
        )
        raise OutputError(f"{wish.where}: the commit lacks {missing}; look at the repository's .gitignore")
    return made


def _has(remote: RemoteFile | None, item: Item, sha256: str) -> bool:
    """Whether the repository has an item."""
    if remote is None or remote.size != item.nbytes:
        return False
    if remote.sha256 is not None:
        return remote.sha256 == sha256
    digest = remote.digest()
    for chunk in _chunks(item):
        digest.update(chunk)
    return bool(remote.expected == digest.hexdigest())


def _title(new: Sequence[Item]) -> str:
    first = next((item.name for item in new if item.name != KEPT), KEPT)
    return f"Publish {first}" + (f" and {len(new) - 1} more" if len(new) > 1 else "")


def _do(where: str, call: Callable[[], T], bars: bool = False, stores: bool = False) -> T:
    """What a request returns, with patience. `stores` says that it puts a large file into the Hub's storage, of which a
    part may have been damaged on its way. Raises OutputError in one sentence."""

    def asked() -> T:
        try:
            return call()
        except (SourceError, OutputError, PassingError):
            raise
        except Exception as e:
            # huggingface_hub puts its own around what happens to a large file
            cause = e.__cause__ if type(e) is RuntimeError and e.__cause__ else e
            raise (_damage(cause) if stores else None) or _meaning(where, cause) from None

    try:
        with quiet(None, bars), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return persist(where, asked)
    except SourceError as e:
        raise OutputError(str(e)) from None


def _damage(e: BaseException) -> PassingError | None:
    """A part whose ETag is missing or not that of the part: sent again, it may be whole."""
    if type(e) is ValueError and "etag" in str(e).lower():
        return PassingError("the Hub's storage does not say what it got")
    status = getattr(getattr(e, "response", None), "status_code", None)
    return PassingError("the Hub's storage got something else than was sent") if status == 400 else None


def _meaning(where: str, e: BaseException) -> BaseException:
    answer: Any = getattr(e, "response", None)
    status = getattr(answer, "status_code", None)
    if isinstance(status, int):
        if status == 412:
            return PassingError("the repository was changed meanwhile")
        if urlsplit(str(answer.url)).netloc != urlsplit(client().endpoint).netloc and status in (400, 403, 404):
            return PassingError(f"the Hub's storage answers {status}", asked_wait(answer.headers))
        if status in _REFUSED:
            return OutputError(f"{where}: the server answers {status}: {_REFUSED[status]}")
        if status in (408, 425, 429) or status >= 500:
            return PassingError(f"the server answers {status}", asked_wait(answer.headers))
        return OutputError(f"{where}: the server answers {status}: it refuses what was sent")
    if isinstance(e, failures_of_session()):
        return PassingError(f"cannot be sent: {str(e).split(chr(10))[0] or type(e).__name__}")
    if type(e) is ValueError:
        return OutputError(f"{where}: {' '.join(str(e).split())[:600]}")
    return e
