"""A stand-in for the Hugging Face Hub's HTTP API: what an upload and a download ask of it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER, TOKEN, READ_ONLY = "someone", "hf_write", "hf_read"


class Hub:
    """Repositories of files with one branch each, for one owner."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}  # of a repository, by name
        self.commits: dict[str, list[list[str]]] = {}  # the files that each commit brought
        self.blobs: dict[str, bytes] = {}  # uploaded large files, by SHA-256
        self.address = ""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_ONLY):
            return self._answer({"error": "Invalid username or password."}, 401)
        if token == READ_ONLY:
            return self._answer({"error": "Forbidden: you need a write token."}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
            if not repo.startswith(f"{OWNER}/"):
                return self._answer({"error": "You don't have the rights to do that"}, 403)
            there = repo in self.hub.files
            self.hub.files.setdefault(repo, {})
            self.hub.commits.setdefault(repo, [])
            url = f"{self.hub.address}/{repo}"
            return self._answer({"url": url, "name": repo}, 409 if there else 200)
        if path.endswith(".git/info/lfs/objects/batch"):
            repo = path.removeprefix("/").partition(".git")[0]
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            assert repo in self.hub.files
            return self._answer({"transfer": "basic", "objects": objects})
        _, api, models, owner, name, what, branch = path.split("/")
        repo = f"{owner}/{name}"
        assert (api, models, branch) == ("api", "models", "main")
        if what == "preupload":
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        assert what == "commit"
        brought = []
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                assert value["encoding"] == "base64"
                brought.append(value["path"])
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                brought.append(value["path"])
                self.hub.files[repo][value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.commits[repo].append(sorted(brought))
        url = f"{self.hub.address}/{repo}/commit/{self._commit(repo)}"
        return self._answer({"success": True, "commitOid": self._commit(repo), "commitUrl": url})

    def do_PUT(self) -> None:
        oid, body = self.path.removeprefix("/lfs/"), self._body()
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).split("/")
        if parts[5:] == ["auth-check", "write"]:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in (TOKEN, READ_ONLY):
                return self._answer({"error": "Invalid username or password."}, 401)
            return self._answer({}, 200 if token == TOKEN and parts[3] == OWNER else 403)
        if parts[1] == "api":  # of the repository as a whole
            repo = "/".join(parts[3:5])
            if repo not in self.hub.files:
                return self._answer({"error": "Repository not found"}, 404, "RepoNotFound")
            siblings = [{"rfilename": name} for name in self.hub.files[repo]]
            return self._answer({"id": repo, "sha": self._commit(repo), "siblings": siblings})
        repo, name = "/".join(parts[1:3]), "/".join(parts[5:])
        assert parts[3:5] == ["resolve", "main"] or len(parts[4]) == 40
        if repo not in self.hub.files:
            return self._answer({"error": "Repository not found"}, 404, "RepoNotFound")
        if name not in self.hub.files[repo]:
            return self._answer({"error": "Entry not found"}, 404, "EntryNotFound", repo)
        self._send(200, self.hub.files[repo][name], repo=repo)

    def _commit(self, repo: str) -> str:
        return f"{len(self.hub.commits[repo]):040x}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, found: object, status: int = 200, code: str = "", repo: str = "") -> None:
        self._send(status, json.dumps(found).encode(), code=code, repo=repo)

    def _send(self, status: int, body: bytes, *, code: str = "", repo: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if repo:
            self.send_header("X-Repo-Commit", self._commit(repo))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
