# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on 127.0.0.1, in memory: what `huggingface_hub` 2.4 asks of one when it pushes and loads.

Uploads go by LFS (`HF_HUB_DISABLE_XET=1`). Routes are matched on the undecoded path, as branches and files may hold
an encoded slash.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatch
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

LARGE = ("*.safetensors", "*.parquet", "*.bin", "*.pt", "*.pth", "*.pkl", "*.png", "*tfevents*")
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE)
API = r"/api/(?P<kind>model|dataset)s/(?P<repo>[^/]+/[^/]+)"
PAGE = r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"
TOKEN = ContextVar("token")  # of the request: several are served at a time


@dataclass(frozen=True)
class Blob:
    """A file's content; `oid` is git's name of it, or the sha256 where it is kept by LFS."""

    content: bytes
    lfs: bool

    @property
    def oid(self):
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path):
        """As in a tree listing."""
        size, oid = len(self.content), self.oid
        lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": size, "oid": oid[:40], **lfs}


@dataclass
class Commit:
    title: str
    files: dict
    oid: str


@dataclass
class Repo:
    commits: list = field(default_factory=list)
    branches: dict = field(default_factory=dict)

    def add(self, branch, title, files):
        oid = hashlib.sha1(f"{len(self.commits)} {title} {sorted((p, b.oid) for p, b in files.items())}".encode())
        self.commits.append(Commit(title, files, oid.hexdigest()))
        self.branches[branch] = self.commits[-1]
        return self.commits[-1]

    @property
    def titles(self):
        """Of the commits that clients have made."""
        return [commit.title for commit in self.commits[1:]]

    @property
    def files(self):
        """Path -> bytes on the main branch."""
        return {path: blob.content for path, blob in self.branches["main"].files.items()}


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status, message, code=None, **headers):
        super().__init__(message)
        headers |= {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.response = JSONResponse({"error": message}, status, headers)


class Hub:
    """The ASGI application and all that it holds.

    Args:
        tokens: token -> user; each user may write to the repositories of that name alone.
    """

    def __init__(self, tokens):
        self.tokens = dict(tokens)
        self.repos = {}  # (kind, "user/name") -> Repo
        self.large = {}  # sha256 -> bytes, as uploaded
        self.sent = set()  # (repository, sha256): what one holds is not to be had by naming it in another
        self.requests = []  # (method, undecoded path, status)
        self.cuts = {}  # repository -> how many of its next uploads lose their connection half-way
        self.expiring = set()  # tokens that are good until the upload

    async def __call__(self, scope, receive, send):
        request = Request(scope, receive)
        path = scope["raw_path"].decode().split("?")[0]
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        TOKEN.set(token)
        try:
            if token and token not in self.tokens:
                raise Refusal(401, "Invalid credentials in Authorization header")
            response = await self.route(request, path, send)
        except Refusal as refusal:
            response = refusal.response
        self.requests.append((request.method, path, response.status_code if response else 0))
        if response is not None:
            await response(scope, receive, send)

    async def route(self, request, path, send):
        base = str(request.base_url).rstrip("/")
        for methods, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and request.method in methods:
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                parts["kind"] = parts.get("kind", "model").removesuffix("s/")
                return await handler(self, request, base=base, send=send, **parts)
        raise Refusal(404, f"no such endpoint: {request.method} {path}")

    # ---- Who may do what, and what there is ----

    def user(self):
        if not TOKEN.get():
            raise Refusal(401, "Invalid username or password.")
        return self.tokens[TOKEN.get()]

    def find(self, kind, repo, revision="main"):
        if (kind, repo) not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        found = self.repos[kind, repo]
        commits = {**{commit.oid: commit for commit in found.commits}, **found.branches}
        if revision not in commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, commits[revision]

    def writable(self, kind, repo, revision="main"):
        if self.user() != repo.split("/")[0]:
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        if TOKEN.get() in self.expiring:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.find(kind, repo, revision)

    async def whoami(self, request, **_):
        return JSONResponse({"type": "user", "name": self.user(), "orgs": [], "auth": {"type": "access_token"}})

    async def auth_check(self, request, kind, repo, write=None, **_):
        self.find(kind, repo)
        if write and self.user() != repo.split("/")[0]:
            raise Refusal(403, f"You don't have write access to {repo}")
        return JSONResponse({})

    async def create(self, request, base, **_):
        wanted = await request.json()
        kind, owner = wanted.get("type", "model"), wanted["organization"] or self.user()
        repo = f"{owner}/{wanted['name']}"
        if owner != self.user():
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        answer = {"url": f"{base}/{'datasets/' if kind == 'dataset' else ''}{repo}", "name": repo, "id": repo}
        if (kind, repo) in self.repos:
            return JSONResponse({**answer, "error": f"You already created this {kind} repo: {repo}"}, 409)
        self.add_repo(kind, repo)
        return JSONResponse(answer)

    def add_repo(self, kind, repo):
        self.repos[kind, repo] = Repo()
        self.repos[kind, repo].add("main", "initial commit", {".gitattributes": Blob(ATTRIBUTES.encode(), False)})

    async def branch(self, request, kind, repo, revision, **_):
        found, head = self.writable(kind, repo)
        if revision in found.branches:
            raise Refusal(409, f"Reference already exists: {revision}")
        found.branches[revision] = head
        return JSONResponse({}, 201)

    async def info(self, request, kind, repo, revision="main", **_):
        _, commit = self.find(kind, repo, revision)
        files = [{"rfilename": path} for path in sorted(commit.files)]
        return JSONResponse(
            {"id": repo, "_id": commit.oid[:24], "sha": commit.oid, "siblings": files, "private": False, "tags": []}
        )

    async def tree(self, request, kind, repo, revision, path="", **_):
        _, commit = self.find(kind, repo, revision)
        prefix, deep = f"{path}/" if path else "", request.query_params.get("recursive", "").lower() == "true"
        entries = {}
        for name, blob in sorted(commit.files.items()):
            if not name.startswith(prefix):
                continue
            *folders, _ = name[len(prefix) :].split("/")
            for depth in range(len(folders) if deep else min(1, len(folders))):
                folder = prefix + "/".join(folders[: depth + 1])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if deep or not folders:
                entries[name] = blob.entry(name)
        if path and not entries:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        return JSONResponse([*entries.values()])

    async def paths_info(self, request, kind, repo, revision, **_):
        _, commit = self.find(kind, repo, revision)
        form = parse_qs((await request.body()).decode())
        found = []
        for path in form["paths"]:
            if path in commit.files:
                found.append(commit.files[path].entry(path))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return JSONResponse(found)

    # ---- Uploads ----

    async def validate_yaml(self, request, **_):
        content = (await request.json())["content"]
        header = re.match(r"---\n(.*?)\n---", content, re.S)
        if not header:
            return JSONResponse({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        try:
            yaml.safe_load(header.group(1))
        except yaml.YAMLError as failure:
            return JSONResponse({"errors": [{"message": str(failure)}], "warnings": []}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request, kind, repo, revision, **_):
        _, head = self.writable(kind, repo, revision)
        files = []
        for file in (await request.json())["files"]:
            large = any(fnmatch(file["path"].split("/")[-1], pattern) for pattern in LARGE)
            known = {"oid": head.files[file["path"]].oid} if file["path"] in head.files else {}
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return JSONResponse({"files": files, "commitOid": head.oid})

    async def lfs_batch(self, request, base, kind, repo, **_):
        self.writable(kind, repo)
        objects = []
        for wanted in (await request.json())["objects"]:
            href = f"{base}/lfs/{wanted['oid']}"
            upload = {"upload": {"href": f"{href}?repo={repo}"}, "verify": {"href": f"{href}/verify"}}
            objects.append({**wanted, **({} if (repo, wanted["oid"]) in self.sent else {"actions": upload})})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def lfs_put(self, request, oid, send, **_):
        repo, content, expected = request.query_params["repo"], b"", int(request.headers["content-length"])
        cut = self.cuts.get(repo, 0) > 0
        async for chunk in request.stream():
            content += chunk
            if cut and 2 * len(content) >= expected:
                self.cuts[repo] -= 1
                send.__self__.transport.abort()  # uvicorn's own: the client sees a reset connection
                return None
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content does not fit its name")
        self.large[oid] = content
        self.sent.add((repo, oid))
        return Response(headers={"ETag": f'"{oid}"'})

    async def lfs_verify(self, request, oid, **_):
        wanted = await request.json()
        if len(self.large.get(oid, b"")) != wanted["size"] or wanted["oid"] != oid:
            raise Refusal(404, f"{oid} was not uploaded")
        return JSONResponse({})

    async def commit(self, request, base, kind, repo, revision, **_):
        found, head = self.writable(kind, repo, revision)
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", head.oid) != head.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"].rstrip("/")
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if (repo, value["oid"]) not in self.sent:
                    raise Refusal(400, f"Your push was rejected because an LFS pointer of {path} points to no file")
                files[path] = Blob(self.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[path]
            else:
                files = {name: blob for name, blob in files.items() if not name.startswith(f"{path}/")}
        oid = found.add(revision, header["summary"], files).oid
        url = f"{base}/{repo}/commit/{oid}"
        return JSONResponse({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # ---- Downloads ----

    async def resolve(self, request, base, kind, repo, revision, path, **_):
        _, commit = self.find(kind, repo, revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if not blob.lfs:
            return self.ranged(request, blob.content, headers)
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        # on another host, as large files are
        location = f"{base.replace('127.0.0.1', 'localhost')}/cdn/{blob.oid}"
        return Response(status_code=302, headers={**headers, "Location": location})

    async def cdn(self, request, oid, **_):
        if TOKEN.get():
            raise Refusal(400, "a token was sent to a host that it is not for")
        return self.ranged(request, self.large[oid], {"ETag": f'"{oid}"'})

    @staticmethod
    def ranged(request, content, headers):
        status, whole = 200, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or whole), whole - 1)
            if first >= whole:
                return Response(status_code=416, headers={"Content-Range": f"bytes */{whole}"})
            status, content = 206, content[first : last + 1]
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{whole}"}
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(content))}
        return Response(b"" if request.method == "HEAD" else content, status, headers)


ROUTES = (
    (("GET",), r"/api/whoami-v2", Hub.whoami),
    (("POST",), r"/api/repos/create", Hub.create),
    (("POST",), r"/api/validate-yaml", Hub.validate_yaml),
    (("GET",), rf"{API}/auth-check(?P<write>/write)?", Hub.auth_check),
    (("POST",), rf"{API}/preupload{REVISION}", Hub.preupload),
    (("POST",), rf"{API}/commit{REVISION}", Hub.commit),
    (("POST",), rf"{API}/branch{REVISION}", Hub.branch),
    (("POST",), rf"{API}/paths-info{REVISION}", Hub.paths_info),
    (("GET",), rf"{API}/tree{REVISION}(/(?P<path>.+))?", Hub.tree),
    (("GET",), rf"{API}(/revision{REVISION})?", Hub.info),
    (("POST",), rf"{PAGE}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Hub.lfs_put),
    (("POST",), r"/lfs/(?P<oid>[0-9a-f]{64})/verify", Hub.lfs_verify),
    (("GET", "HEAD"), rf"{PAGE}/resolve{REVISION}/(?P<path>.+)", Hub.resolve),
    (("GET", "HEAD"), r"/cdn/(?P<oid>[0-9a-f]{64})", Hub.cdn),
)


@contextmanager
def serving(hub):
    """Serves in a thread on a free port, for the block; yields the endpoint."""
    server = uvicorn.Server(uvicorn.Config(hub, host="127.0.0.1", port=0, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
