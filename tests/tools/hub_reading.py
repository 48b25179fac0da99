"""What the local server that speaks the Hub's API (hub_server.py) answers to who reads: models, trees, files.

Each route is "host METHODS", a pattern of the path, and what answers. As on the Hub, a small file is redirected on
the same host (to /api/resolve-cache), a file of LFS to the other one, by an address with a signature.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from hub_repos import Commit, Repo, entry, siblings, tree

if TYPE_CHECKING:
    from hub_server import Hub, Reply, Request, Route

ID = r"(?P<repo>[^/]+/[^/]+)"
TIME = "2025-01-20T00:00:00.000Z"


class RefusalError(Exception):
    """An answer that ends the matter."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


def repo_for(hub: Hub, request: Request, name: str, files: bool = False) -> Repo:
    """The repository, if the token that came may read it, and its `files`. Raises RefusalError."""
    from hub_server import refused

    repo = hub.repos.get(name)
    token = request.token
    if token is not None and token not in hub.tokens:
        raise RefusalError(refused(401, "", "Invalid credentials in Authorization header"))
    if repo is None or (repo.private and token is None):
        raise RefusalError(refused(404 if token else 401, "RepoNotFound", "Repository not found"))
    if files and repo.gated and token not in repo.granted:
        said = f"Access to model {name} is restricted. You must have access to it and be authenticated to access it."
        raise RefusalError(refused(403 if token else 401, "GatedRepo", said))
    return repo


def commit_for(repo: Repo, revision: str) -> Commit:
    """The commit of a quoted revision. Raises RefusalError."""
    from hub_server import refused

    found = repo.at(unquote(revision))
    if found is None:
        raise RefusalError(refused(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}"))
    return found


def _model(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
    from hub_server import as_json

    repo = repo_for(hub, request, m["repo"])
    commit = commit_for(repo, m["revision"] or "main")
    blobs = request.query.get("blobs", ["false"])[0].lower() in ("true", "1")
    return as_json(
        {
            "_id": git_id(repo.id), "id": repo.id, "modelId": repo.id, "author": repo.id.partition("/")[0],
            "sha": commit.id, "lastModified": TIME, "createdAt": TIME, "private": repo.private,
            "gated": "manual" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "siblings": list(siblings(commit.files, blobs)),
        }
    )  # fmt: skip


def git_id(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()[:24]


def _tree(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
    from hub_server import as_json, refused

    commit = commit_for(repo_for(hub, request, m["repo"]), m["revision"])
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    under = unquote(m["path"] or "")
    entries = tree(commit.files, under, recursive)
    if under and not entries:
        return refused(404, "EntryNotFound", f"{under} does not exist on {m['revision']}")
    start = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if start + hub.page < len(entries):
        kept = f"recursive={recursive}&limit={hub.page}&cursor={start + hub.page}"
        headers["Link"] = f'<{hub.url}{request.path}?{kept}>; rel="next"'
    return as_json(entries[start : start + hub.page], headers=headers)


def _paths(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
    from hub_server import as_json

    commit = commit_for(repo_for(hub, request, m["repo"]), m["revision"])
    wanted = parse_qs(request.body().decode()).get("paths", [])
    found: list[dict[str, Any]] = []
    for path in wanted:
        if path in commit.files:
            found.append(entry(path, commit.files[path]))
        elif any(name.startswith(f"{path}/") for name in commit.files):
            found.append({"type": "directory", "oid": git_id(path), "size": 0, "path": path})
    return as_json(found)


def _refs(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
    from hub_server import as_json

    repo = repo_for(hub, request, m["repo"])
    branches = [(f"refs/heads/{name}", name, line[-1]) for name, line in repo.branches.items() if line]
    tags = [(f"refs/tags/{name}", name, commit) for name, commit in repo.tags.items()]
    said = {"branches": branches, "converts": [], "tags": tags}
    keys = ("ref", "name", "targetCommit")
    return as_json({kind: [dict(zip(keys, ref, strict=True)) for ref in refs] for kind, refs in said.items()})


def _commits(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
    from hub_server import as_json

    repo = repo_for(hub, request, m["repo"])
    last = commit_for(repo, m["revision"])
    line = next((ids for ids in repo.branches.values() if last.id in ids), [last.id])
    found = [repo.commits[i] for i in reversed(line[: line.index(last.id) + 1])]
    return as_json([{"id": c.id, "title": c.title, "message": "", "date": TIME, "authors": []} for c in found])


def _whoami(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
    from hub_server import as_json, refused

    if request.token not in hub.tokens:
        return refused(401, "", "Invalid credentials in Authorization header")
    return as_json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def _resolve(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
    """A file: where it is."""
    from hub_server import Reply, refused

    repo = repo_for(hub, request, m["repo"], files=True)
    commit = commit_for(repo, m["revision"])
    path = unquote(m["path"])
    blob = commit.files.get(path)
    said = {"X-Repo-Commit": commit.id}
    if blob is None:
        return refused(404, "EntryNotFound", "Entry not found", said)
    if blob.sha256 is None:
        # the address as the Hub has it, relative
        where = f"/api/resolve-cache/models/{repo.id}/{commit.id}/{quote(path, safe='')}"
        return Reply(307, headers=said | {"Location": where, "ETag": f'"{blob.oid}"'})
    said |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"', "ETag": f'"{blob.oid}"'}
    where = f"{hub.cdn_url}/{repo.id}/{quote(path)}?commit={commit.id}&signature={_signature(repo, commit, path)}"
    return Reply(302, headers=said | {"Location": where})


def _cached(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
    """A small file."""
    from hub_server import Reply, refused

    commit = commit_for(repo_for(hub, request, m["repo"], files=True), m["revision"])
    blob = commit.files.get(unquote(m["path"]))
    if blob is None:
        return refused(404, "EntryNotFound", "Entry not found")
    return Reply(200, headers={"X-Repo-Commit": commit.id, "ETag": f'"{blob.oid}"'}, blob=blob)


def _stored(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
    """A file of LFS on the second host, for who has the signature."""
    from hub_server import Reply, refused

    repo = hub.repos.get(m["repo"])
    commit = repo.commits.get(request.query.get("commit", [""])[0]) if repo else None
    path = unquote(m["path"])
    if repo is None or commit is None or path not in commit.files:
        return refused(404, "", "no such object")
    if request.query.get("signature") != [_signature(repo, commit, path)]:
        return refused(403, "", "the address is not signed")
    blob = commit.files[path]
    return Reply(200, headers={"ETag": f'"{blob.sha256}"'}, blob=blob)


def _signature(repo: Repo, commit: Commit, path: str) -> str:
    return hashlib.sha256(f"a secret {repo.id} {commit.id} {path}".encode()).hexdigest()[:32]


def _guarded(handler: Any) -> Any:
    def answer(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        try:
            reply: Reply = handler(hub, request, m)
        except RefusalError as e:
            return e.reply
        return reply

    return answer


ROUTES: list[Route] = [
    (methods, re.compile(pattern), _guarded(handler))
    for methods, pattern, handler in [
        ("hub GET", rf"/api/models/{ID}(/revision/(?P<revision>[^/]+))?", _model),
        ("hub GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", _tree),
        ("hub POST", rf"/api/models/{ID}/paths-info/(?P<revision>[^/]+)", _paths),
        ("hub GET", rf"/api/models/{ID}/refs", _refs),
        ("hub GET", rf"/api/models/{ID}/commits/(?P<revision>[^/]+)", _commits),
        ("hub GET", r"/api/whoami-v2", _whoami),
        ("hub GET|HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
        (
            "hub GET|HEAD",
            r"/api/resolve-cache/models/(?P<repo>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<path>.+)",
            _cached,
        ),
        ("cdn GET|HEAD", rf"/{ID}/(?P<path>.+)", _stored),
    ]
]
