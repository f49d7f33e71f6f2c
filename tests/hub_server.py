# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on 127.0.0.1, in memory: the requests of `huggingface_hub` that push and load models.

It keeps every file in git, so that nothing goes by LFS or Xet, and has one branch.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = {  # request -> method of the handler
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate_yaml",
    rf"GET /api/models/{REPO}/auth-check/write": "auth_check",
    rf"POST /api/models/{REPO}/preupload/main": "preupload",
    rf"POST /api/models/{REPO}/commit/main": "commit",
    rf"GET /api/models/{REPO}(/revision/(?P<revision>\w+))?": "info",
    rf"GET /api/models/{REPO}/tree/(?P<revision>\w+)": "tree",
    rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>\w+)/(?P<path>.+)": "resolve",
}


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    title: str
    files: dict  # path -> bytes
    oid: str


@dataclass
class Hub:
    """All that the Hub holds; a user may write to the repositories under their own name."""

    users: dict  # token -> name
    repos: dict = field(default_factory=dict)  # "user/name" -> list of Commit
    cut: set = field(default_factory=set)  # repositories whose commits lose their connection
    expiring: set = field(default_factory=set)  # tokens that are refused once something is uploaded

    def add(self, repo, title="initial commit", files=None):
        commits = self.repos.setdefault(repo, [])
        files = files or {}
        oid = hashlib.sha1(f"{len(commits)} {[(path, git_oid(files[path])) for path in sorted(files)]}".encode())
        commits.append(Commit(title, files, oid.hexdigest()))
        return commits[-1]

    def titles(self, repo):
        """Titles of the commits that clients have made."""
        return [commit.title for commit in self.repos[repo][1:]]

    def files(self, repo):
        """Path -> bytes, now."""
        return self.repos[repo][-1].files


class Refused(Exception):
    """Status, message and the Hub's code of an error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet
    hub: Hub

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        matches = ((re.fullmatch(route, f"{self.command} {path}"), name) for route, name in ROUTES.items())
        match, name = next(((match, name) for match, name in matches if match), (None, None))
        try:
            if not match:
                raise Refused(404, f"no such endpoint: {self.command} {path}", "")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token not in self.hub.users:
                raise Refused(401, "Invalid credentials in Authorization header", "")
            self.token, self.user = token, self.hub.users.get(token)
            groups = {key: unquote(value) for key, value in match.groupdict().items() if value}
            if "repo" in groups and groups["repo"] not in self.hub.repos:
                raise Refused(404, "Repository not found", "RepoNotFound")
            getattr(self, name)(**groups)
        except Refused as refusal:
            status, message, code = refusal.args
            self.send({"error": message}, status, {"X-Error-Message": message, "X-Error-Code": code})

    do_GET = do_HEAD = do_POST = answer

    def send(self, content, status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass

    def check_writable(self, repo, is_upload=True):
        if not self.user or (is_upload and self.token in self.hub.expiring):
            raise Refused(401, "Invalid username or password.", "")
        if self.user != repo.split("/")[0]:
            raise Refused(403, f"You don't have write access to {repo}", "")

    def find(self, repo, revision="main"):
        commits = self.hub.repos[repo]
        return {**{commit.oid: commit for commit in commits}, "main": commits[-1]}[revision]

    def create(self):
        wanted = json.loads(self.body)
        repo = f"{wanted['organization'] or self.user}/{wanted['name']}"
        self.check_writable(repo, is_upload=False)
        exists = repo in self.hub.repos
        if not exists:
            self.hub.add(repo)
        base = f"http://{self.headers['Host']}"
        self.send({"url": f"{base}/{repo}", "name": repo, "id": repo}, 409 if exists else 200)

    def auth_check(self, repo):
        self.check_writable(repo, is_upload=False)
        self.send({})

    def validate_yaml(self):
        self.send({"errors": [], "warnings": []})

    def preupload(self, repo):
        self.check_writable(repo)
        known = {path: {"oid": git_oid(content)} for path, content in self.hub.files(repo).items()}
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, **known.get(file["path"], {})}
            for file in json.loads(self.body)["files"]
        ]
        self.send({"files": files, "commitOid": self.find(repo).oid})

    def commit(self, repo):
        self.check_writable(repo)
        if repo in self.hub.cut:
            self.close_connection = True  # without an answer
            return
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines}
        commit = self.hub.add(repo, header["value"]["summary"], self.hub.files(repo) | sent)
        url = f"http://{self.headers['Host']}/{repo}/commit/{commit.oid}"
        self.send({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def info(self, repo, revision="main"):
        commit = self.find(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        self.send({"id": repo, "_id": "0" * 24, "sha": commit.oid, "siblings": siblings, "private": False, "tags": []})

    def tree(self, repo, revision):
        files = self.find(repo, revision).files
        self.send(
            [{"type": "file", "path": p, "size": len(content), "oid": git_oid(content)} for p, content in files.items()]
        )

    def resolve(self, repo, revision, path):
        commit = self.find(repo, revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        self.send(content, headers={"X-Repo-Commit": commit.oid, "ETag": f'"{git_oid(content)}"'})


@contextmanager
def serving(hub):
    """Serves in a thread on a free port, for the block; yields the endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
