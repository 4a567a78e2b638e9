"""A small Hugging Face hub on loopback, for the real client: listings, resolve, ranges, LFS on a second origin.

It can misbehave on order: drop connections, corrupt bytes, refuse with any status. Every request is remembered.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_FROM_BYTES = 100_000  # files this large are stored as LFS objects, as safetensors and GGUF are on the hub


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Refusal:
    status: int
    code: str | None = None  # X-Error-Code
    message: str | None = None  # X-Error-Message
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """The files of one repository: by revision name, path to bytes."""

    revisions: dict[str, dict[str, bytes]]

    def commit(self, revision: str) -> str | None:
        """The commit a branch (or itself) stands for: a hash of the files."""
        for name, files in self.revisions.items():
            digest = hashlib.sha1(repr(sorted((p, hashlib.sha256(d).hexdigest()) for p, d in files.items())).encode())
            if revision in (name, digest.hexdigest()):
                return digest.hexdigest()
        return None

    def files(self, revision: str) -> dict[str, bytes]:
        return next(f for name, f in self.revisions.items() if self.commit(name) == self.commit(revision))


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, data: bytes) -> bool:
    return len(data) >= LFS_FROM_BYTES or path.endswith((".safetensors", ".gguf"))


class Hub:
    """The server's state. Tests set ``drops``, ``corrupt``, ``refuse`` and ``listed_size``, and read ``requests``."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.drops: dict[str, list[int]] = {}  # path -> bytes to send before cutting each next download of it
        self.drop_with_reset = False  # cut with RST, not FIN
        self.hold: threading.Event | None = None  # waited for before a cut: the client waits for more meanwhile
        self.corrupt: set[str] = set()  # paths whose bytes arrive altered
        self.refuse: dict[str, Refusal] = {}  # request path prefix -> answer
        self.listed_size: dict[str, int] = {}  # path -> size to claim
        self.ignore_ranges = False  # answer a range with the whole file, as some mirrors do
        self.lock = threading.Lock()
        self.url = self.cdn_url = ""

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, Repo({})).revisions[revision] = files

    def downloads(self, path: str) -> list[Request]:
        """The GETs that carried a file's bytes, in order."""
        data = next(d for r in self.repos.values() for f in r.revisions.values() for p, d in f.items() if p == path)
        where = f"/cdn/{hashlib.sha256(data).hexdigest()}" if is_lfs(path, data) else path
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(where)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """The tests' output is for the tests."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, headers.get("Range"), headers.get("Authorization")))
        for prefix, refusal in self.hub.refuse.items():
            if path.startswith(prefix):
                return self.send_refusal(refusal)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.send_listing(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_resolved(match[1], match[2], match[3], body)
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            return self.send_object(match[1], body)
        return self.send_refusal(Refusal(404))

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or None after a refusal was sent."""
        found = self.hub.repos.get(repo)
        if found is None:
            self.send_refusal(Refusal(401, "RepoNotFound", "Repository not found"))
            return None
        commit = found.commit(revision)
        if commit is None:
            self.send_refusal(Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}"))
            return None
        return commit, found.files(revision)

    def send_refusal(self, refusal: Refusal) -> None:
        body = json.dumps({"error": refusal.message or "refused"}).encode()
        self.send_response(refusal.status)
        if refusal.code:
            self.send_header("X-Error-Code", refusal.code)
        if refusal.message:
            self.send_header("X-Error-Message", refusal.message)
        for name, value in refusal.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_listing(self, repo: str, revision: str) -> None:
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        siblings = []
        for path, data in files.items():
            size = self.hub.listed_size.get(path, len(data))
            entry: dict[str, object] = {"rfilename": path, "size": size, "blobId": git_blob_id(data)}
            if is_lfs(path, data):
                entry["lfs"] = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            siblings.append(entry)
        body = json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_resolved(self, repo: str, revision: str, path: str, body: bool) -> None:
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        if path not in files:
            return self.send_refusal(Refusal(404, "EntryNotFound", "Entry not found"))
        data = files[path]
        if not is_lfs(path, data):
            return self.send_bytes(path, data, body, {"ETag": f'"{git_blob_id(data)}"', "X-Repo-Commit": commit})
        digest = hashlib.sha256(data).hexdigest()
        self.send_response(302)
        self.send_header("Location", f"{self.hub.cdn_url}/cdn/{digest}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-ETag", f'"{digest}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_object(self, digest: str, body: bool) -> None:
        for repo in self.hub.repos.values():
            for files in repo.revisions.values():
                for path, data in files.items():
                    if hashlib.sha256(data).hexdigest() == digest:
                        return self.send_bytes(path, data, body, {"ETag": f'"{digest}"'})
        return self.send_refusal(Refusal(404))

    def send_bytes(self, path: str, data: bytes, body: bool, headers: dict[str, str]) -> None:
        start = 0
        end = len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and not self.hub.ignore_ranges:
            start, end = int(wanted[1]), min(int(wanted[2] or end) + 1, end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        rest = bytearray(data[start:end])
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if not body:
            return
        if path in self.hub.corrupt and rest:
            rest[len(rest) // 2] ^= 0x40
        with self.hub.lock:
            cuts = self.hub.drops.get(path)
            cut = cuts.pop(0) if cuts else None
        if cut is None:
            self.wfile.write(rest)
            return
        self.wfile.write(rest[:cut])
        self.wfile.flush()
        if self.hub.hold is not None:
            self.hub.hold.wait()
        if self.hub.drop_with_reset:
            while not self.is_received():  # a reset discards what the client's system has not got yet
                time.sleep(0.01)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def is_received(self) -> bool:
        """All that was sent has been acknowledged; where no system tells it has had the time."""
        try:
            left = fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))
        except OSError:
            time.sleep(0.3)
            return True
        return int.from_bytes(left, sys.byteorder) == 0


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in the middle are what these tests are about."""


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub that listens until the block ends."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    port = server.server_address[1]
    hub.url, hub.cdn_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"  # two origins, as hub and CDN are
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
