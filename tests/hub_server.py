"""A Hub on loopback: real HTTP, real bytes, for the unmodified huggingface_hub client. Reading only."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    folder: Path
    gated: bool = False
    token: str | None = None  # who may see it; None: everybody
    sha: str = "1" * 40


@dataclass
class Hub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fail_with: int | None = None

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloaded(self) -> set[str]:
        """Names of the files whose whole content was asked for."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for how, path in self.requests
            if how == "GET whole" and "/resolve/" in path
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        how = self.command + (" range" if "Range" in self.headers else " whole" if self.command == "GET" else "")
        self.hub.requests.append((how, path))
        if self.hub.fail_with:
            return self._send(self.hub.fail_with, b"out of order")
        name = path.removeprefix("/api/models/").split("/revision/")[0].split("/tree/")[0].split("/resolve/")[0].strip("/")
        repository = self.hub.repositories.get(name)
        allowed = repository and (repository.token is None or self.headers.get("Authorization") == f"Bearer {repository.token}")
        if repository is None or (not allowed and not repository.gated):
            return self._send(401 if "Authorization" not in self.headers else 404, b"", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models/"):
            return self._api(path, name, repository)
        if not allowed:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        return self._file(path, repository)

    def _revision_known(self, revision: str, repository: Repository) -> bool:
        return revision in ("main", repository.sha)

    def _api(self, path: str, name: str, repository: Repository) -> None:
        revision = (
            path.split("/revision/")[1]
            if "/revision/" in path
            else path.split("/tree/")[1].split("/")[0]
            if "/tree/" in path
            else "main"
        )
        if not self._revision_known(revision, repository):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(str(p.relative_to(repository.folder)) for p in repository.folder.rglob("*") if p.is_file())
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": f, "size": (repository.folder / f).stat().st_size, "oid": "0" * 40} for f in files
            ]
            return self._send(200, json.dumps(entries).encode())
        info = {
            "id": name,
            "sha": repository.sha,
            "siblings": [{"rfilename": f} for f in files],
            "private": False,
            "gated": False,
        }
        return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, path: str, repository: Repository) -> None:
        revision, file = path.split("/resolve/")[1].split("/", 1)
        if not self._revision_known(revision, repository):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if not (repository.folder / file).is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.sha})
        data = (repository.folder / file).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], headers)
        return self._send(200, data, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
