"""A loopback server that speaks the part of the hub's protocol that its client uses to fetch models.

`/api/models/ORG/NAME` (with `?blobs=true`), `/ORG/NAME/resolve/REV/PATH` for HEAD and GET with ranges; large
files are redirected to another host name, as the hub redirects to its storage. Faults are put per file and
used up one per request.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

__all__ = ["Break", "HubServer", "Repo", "Slow", "Status", "Wrong"]

LARGE = 1000
"""Bytes from which a file is stored as the hub stores large ones."""


@dataclass(frozen=True)
class Break:
    """The connection is reset (or closed, if clean) after so many bytes of the answer."""

    after: int
    clean: bool = False


@dataclass(frozen=True)
class Status:
    code: int


@dataclass(frozen=True)
class Wrong:
    """Other bytes than listed."""

    content: bytes


@dataclass(frozen=True)
class Slow:
    """So many bytes, then a pause until the server stops."""

    after: int


Fault = Break | Status | Wrong | Slow


@dataclass
class Repo:
    files: dict[str, bytes]
    license: str | None = "apache-2.0"
    gated: bool = False
    private: bool = False
    token: str = "hf_right"
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    card: dict[str, Any] = field(default_factory=dict)
    listed: dict[str, bytes] = field(default_factory=dict)
    """What the listing is made of where it differs from what is served."""


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    path: str
    range: str
    authorization: str


def digest_of(content: bytes) -> str:
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that hung up, which it may."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """A context manager; `url` is what HF_ENDPOINT should be."""

    def __init__(self, **repos: Repo) -> None:
        self.repos = {name.replace("__", "/"): repo for name, repo in repos.items()}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[Request] = []
        self.stopping = threading.Event()
        self.ignores_ranges = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *ended: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """Names of the files that were asked for with GET, without redirections."""
        found = [re.match(r"/[^/]+/[^/]+/resolve/[^/]+/(.*)", each.path) for each in self.gets()]
        return [match[1] for match in found if match]

    def gets(self) -> list[Request]:
        return [each for each in self.requests if each.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        headers = self.headers
        self.hub.requests.append(
            Request(
                self.command,
                headers.get("Host", ""),
                path,
                headers.get("Range", ""),
                headers.get("Authorization", ""),
            )
        )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._listing(match[1], "blobs" in parse_qs(parts.query))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[3])
        elif match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            self._content(self.hub.repos[match[1]].files[match[2]], match[2])
        else:
            self._error(404, "")

    def _repo(self, name: str, *, content: bool) -> Repo | None:
        """The repository, or None after an error was sent."""
        repo = self.hub.repos.get(name)
        given = self.headers.get("Authorization", "")
        if repo is None or (repo.private and given != f"Bearer {repo.token}"):
            self._error(401, "RepoNotFound")
            return None
        if given and given != f"Bearer {repo.token}":
            self._error(401, "", "Invalid credentials in Authorization header")
            return None
        if repo.gated and content and not given:
            self._error(403, "GatedRepo")
            return None
        return repo

    def _listing(self, name: str, blobs: bool) -> None:
        repo = self._repo(name, content=False)
        if repo is None:
            return
        siblings: list[dict[str, Any]] = []
        for path, served in repo.files.items():
            content = repo.listed.get(path, served)
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"size": len(content), "blobId": digest_of(content)[:40]}
                if len(content) >= LARGE:
                    sibling["lfs"] = {"sha256": digest_of(content), "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        card = ({"license": repo.license} if repo.license else {}) | repo.card
        document = {"id": name, "sha": repo.commit, "private": repo.private, "gated": repo.gated,
                    "siblings": siblings, "tags": [], "cardData": card}  # fmt: skip
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, path: str) -> None:
        repo = self._repo(name, content=True)
        if repo is None:
            return
        if path not in repo.files:
            self._error(404, "EntryNotFound", commit=repo.commit)
            return
        content = repo.listed.get(path, repo.files[path])
        headers = {"X-Repo-Commit": repo.commit}
        if len(content) < LARGE:
            headers["ETag"] = f'"{digest_of(content)}"'
            self._content(repo.files[path], path, headers)
            return
        headers |= {
            "X-Linked-ETag": f'"{digest_of(content)}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://localhost:{self.hub.port}/storage/{name}/{quote(path)}",
        }
        self._send(302, b"", headers)

    def _content(self, content: bytes, path: str, headers: dict[str, str] | None = None) -> None:
        fault = self.hub.faults[path].pop(0) if self.command == "GET" and self.hub.faults[path] else None
        if isinstance(fault, Status):
            self._error(fault.code, "")
            return
        if isinstance(fault, Wrong):
            content = fault.content
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not self.hub.ignores_ranges:
            start = int(asked[1])
            if start >= len(content):
                self._error(416, "")
                return
        extra = dict(headers or {})
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], extra, fault)

    def _error(self, code: int, error: str, message: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": error, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._send(code, b"{}", {name: value for name, value in headers.items() if value})

    def _send(self, code: int, body: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if not isinstance(fault, Break | Slow):
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.after])
        self.wfile.flush()
        self.close_connection = True
        if isinstance(fault, Slow):
            self.hub.stopping.wait(60)
        elif not fault.clean:
            time.sleep(0.05)  # a reset throws away what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
