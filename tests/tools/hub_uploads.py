"""What the local server of the Hub's API (hub_server.py) needs to take files: `add_uploads(hub)` adds the routes.

Repositories are made (private or not), branches too; large files go to the second host by a signed address without a
token, in parts if they are large, and are checked there by their SHA-256; a commit names its parent and is refused
with 412 where that is not the last one. A token in `hub.readers` may read only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from hub_reading import ID, repo_for
from hub_repos import LFS_BYTES, LFS_SUFFIXES, Blob, Repo, blob_of, git_sha1

if TYPE_CHECKING:
    from hub_server import Hub, Reply, Request, Route

Answer = Callable[["Hub", "Request", "re.Match[str]"], "Reply"]


class Uploads:
    """The server's storage. `part` bytes are a part of a large file; `readers` are tokens that may not write."""

    def __init__(self, hub: Hub, part: int = 1 << 20) -> None:
        assert hub.store is not None
        self.store, self.part, self.readers = hub.store, part, set[str]()
        self.put: list[tuple[str, int]] = []
        """the large files, or their parts, that came: SHA-256 and bytes"""
        self.sizes: dict[str, int] = {}
        self.store.mkdir(parents=True, exist_ok=True)
        routes: list[tuple[str, str, Answer]] = [
            ("hub POST", r"/api/repos/create", self._create),
            ("hub POST", rf"/api/models/{ID}/branch/(?P<branch>[^/]+)", self._branch),
            ("hub POST", r"/api/validate-yaml", self._yaml),
            ("hub POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)", self._preupload),
            ("hub POST", rf"/{ID}\.git/info/lfs/objects/batch", self._batch),
            ("hub POST", rf"/{ID}\.git/info/lfs/objects/verify", self._verify),
            ("hub POST", r"/complete/(?P<oid>[0-9a-f]{64})", self._complete),
            ("hub POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)", self._commit),
            ("cdn PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", self._store),
        ]
        made: list[Route] = [(how, re.compile(pattern), _guarded(answer)) for how, pattern, answer in routes]
        hub.routes[:0] = made

    def blob(self, oid: str) -> Path:
        return self.store / oid

    def _writer(self, hub: Hub, request: Request) -> Reply | None:
        from hub_server import refused

        if request.token not in hub.tokens:
            return refused(401, "", "Invalid credentials in Authorization header")
        if request.token in self.readers:
            return refused(403, "", "you must use a write token")
        return None

    def _create(self, hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        from hub_server import as_json, refused

        if no := self._writer(hub, request):
            return no
        said = json.loads(request.body())
        name = f"{said['organization'] or 'me'}/{said['name']}"
        if name in hub.repos:
            return refused(409, "", "You already created this model repo", {})
        private = said["visibility"] == "private" if "visibility" in said else bool(said.get("private"))
        repo = hub.repos[name] = Repo(name, private=private)
        path = self.store / "gitattributes"
        path.write_text("*.gguf filter=lfs diff=lfs merge=lfs -text\n")
        repo.commit("main", {".gitattributes": blob_of(path, ".gitattributes")}, "initial commit")
        return as_json({"url": f"{hub.url}/{name}", "name": name, "id": name})

    def _branch(self, hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        from hub_server import as_json, refused

        if no := self._writer(hub, request):
            return no
        repo, name = repo_for(hub, request, m["repo"]), unquote(m["branch"])
        if name in repo.branches:
            return refused(409, "", "Reference already exists")
        repo.branches[name] = list(repo.branches["main"])
        return as_json({})

    def _yaml(self, hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        import yaml
        from hub_server import as_json

        parts = json.loads(request.body())["content"].split("---\n")
        front = yaml.safe_load(parts[1]) if len(parts) > 2 else {}
        if front.get("license") == "unknown":
            said = {"errors": [{"message": '"license" must be one of [apache-2.0, mit, …]'}], "warnings": []}
            return as_json(said, 400)
        return as_json({"errors": [], "warnings": [{"message": "a warning that nobody asked for"}]})

    def _preupload(self, hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        from hub_server import as_json

        if no := self._writer(hub, request):
            return no
        repo = repo_for(hub, request, m["repo"])
        commit = repo.at(unquote(m["revision"]))
        files = commit.files if commit else {}
        found = []
        for f in json.loads(request.body())["files"]:
            is_large = f["path"].endswith(LFS_SUFFIXES) or f["size"] >= LFS_BYTES
            blob = files.get(f["path"])
            mode = "lfs" if is_large else "regular"
            found.append(
                {"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": blob.etag if blob else None}
            )
        return as_json({"files": found})

    def _batch(self, hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        from hub_server import as_json

        if no := self._writer(hub, request):
            return no
        said, objects = json.loads(request.body()), []
        for one in said["objects"]:
            oid, size = one["oid"], one["size"]
            self.sizes[oid] = size
            made: dict[str, Any] = {"oid": oid, "size": size}
            if not self.blob(oid).exists():
                place, end = f"{hub.cdn_url}/lfs/{oid}", f"?signature={_signature(oid)}"
                upload: dict[str, Any] = {"href": place + end}
                if size > self.part:
                    parts = {str(n + 1): f"{place}/{n}{end}" for n in range(-(-size // self.part))}
                    header = {"chunk_size": str(self.part), **parts}
                    upload = {"href": f"{hub.url}/complete/{oid}{end}", "header": header}
                verify = {"href": f"{hub.url}/{m['repo']}.git/info/lfs/objects/verify"}
                made["actions"] = {"upload": upload, "verify": verify}
            objects.append(made)
        return as_json({"transfer": "basic", "objects": objects})

    def _store(self, hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        """A large file, or a part of one."""
        from hub_server import Reply, refused

        oid = m["oid"]
        if request.query.get("signature") != [_signature(oid)]:
            return refused(403, "", "the address is not signed")
        body, whole = request.body(), m["part"] is None
        if len(body) != int(request.headers.get("Content-Length") or len(body)):
            return refused(400, "", "the body is cut short")
        self.put.append((oid, len(body)))
        if whole and hashlib.sha256(body).hexdigest() != oid:
            return refused(400, "", "not what was said")
        (self.blob(oid) if whole else self.store / f"{oid}.{m['part']}").write_bytes(body)
        return Reply(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _complete(self, hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        from hub_server import as_json, refused

        oid, said = m["oid"], json.loads(request.body())
        if request.query.get("signature") != [_signature(oid)]:
            return refused(403, "", "the address is not signed")
        parts = [(self.store / f"{oid}.{p['partNumber'] - 1}").read_bytes() for p in said["parts"]]
        if [p["etag"] for p in said["parts"]] != [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]:
            return refused(400, "", "a part is not the one that was sent")
        data = b"".join(parts)
        if hashlib.sha256(data).hexdigest() != oid:
            return refused(400, "", "not what was said")
        self.blob(oid).write_bytes(data)
        return as_json({"success": True})

    def _verify(self, hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        from hub_server import as_json, refused

        if no := self._writer(hub, request):
            return no
        said = json.loads(request.body())
        path = self.blob(said["oid"])
        if not path.exists() or path.stat().st_size != said["size"]:
            return refused(404, "", "no such object")
        return as_json({})

    def _commit(self, hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        from hub_server import as_json, refused

        if no := self._writer(hub, request):
            return no
        repo, branch = repo_for(hub, request, m["repo"]), unquote(m["revision"])
        last = repo.at(branch)
        assert last is not None
        title, files = "", dict(last.files)
        for line in request.body().splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, last.id):
                    return refused(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                data = base64.b64decode(value["content"])
                path = self.store / f"small-{git_sha1(data)}"
                path.write_bytes(data)
                files[value["path"]] = Blob(path, len(data), git_sha1(data), None)
            elif key == "lfsFile":
                path = self.blob(value["oid"])
                if not path.exists():
                    return refused(422, "", "an LFS pointer to a file that is not here")
                files[value["path"]] = blob_of(path, "x.gguf")
        made = repo.commit(branch, files, title)
        return as_json({"commitUrl": f"{hub.url}/{repo.id}/commit/{made.id}", "commitOid": made.id, "success": True})


def _signature(oid: str) -> str:
    return hashlib.sha256(f"a secret for {oid}".encode()).hexdigest()[:32]


def _guarded(answer: Answer) -> Answer:
    def answered(hub: Hub, request: Request, m: re.Match[str]) -> Reply:
        from hub_reading import RefusalError

        try:
            return answer(hub, request, m)
        except RefusalError as e:
            return e.reply

    return answered
