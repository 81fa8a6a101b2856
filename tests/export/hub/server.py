"""A model hub on the loopback: repositories that tests fill, served as the hub library expects them, faults included.

What is spoken is what huggingface_hub asks for: HEAD and GET of `/{repo}/resolve/{revision}/{file}` with the headers
that name commit, ETag and size; ranges; and of uploads, `repos/create`, `preupload`, the LFS batch and `commit`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["LocalHub", "local_hub"]

_LARGE = 64  # bytes from which on a file is kept by its SHA-256, as large ones are


@dataclass
class LocalHub:
    """What a hub holds, and how it misbehaves.

    Attributes:
        files: content by (repository, path).
        cut_after: bytes after which an answer breaks off, for each of the next answers with content.
        stall_after: bytes after which answers stop, and hold the connection until the hub ends.
        stalled: set when one did.
        served: content that is sent in place of the right one, by path.
        gated, private: repositories that ask for terms, and that need a token.
        token: what may read and write.
        requests: method, path and range of every request.
    """

    endpoint: str = ""
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    stall_after: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    served: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    token: str = "hf_of_the_tests"
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, repo: str) -> str:
        """The commit that `main` is at: it changes with the content."""
        state = [
            (path, hashlib.sha256(data).hexdigest())
            for (r, path), data in sorted(self.files.items())
            if r == repo
        ]
        return hashlib.sha1(json.dumps(state).encode()).hexdigest()

    def gets(self) -> list[str | None]:
        """The ranges of all GETs of files."""
        return [span for method, path, span in self.requests if method == "GET" and "/resolve/" in path]


def etag(data: bytes) -> str:
    """What a hub calls a content: SHA-256 of large files, git's hash of small ones."""
    if len(data) >= _LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # ---- reading ----

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        self._file(body=True)

    def _file(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return self._error(404, "RepoNotFound")
        repo, revision, file = match.groups()
        if not self._may(repo):
            return None
        if repo not in {r for r, _ in self.hub.files}:
            return self._error(404, "RepoNotFound")
        if revision not in ("main", self.hub.commit(repo)):
            return self._error(404, "RevisionNotFound")
        data = self.hub.files.get((repo, file))
        if data is None:
            return self._error(404, "EntryNotFound")
        sent = self.hub.served.get(file, data)
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(span[1]) if span else 0
        self.send_response(206 if span else 200)
        self.send_header("X-Repo-Commit", self.hub.commit(repo))
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", str(len(sent) - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(sent) - 1}/{len(sent)}")
        self.end_headers()
        if not body:
            return None
        rest = sent[start:]
        if self.hub.cut_after:
            self.wfile.write(rest[: self.hub.cut_after.pop(0)])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return None
        if self.hub.stall_after is not None:
            self.wfile.write(rest[: self.hub.stall_after])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.ended.wait()
            self.close_connection = True
            return None
        self.wfile.write(rest)
        return None

    def _may(self, repo: str) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo in self.hub.gated:
            self._error(403, "GatedRepo")
            return False
        if repo in self.hub.private and not allowed:
            self._error(401, "RepoNotFound")
            return False
        return True

    # ---- writing ----

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(("POST", path, None))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._error(401, "Unauthorized")
        if path == "/api/repos/create":
            name = json.loads(body)
            return self._json({"url": f"{self.hub.endpoint}/{name['organization']}/{name['name']}"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] >= _LARGE else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            return self._json({"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            repo = match[1]
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    self.hub.files[repo, item["value"]["path"]] = content
                elif item["key"] == "lfsFile":
                    self.hub.files[repo, item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
            oid = self.hub.commit(repo)
            return self._json(
                {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/.+", path):
            return self._json([self._info(match[1], p) for p in parse_qs(body.decode())["paths"]])
        return self._error(404, "NotFound")

    def _info(self, repo: str, path: str) -> dict[str, Any]:
        data = self.hub.files[repo, path]
        info: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
        if len(data) >= _LARGE:
            info["lfs"] = {"oid": etag(data), "size": len(data), "pointerSize": 128}
        return info

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append(("PUT", self.path, None))
        oid = self.path.rpartition("/")[2]
        self.hub.objects[oid] = self.hub.served.get("upload", data)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    # ---- answers ----

    def _json(self, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A hub that listens while the body runs."""
    hub = LocalHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.ended.set()
            server.shutdown()
            thread.join()
