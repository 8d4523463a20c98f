"""A Hub on loopback: real HTTP, real bytes, read from and uploaded to by the unmodified
huggingface_hub client.

It speaks what the client asks for: who am I, create, branch, preupload, LFS batch, blob and verify,
commit, pull request, revision, tree, commits, resolve. It has no Xet storage.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

FIRST = "1" * 40
LICENCES = ("mit", "apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "llama3.1", "gemma", "other")
TASKS = ("text-generation", "fill-mask", "text-classification")


@dataclass(frozen=True)
class User:
    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"


@dataclass
class Repository:
    """folder: the files of the first commit, as they are there now. token: who may see it; None:
    everybody.
    """

    folder: Path | None = None
    gated: bool = False
    token: str | None = None
    private: bool = False
    sha: str = FIRST
    later: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> its files
    # Name -> its commits, newest first.
    branches: dict[str, list[str]] = field(default_factory=dict)
    # Of each pull request, from number 1 on: who opened it, and its status.
    pull_requests: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.branches.setdefault("main", [self.sha])

    def commit_of(self, revision: str) -> str | None:
        known = [commit for commits in self.branches.values() for commit in commits]
        return (
            self.branches[revision][0]
            if revision in self.branches
            else revision
            if revision in known
            else None
        )

    def files(self, revision: str = "main") -> dict[str, bytes]:
        commit = self.commit_of(revision)
        if commit != self.sha:
            return self.later[commit]
        paths = sorted(self.folder.rglob("*")) if self.folder else []
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in paths
            if path.is_file()
        }

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.later)}".encode()).hexdigest()
        self.later[sha] = files
        self.branches[branch] = [sha, *self.branches[branch]]
        return sha


@dataclass
class Hub:
    """hook: called with method and path before each answer; a status it returns is the answer.

    requests: ("GET whole", path), in order. stored: LFS blobs by SHA-256, as they were uploaded.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    users: dict[str, User] = field(default_factory=dict)
    hook: Callable[[str, str], int | None] | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> Hub:
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
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

    def asked(self, method: str, part: str) -> int:
        """How often a path with this part was asked for by this method."""
        return sum(how.split()[0] == method and part in path for how, path in self.requests)


def metadata_errors(card: str) -> list[str]:
    """What the Hub's validation finds in a card's metadata
    (huggingface.co/docs/hub/model-cards).
    """
    front_matter = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    data = yaml.safe_load(front_matter[1]) if front_matter else {}

    def texts(value: object, pattern: str = ".+") -> bool:
        values = value if isinstance(value, list) else [value]
        return all(
            isinstance(item, str) and re.fullmatch(pattern, item, re.DOTALL) for item in values
        )

    rules = {
        "license": lambda value: texts(value, "|".join(map(re.escape, LICENCES))),
        "license_name": lambda value: texts(value, r"[a-z0-9-.]+"),
        "license_link": lambda value: texts(value, r"LICENSE(\.md)?|https?://.+"),
        "language": lambda value: texts(value, r"[a-z]{2,3}|code|multilingual"),
        "base_model": lambda value: texts(value, r"[\w.-]+/[\w.-]+"),
        "library_name": lambda value: value == "transformers",
        "pipeline_tag": lambda value: value in TASKS,
        "tags": lambda value: isinstance(value, list) and texts(value),
        "extra_gated_prompt": texts,
        "extra_gated_fields": lambda value: isinstance(value, dict),
    }
    return [
        f'"{key}" must not be {value!r}'
        for key, value in data.items()
        if not rules.get(key, lambda _: False)(value)
    ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, EOFError):  # the client is gone
            self.close_connection = True

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        how = self.command + (
            " range" if "Range" in self.headers else " whole" if self.command == "GET" else ""
        )
        self.hub.requests.append((how, path))
        status = self.hub.hook(self.command, path) if self.hub.hook else None
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        if len(self.body) < length:
            raise EOFError
        if status:
            return self._send(status, b"out of order")
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found:
                return method(self, *(unquote(part) for part in found.groups(default="")))
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    # ---- users and repositories

    def _whoami(self) -> None:
        user = self.hub.users.get(self.token)
        if user is None:
            return self._send(
                401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        orgs = [{"name": org, "roleInOrg": "write"} for org in user.orgs]
        return self._json(
            {"name": user.name, "orgs": orgs, "auth": {"accessToken": {"role": user.role}}}
        )

    def _may_write(self, repo_id: str) -> bool:
        user = self.hub.users.get(self.token)
        if (
            user is None
            or user.role == "read"
            or repo_id.split("/")[0] not in (user.name, *user.orgs)
        ):
            self._send(403, b"", {"X-Error-Message": "you have no write access to it"})
            return False
        return True

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(repo_id):
            return None
        status = 409 if repo_id in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[repo_id] = Repository(
                private=asked.get("visibility") == "private"
            )
        return self._json({"url": f"{self.hub.url}/{repo_id}"}, status)

    def _validate(self) -> None:
        errors = metadata_errors(json.loads(self.body)["content"])
        return self._json(
            {"errors": [{"message": error} for error in errors]}, 400 if errors else 200
        )

    def _find(self, repo_id: str) -> Repository | None:
        """The repository, if whoever asks may see that it is there."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (
            repository.token not in (None, self.token) and not repository.gated
        ):
            self._send(401 if not self.token else 404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _at(self, repo_id: str, revision: str) -> Repository | None:
        repository = self._find(repo_id)
        if repository and repository.commit_of(revision or "main") is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository

    def _auth_check(self, repo_id: str, write: str) -> None:
        if self._find(repo_id) and (not write or self._may_write(repo_id)):
            self._json({})

    def _dataset(self, repo_id: str) -> None:
        known = repo_id in self.hub.datasets
        self._json({"id": repo_id}, 200) if known else self._send(
            404, b"", {"X-Error-Code": "RepoNotFound"}
        )

    # ---- reading

    def _info(self, repo_id: str, revision: str) -> None:
        if repository := self._at(repo_id, revision):
            names = [{"rfilename": name} for name in repository.files(revision or "main")]
            sha = repository.commit_of(revision or "main")
            info = {
                "id": repo_id,
                "sha": sha,
                "siblings": names,
                "private": repository.private,
                "gated": repository.gated,
            }
            self._json(info)

    def _tree(self, repo_id: str, revision: str, folder: str) -> None:
        if repository := self._at(repo_id, revision):
            files = {
                name: data
                for name, data in repository.files(revision).items()
                if name.startswith(folder.strip("/"))
            }
            if folder and not files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            entries = [
                {"type": "file", "path": n, "size": len(data), "oid": _git_hash(data)}
                for n, data in files.items()
            ]
            lfs = {
                name: {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
                for name, data in files.items()
            }
            self._json(
                [
                    {**entry, "lfs": lfs[entry["path"]]} if _large(entry["path"]) else entry
                    for entry in entries
                ]
            )
        return None

    def _commits(self, repo_id: str, revision: str) -> None:
        if repository := self._at(repo_id, revision):
            fields = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "", "message": ""}
            self._json([{"id": sha, **fields} for sha in repository.branches[revision]])

    def _file(self, repo_id: str, revision: str, file: str) -> None:
        repository = self._at(repo_id, revision)
        if repository is None:
            return None
        if repository.token not in (None, self.token):
            return self._send(
                403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
            )
        data = repository.files(revision).get(file)
        commit = {"X-Repo-Commit": repository.commit_of(revision)}
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
        etag = _sha256(data) if _large(file) else _git_hash(data)
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **commit}
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], headers)
        return self._send(200, data, headers)

    # ---- uploading

    def _branch(self, repo_id: str, branch: str) -> None:
        repository = self._find(repo_id)
        if repository and self._may_write(repo_id):
            status = 409 if branch in repository.branches else 200
            repository.branches.setdefault(branch, list(repository.branches["main"]))
            self._json({}, status)

    def _preupload(self, repo_id: str, revision: str) -> None:
        if repository := self._at(repo_id, revision):
            there = repository.files(revision)
            answer = []
            for file in json.loads(self.body)["files"]:
                name, large = file["path"], _large(file["path"])
                oid = (_sha256 if large else _git_hash)(there[name]) if name in there else None
                answer.append(
                    {
                        "path": name,
                        "uploadMode": "lfs" if large else "regular",
                        "shouldIgnore": False,
                        "oid": oid,
                    }
                )
            self._json({"files": answer})

    def _batch(self, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
            objects.append(
                {**wanted, **({} if wanted["oid"] in self.hub.stored else {"actions": actions})}
            )
        self._json({"transfer": "basic", "objects": objects})

    def _blob(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            return self._send(400, b"the content has another SHA-256")
        self.hub.stored[oid] = self.body
        return self._send(200, b"")

    def _verify(self) -> None:
        asked = json.loads(self.body)
        right = len(self.hub.stored.get(asked["oid"], b"")) == asked["size"]
        return self._json({}, 200 if right else 404)

    def _commit(self, repo_id: str, revision: str) -> None:
        repository = self._at(repo_id, revision)
        opens = "create_pr" in self.query
        anybody = opens or revision.startswith("refs/pr/")
        if repository is None or (not anybody and not self._may_write(repo_id)):
            return None
        files = dict(repository.files(revision))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = len(repository.pull_requests) + 1
        if opens:
            repository.pull_requests.append([self.hub.users[self.token].name, "open"])
        branch = f"refs/pr/{number}" if opens else revision
        repository.branches.setdefault(branch, list(repository.branches["main"]))
        sha = repository.add(branch, files)
        answer = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        return self._json(
            {**answer, "pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{number}"}
            if opens
            else answer
        )

    def _discussions(self, repo_id: str) -> None:
        if repository := self._find(repo_id):
            author = self.query.get("author", [""])[0]
            found = [
                {
                    "num": number,
                    "title": "",
                    "author": {"name": name},
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": status,
                    "repo": {"name": repo_id, "type": "model"},
                    "isPullRequest": True,
                }
                for number, (name, status) in enumerate(repository.pull_requests, 1)
                if author in ("", name)
            ]
            self._json({"discussions": found, "count": len(found), "start": 0})

    # ---- answers

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/whoami-v2", _Handler._whoami),
    (r"/api/repos/create", _Handler._create),
    (r"/api/validate-yaml", _Handler._validate),
    (rf"/api/datasets/{_REPO}", _Handler._dataset),
    (rf"/api/models/{_REPO}/auth-check(/write)?", _Handler._auth_check),
    (rf"/api/models/{_REPO}(?:/revision/([^/]+))?", _Handler._info),
    (rf"/api/models/{_REPO}/tree/([^/]+)(/.+)?", _Handler._tree),
    (rf"/api/models/{_REPO}/commits/([^/]+)", _Handler._commits),
    (rf"/api/models/{_REPO}/branch/([^/]+)", _Handler._branch),
    (rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler._preupload),
    (rf"/api/models/{_REPO}/commit/([^/]+)", _Handler._commit),
    (rf"/api/models/{_REPO}/discussions", _Handler._discussions),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"/lfs/(\w+)", _Handler._blob),
    (r"/lfs-verify", _Handler._verify),
    (rf"/(?:datasets/)?{_REPO}/resolve/([^/]+)/(.+)", _Handler._file),
]


def _large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
