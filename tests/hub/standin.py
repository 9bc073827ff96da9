"""A stand-in for the Hugging Face Hub on loopback: serves folders of models and data sets to the real clients.

It answers what huggingface_hub 2.4, datasets 5.2 and mteb 2.26 ask of the hub when `HF_ENDPOINT` names it: information on a
repository, its tree, its files (with ranges, so that a broken download goes on), access by token, and what an upload needs. Large
files are served as plain LFS; Xet, another protocol to another server, has to be off (`HF_HUB_DISABLE_XET=1`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ruamel.yaml import YAML

LARGE = {".safetensors", ".bin", ".parquet", ".onnx", ".gz"}
LICENCES = {"mit", "apache-2.0", "cc-by-nc-4.0", "unknown", "other"}


@dataclass
class Repository:
    """A model or data set: its commits, each a folder, and the names of some of them."""

    kind: str
    name: str
    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """A request that was answered."""

    method: str
    path: str
    status: int
    range: str | None


@dataclass
class Token:
    """What a token may read besides what is public, and whether it may write."""

    readable: frozenset[str] = frozenset()
    writes: bool = False


class Refused(Exception):
    """Ends a request with a status and the headers that the hub's client looks at."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class StandIn:
    """The server; a context manager, whose threads end with it or with the process."""

    def __init__(self, root: Path) -> None:
        """`root`: an empty folder for what is uploaded."""
        self.root = root
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: dict[str, Token] = {}
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}
        self.breaks: dict[str, int] = {}
        """By file name: after how many bytes of its next download the connection breaks."""
        self.stalls: dict[str, threading.Event] = {}
        """By file name: set when half of it was sent; the other half is never sent while the name is here."""
        self.faults: list[BaseException] = []
        """What went wrong here, and not with a client that hung up."""
        self.server = Server(self)
        self.endpoint = f"http://localhost:{self.server.server_address[1]}"
        self.store = f"http://127.0.0.1:{self.server.server_address[1]}"
        """Where large files come from: to the client another host, which is not shown its token."""

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, folder: Path, *, commit: str | None = None, ref: str = "main", **access: bool) -> str:
        """Serve a folder as a commit of `name`, and return the commit; `kind`: `models` or `datasets`."""
        commit = commit or hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        repository = self.repositories.setdefault((kind, name), Repository(kind, name, **access))
        repository.commits[commit] = folder
        repository.refs[ref] = commit
        return commit

    def asked(self, method: str, ending: str) -> list[Request]:
        """Return the requests of a method whose path ends so."""
        return [request for request in self.requests if request.method == method and request.path.endswith(ending)]


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(name: str, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    made: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
    if path.suffix in LARGE:
        made["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return made


class Server(ThreadingHTTPServer):
    """A thread for each connection; clients may hang up when they like."""

    daemon_threads = True

    def __init__(self, hub: StandIn) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), partial(Handler, hub))

    def handle_error(self, *_: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.faults.append(error)


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: StandIn, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:
        """Say nothing; `StandIn.requests` has them."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self._read()
        self.url = urlsplit(self.path)
        routes: Mapping[str, Callable[..., None]] = {
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?": self._information,
            r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?": self._tree,
            r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)": self._paths,
            r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)": self._preupload,
            r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)": self._commit,
            r"/api/repos/create": self._create,
            r"/api/validate-yaml": self._validate,
            r"/blobs/([0-9a-f]{64})/[^/]+": self._blob,
            r"/uploads/([0-9a-f]{64})": self._upload,
            r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
        }
        try:
            for pattern, route in routes.items():
                found = re.fullmatch(pattern, self.url.path)
                if found:
                    return route(*(unquote(part) if part is not None else None for part in found.groups()))
            raise Refused(404, f"the stand-in has no {self.command} {self.url.path}")
        except Refused as refused:
            self._send(refused.status, json.dumps({"error": str(refused)}).encode(), refused.headers)

    def _read(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.hub.requests.append(Request(self.command, self.url.path, status, self.headers.get("Range")))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        file = self.url.path.rpartition("/")[2]
        if status == 200 and file in self.hub.breaks:
            self.wfile.write(content[: self.hub.breaks.pop(file)])
            self.close_connection = True
        elif status == 200 and file in self.hub.stalls:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.hub.stalls[file].set()
            self.rfile.read(1)  # until the client is gone
            self.close_connection = True
        else:
            self.wfile.write(content)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_bytes(self, content: bytes, headers: Mapping[str, str]) -> None:
        """Send a file, or the range of it that is asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, content, {"Accept-Ranges": "bytes", **headers})
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        self._send(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}", **headers})

    # Access, as the hub answers it: a repository that one may not know of is one that is not there.

    def _token(self) -> Token | None:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent and sent not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(sent)

    def _repository(self, kind: str, name: str, *, contents: bool = False) -> Repository:
        token, found = self._token(), self.hub.repositories.get((kind, name))
        readable = token is not None and name in token.readable
        if found is None or (found.private and not readable):
            if token is None:  # over https the client takes a plain 401 for this, too
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if contents and found.gated and not readable:
            raise Refused(401 if token is None else 403, f"Access to {name} is restricted.", "GatedRepo")
        return found

    def _folder(self, kind: str, name: str, revision: str | None, *, contents: bool = False) -> tuple[Repository, str, Path]:
        found = self._repository(kind, name, contents=contents)
        commit = found.commit(revision or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, commit, found.commits[commit]

    # Reading

    def _information(self, kind: str, name: str, revision: str | None) -> None:
        found, commit, folder = self._folder(kind, name, revision)
        siblings = [{"rfilename": file} for file, _ in files_of(folder)]
        access = {"private": found.private, "gated": "manual" if found.gated else False, "disabled": False}
        self._send_json({"id": name, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0, **access})

    def _tree(self, kind: str, name: str, revision: str, below: str | None) -> None:
        _, _, folder = self._folder(kind, name, revision)
        place = folder / (below or "")
        if not place.is_dir():
            raise Refused(404, f"{below} does not exist", "EntryNotFound")
        recursive = parse_qs(self.url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        paths = sorted(place.rglob("*") if recursive else place.iterdir())
        self._send_json([self._described(folder, path) for path in paths])

    @staticmethod
    def _described(folder: Path, path: Path) -> dict[str, Any]:
        name = path.relative_to(folder).as_posix()
        return entry(name, path) if path.is_file() else {"type": "directory", "path": name, "oid": git_oid(name.encode())}

    def _paths(self, kind: str, name: str, revision: str) -> None:
        _, _, folder = self._folder(kind, name, revision)
        wanted = [folder / path for path in parse_qs(self.body.decode()).get("paths", [])]
        self._send_json([self._described(folder, path) for path in wanted if path.exists() and path != folder])

    def _resolve(self, datasets: str | None, name: str, revision: str, file: str) -> None:
        _, commit, folder = self._folder(datasets or "models", name, revision, contents=True)
        if not (folder / file).is_file():
            refused = Refused(404, "Entry not found", "EntryNotFound")
            refused.headers["X-Repo-Commit"] = commit
            raise refused
        made, content = entry(file, folder / file), (folder / file).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{made["oid"]}"'}
        if "lfs" not in made:
            return self._send_bytes(content, headers)
        digest = made["lfs"]["oid"]
        self.hub.uploads[digest] = content
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", headers | {"Location": f"{self.hub.store}/blobs/{digest}/{Path(file).name}"})

    def _blob(self, digest: str) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, "a token was sent to the store of large files")
        self._send_bytes(self.hub.uploads[digest], {"ETag": f'"{digest}"'})

    # Writing

    def _writer(self) -> None:
        token = self._token()
        if token is None:
            raise Refused(401, "Invalid username or password.")
        if not token.writes:
            raise Refused(403, "You don't have the rights to write here")

    def _create(self) -> None:
        self._writer()
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        page = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if ("models", name) in self.hub.repositories:
            return self._send_json({"error": "You already created this model repo", **page}, 409)
        folder = self.hub.root / name / "0"
        folder.mkdir(parents=True)
        self.hub.add("models", name, folder)
        self._send_json(page)

    def _validate(self) -> None:
        front = re.match(r"---\n(.*?\n)---\n", json.loads(self.body)["content"], re.S)
        data = YAML(typ="safe").load(front[1]) if front else {}
        errors = (
            [{"message": f'"license" is not a licence of the hub: {data["license"]}'}]
            if data.get("license") not in LICENCES
            else []
        )
        errors += [
            {"message": f'"base_model" is not a name: {value}'}
            for value in [data.get("base_model")]
            if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value)
        ]
        self._send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, kind: str, name: str, revision: str) -> None:
        self._writer()
        self._folder(kind, name, revision)
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if Path(file["path"]).suffix in LARGE else "regular" for file in files}
        self._send_json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]})

    def _batch(self, name: str) -> None:
        self._writer()
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.store}/uploads/{wanted['oid']}", "header": {}}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects})

    def _upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refused(400, "another content than its digest says")
        self.hub.uploads[digest] = self.body
        self._send(200, b"", {})

    def _commit(self, kind: str, name: str, revision: str) -> None:
        self._writer()
        found, _, before = self._folder(kind, name, revision)
        folder = self.hub.root / name / str(len(found.commits))
        shutil.copytree(before, folder)
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] in ("file", "lfsFile"):
                (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                large = operation["key"] == "lfsFile"
                content = self.hub.uploads[value["oid"]] if large else base64.b64decode(value["content"])
                (folder / value["path"]).write_bytes(content)
        commit = self.hub.add(kind, name, folder, ref=revision)
        page = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._send_json({"success": True, "commitUrl": page, "commitOid": commit, "hookOutput": ""})
