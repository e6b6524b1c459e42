"""A server on this machine that speaks as much of the Hub's interface as its client needs to push and load models.

It was written from the client's requests (`huggingface_hub` 0.34 and 2.4) and the Hub's documented answers: error codes in
headers, etags, commits in ndjson, LFS batches, pull requests. Files in git are redirected within the Hub; LFS files are
redirected to another host by a signed address, without credentials. It refuses what the Hub refuses, and `POST /fault` makes it
fail on demand.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

WRITE, READ, USER = "hf_write", "hf_read", "user"
LFS_SUFFIXES = (".safetensors", ".png")
LICENSES = ("apache-2.0", "mit", "openrail++", "cc-by-4.0", "other")


@dataclass
class Commit:
    files: dict[str, bytes]
    message: str
    description: str = ""

    @property
    def oid(self) -> str:
        parts = [self.message, *(f"{p}:{hashlib.sha1(c).hexdigest()}" for p, c in sorted(self.files.items()))]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # branch, or refs/pr/1: commit
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, ref: str, commit: Commit) -> str:
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit.oid

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`. Tests read and set `repos`, `requests` and `faults`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.requests: list[tuple[str, str, int, str | None]] = []  # method, path, status, authorization
        self.faults: list[dict] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self.hub, self.storage = (ThreadingHTTPServer(("127.0.0.1", 0), self._handler(kind)) for kind in (Api, Storage))
        for server in (self.hub, self.storage):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url, self.storage_url = (f"http://127.0.0.1:{s.server_port}" for s in (self.hub, self.storage))
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.hub, self.storage):
            server.shutdown()
            server.server_close()

    def _handler(self, kind: type) -> type:
        return type(kind.__name__, (kind,), {"state": self})

    def fault(self, method: str, path: str) -> dict | None:
        with self.lock:
            for fault in self.faults:
                if re.search(fault["match"], f"{method} {path}") and fault.get("times", 1):
                    fault["times"] = fault.get("times", 1) - 1
                    return fault
        return None


@contextmanager
def client_of(server: HubServer, cache: Path, token: str = WRITE) -> Iterator[None]:
    """Make the real `huggingface_hub` in this process talk to the server within the block.

    Args:
        server: a running server.
        cache: the folder of the client's cache.
        token: the token of the user who is logged in.
    """
    from huggingface_hub import constants, file_download

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, file_download):  # before version 1, the second one has a copy
            template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", token)
        patch.setenv("NO_PROXY", "127.0.0.1")
        reset_client()
        try:
            yield
        finally:
            reset_client()


def reset_client() -> None:
    """Make `huggingface_hub` look again whether it is offline: before version 1, its sessions remember it."""
    from huggingface_hub import utils

    close = getattr(utils, "reset_sessions", None) or utils.close_session
    close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        fault = self.state.fault(self.command, self.route)
        self.cut = fault is not None and "cut" in fault
        if fault is not None and not self.cut:
            return self._send(fault["status"], {"error": "on purpose"}, fault.get("headers", {}))
        try:
            with self.state.lock:
                answer = self.handle_request()
        except Refused as refused:
            return self._send(refused.status, refused.body, refused.headers)
        status, body, headers = answer if isinstance(answer, tuple) else (200, answer, {})
        self._send(status, body, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, status: int, body: dict | list | bytes, headers: dict[str, str]) -> None:
        self.state.requests.append((self.command, self.path, status, self.headers.get("Authorization")))
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "X-Request-Id": "test", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.cut else content)
        if self.cut:
            self.close_connection = True


class Storage(Handler):
    """The host of LFS files, with signed addresses. The client must not show it the Hub's token."""

    def handle_request(self):
        if self.headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed")
        oid = self.route.strip("/")
        if self.query.get("signed") != ["yes"]:
            raise Refused(403, "no signature")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refused(400, "these bytes are others")
            self.state.objects[oid] = self.body
            return b""
        content, wanted = self.state.objects[oid], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            return 206, content[start:], {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return 200, content, {"ETag": f'"{oid}"'}


class Api(Handler):
    def handle_request(self):
        state, route = self.state, self.route
        if route == "/fault":  # only in tests: what to fail at next
            state.faults[:] = json.loads(self.body)
            return {}
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", WRITE, READ):
            raise Refused(401, "Invalid credentials in Authorization header")
        self.token = token
        if route == "/api/repos/create":
            return self._create(json.loads(self.body))
        if route == "/api/validate-yaml":
            return self._validate(json.loads(self.body)["content"])
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", route):
            return self._lfs(found[1], found[2], json.loads(self.body))
        if found := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", route):
            commit = self._repo(found[1]).commits[found[2]]
            content = commit.files[found[3]]
            return 200, content, {"X-Repo-Commit": commit.oid, "ETag": f'"{git_hash(content)}"'}
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)", route):
            return self._resolve(found[1], found[2])
        if found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|branch|refs)(?:/(.+))?)?", route
        ):
            repo, what, revision = self._repo(found[1]), found[2] or "revision", found[3] or "main"
            return getattr(self, f"_{what}")(found[1], repo, revision)
        raise Refused(404, f"no such route {self.command} {route}")

    # ---------------------------------------------------------------------------------------------------- repositories
    def _writing(self) -> None:
        if not self.token:
            raise Refused(401, "Invalid username or password.")
        if self.token != WRITE:
            raise Refused(403, "You have read access but not the required permissions for this operation")

    def _repo(self, name: str) -> Repo:
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and not self.token):
            raise Refused(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _create(self, asked):
        self._writing()
        owner = asked.get("organization") or USER
        if owner != USER:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.state.url}/{name}", "name": name, "id": "1"}
        if name in self.state.repos:
            return 409, answer | {"error": "You already created this model repo"}, {}
        repo = self.state.repos[name] = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
        repo.add("main", Commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit"))
        return answer

    def _validate(self, content):
        block = re.match(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))", content)
        data, errors = yaml.safe_load(block[2]) if block else {}, []
        if "license" in data and data["license"] not in LICENSES:
            errors.append({"message": f'"license" must be one of [{", ".join(LICENSES)}]'})
        base = data.get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            errors.append({"message": f'"base_model" with value "{base}" is not valid. Use a model id'})
        for example in data.get("widget", []):
            if not isinstance(example.get("text"), str) or not isinstance(example["output"]["url"], str):
                errors.append({"message": '"widget" must be texts with outputs'})
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def _revision(self, name, repo, revision):
        commit = self._commit_of(repo, revision)
        siblings = [{"rfilename": p} for p in sorted(commit.files)]
        plain = {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []}
        return plain | {"xetEnabled": False, "downloads": 0, "likes": 0}

    def _refs(self, name, repo, revision):
        branches = [{"name": r, "ref": f"refs/heads/{r}", "targetCommit": c} for r, c in repo.refs.items() if "/" not in r]
        return {"branches": branches, "tags": [], "converts": []}

    def _branch(self, name, repo, branch):
        self._writing()
        if branch in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        return {}

    def _tree(self, name, repo, revision):
        entries = []
        for path, content in sorted(self._commit_of(repo, revision).files.items()):
            lfs = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            entries.append(entry | (lfs if is_lfs(path) else {}))
        return entries

    # ------------------------------------------------------------------------------------------------------- uploading
    def _preupload(self, name, repo, revision):
        if "create_pr" not in self.query:
            self._writing()
        there, files = self._commit_of(repo, revision).files, []
        for file in json.loads(self.body)["files"]:
            path, lfs = file["path"], is_lfs(file["path"])
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in there:
                answer["oid"] = hashlib.sha256(there[path]).hexdigest() if lfs else git_hash(there[path])
            files.append(answer)
        return {"files": files}

    def _lfs(self, name, what, asked):
        self._repo(name)
        if what == "verify":
            return {}
        objects = []
        for wanted in asked["objects"]:
            if wanted["oid"] not in self.state.objects:
                upload = {"href": f"{self.state.storage_url}/{wanted['oid']}?signed=yes"}
                wanted |= {
                    "actions": {"upload": upload, "verify": {"href": f"{self.state.url}/{name}.git/info/lfs/objects/verify"}}
                }
            objects.append(wanted)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _commit(self, name, repo, revision):
        pull = "create_pr" in self.query
        if not pull:
            self._writing()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        files = dict(self._commit_of(repo, revision).files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.state.objects:
                    raise Refused(400, f"{value['path']}: this LFS file was never uploaded")
                files[value["path"]] = self.state.objects[value["oid"]]
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        number = 1 + sum(r.startswith("refs/pr/") for r in repo.refs)
        oid = repo.add(f"refs/pr/{number}" if pull else revision, Commit(files, header["summary"], header["description"]))
        answer = {"success": True, "commitUrl": f"{self.state.url}/{name}/commit/{oid}", "commitOid": oid}
        return answer | ({"pullRequestUrl": f"{self.state.url}/{name}/discussions/{number}"} if pull else {})

    # ----------------------------------------------------------------------------------------------------- downloading
    def _resolve(self, name, rest):
        repo = self._repo(name)
        if repo.gated and self.token != WRITE:
            raise Refused(403, f"Access to model {name} is restricted", "GatedRepo")
        revision = next((r for r in (*repo.refs, *repo.commits) if rest.startswith(f"{r}/")), rest.split("/")[0])
        commit, path = self._commit_of(repo, revision), rest[len(revision) + 1 :]
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if not is_lfs(path):
            headers |= {"Location": f"/api/resolve-cache/models/{name}/{commit.oid}/{path}"}
            return 307, b"", headers | {"X-Linked-Etag": f'"{git_hash(content)}"', "X-Linked-Size": str(len(content))}
        oid = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return 302, b"", headers | {"Location": f"{self.state.storage_url}/{oid}?signed=yes"}
