"""A small Hub in memory on 127.0.0.1: what huggingface_hub needs to push and load models, and switches to break it.

Answers as huggingface.co does where the client looks: error codes in `X-Error-Code`, 401 for a private repository
without a token and 404 with another user's, 403 for writing to it, ETags, ranges, LFS, pull requests.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_repos import LFS_SUFFIXES, Fault, Refused, Repo, file_oid

RELATIONS = (None, "adapter", "finetune", "merge", "quantized")


class HubServer:
    """Start with `with HubServer(tokens={"hf_me": "me"}) as hub:`; clients use `HF_ENDPOINT=hub.endpoint`."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens, self.repos, self.lfs = tokens, {}, {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> HubServer:
        Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, method: str, path: str) -> Fault | None:
        """The next fault for this request, used up by asking."""
        for fault in self.faults:
            if fault.method == method and path.endswith(fault.path) and fault.times != 0:
                fault.times = None if fault.times is None else fault.times - 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """One request. Routes are tried in order; the groups of the pattern are the method's arguments."""

    protocol_version = "HTTP/1.1"
    hub: HubServer
    ROUTES = (
        ("POST", r"/faults", "set_faults"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/models/(REPO)/branch/(SEGMENT)", "branch"),
        ("POST", r"/api/models/(REPO)/preupload/(SEGMENT)", "preupload"),
        ("POST", r"/api/models/(REPO)/commit/(SEGMENT)", "commit"),
        ("POST", r"/(REPO)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(SEGMENT)", "lfs_put"),
        ("GET", r"/api/models/(REPO)/tree/(SEGMENT)(?:/(.*))?", "tree"),
        ("GET", r"/api/models/(REPO)(?:/revision/(SEGMENT))?", "info"),
        ("GET", r"/(REPO)/resolve/(SEGMENT)/(.*)", "resolve"),
    )

    def log_message(self, *arguments) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle_any(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        try:
            body = self.read_body(self.hub.fault("PUT", path) if self.command == "PUT" else None)
            if body is None:
                return self.hang_up(reset=True)
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern.replace("REPO", "[^/]+/[^/]+?").replace("SEGMENT", "[^/]+"), path)
                if match and method == self.command.replace("HEAD", "GET"):
                    arguments = [group if group is None else unquote(group) for group in match.groups()]
                    with self.hub.lock:
                        answer = getattr(self, name)(body, *arguments)
                    return answer() if callable(answer) else self.answer(json.dumps(answer).encode())
            raise Refused(404, message=f"no such route: {path}")
        except Refused as refusal:
            text = json.dumps({"error": refusal.message, "errors": [{"message": refusal.message}]})
            self.answer(text.encode(), refusal.status, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # Reading and answering

    def read_body(self, fault: Fault | None) -> bytes | None:
        """The request's body, or None if it was to be cut off."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            cut = fault is not None and fault.status is None
            body = self.rfile.read(fault.after if cut else int(self.headers.get("Content-Length", 0)))
        if fault is not None and fault.status is not None:
            raise Refused(fault.status, message="broken on purpose")
        return None if fault is not None else body

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self, reset: bool) -> None:
        self.wfile.flush()
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()
            self.rfile = self.wfile = io.BytesIO()
        self.close_connection = True

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            message = "Invalid credentials in Authorization header"
            raise Refused(401, message=message, X_Error_Message=message)
        return user

    def repo(self, name: str, write: bool = False) -> Repo:
        repo, user = self.hub.repos.get(name), self.user()
        if repo is None or (repo.private and user != repo.owner):
            if user is None:
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        if write and user != repo.owner:
            raise Refused(401 if user is None else 403, message="You don't have the rights to write to this repo")
        return repo

    def sha(self, repo: Repo, revision: str | None) -> str:
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # Endpoints

    def set_faults(self, body: bytes) -> dict:
        """Not of the Hub: lets a client process order its faults, in place of those before."""
        self.hub.faults[:] = [Fault(**fault) for fault in json.loads(body)]
        return {}

    def whoami(self, body: bytes) -> dict:
        user = self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self, body: bytes) -> dict:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        data = yaml.safe_load(header[1]) if header else {}
        bases = data.get("base_model", [])
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", base):
                raise Refused(400, message=f'"base_model" with value "{base}" is not valid')
        if data.get("base_model_relation") not in RELATIONS:
            raise Refused(400, message=f'"base_model_relation" must be one of {RELATIONS}')
        return {"errors": [], "warnings": []}

    def create(self, body: bytes) -> dict:
        asked, user = json.loads(body), self.whoami(b"")["name"]
        name = f"{asked.get('organization') or user}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name}
        if name in self.hub.repos:
            self.repo(name, write=True)
            return lambda: self.answer(json.dumps(url).encode(), 409)
        if not name.startswith(f"{user}/"):
            raise Refused(403, message=f"You don't have the rights to create a model under {name}")
        repo = self.hub.repos[name] = Repo(user, asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return url

    def branch(self, body: bytes, name: str, branch: str) -> dict:
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Refused(409, message="Reference already exists")
        repo.branches[branch] = self.sha(repo, json.loads(body or b"{}").get("startingPoint"))
        return {}

    def preupload(self, body: bytes, name: str, revision: str) -> dict:
        repo = self.repo(name, write="create_pr" not in self.path)
        held = repo.files(self.sha(repo, revision))
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {True: "lfs", False: "regular"}
        return {
            "files": [
                {"path": path, "uploadMode": modes[path.endswith(LFS_SUFFIXES)], "shouldIgnore": False}
                | ({"oid": file_oid(path, held[path])} if path in held else {})
                for path in paths
            ]
        }

    def lfs_batch(self, body: bytes, name: str) -> dict:
        self.repo(name)
        objects = [
            {"oid": asked["oid"], "size": asked["size"]}
            | ({} if asked["oid"] in self.hub.lfs else {"actions": {"upload": {"href": self.lfs_url(asked["oid"])}}})
            for asked in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def lfs_url(self, oid: str) -> str:
        return f"{self.hub.endpoint}/lfs/{oid}"

    def lfs_put(self, body: bytes, oid: str) -> dict:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="the content has another hash")
        self.hub.lfs[oid] = body
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> dict:
        create_pr = "create_pr" in parse_qs(urlsplit(self.path).query)
        repo = self.repo(name, write=not create_pr)
        files = dict(repo.files(self.sha(repo, revision)))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refused(400, message=f"LFS pointer of {value['path']} pointed to a file that does not exist")
                files[value["path"]] = self.hub.lfs[value["oid"]]
        repo.pull_requests += create_pr
        sha = repo.commit(f"refs/pr/{repo.pull_requests}" if create_pr else revision, files)
        url = f"{self.hub.endpoint}/{name}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        return answer | ({"pullRequestUrl": f"{url}/discussions/{repo.pull_requests}"} if create_pr else {})

    def tree(self, body: bytes, name: str, revision: str, folder: str | None) -> list:
        repo = self.repo(name)
        found = [
            {"type": "file", "path": path, "size": len(content), "oid": file_oid(path, content)}
            for path, content in repo.files(self.sha(repo, revision)).items()
            if path.startswith(f"{folder}/" if folder else "")
        ]
        if folder and not found:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return found

    def info(self, body: bytes, name: str, revision: str | None) -> dict:
        repo = self.repo(name)
        sha = self.sha(repo, revision)
        siblings = [{"rfilename": path} for path in repo.files(sha)]
        return {"id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}

    def resolve(self, body: bytes, name: str, revision: str, path: str):
        repo = self.repo(name)
        sha = self.sha(repo, revision)
        if path not in repo.files(sha):
            raise Refused(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        fault = self.hub.fault(self.command, f"{name}/{path}")
        if fault is not None and fault.status is not None:
            raise Refused(fault.status, message="broken on purpose")
        return lambda: self.send_file(path, sha, repo.files(sha)[path], fault)

    def send_file(self, path: str, sha: str, content: bytes, fault: Fault | None) -> None:
        """Send a file from the first byte asked for, as far as the fault lets it; what it promises is the whole."""
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{file_oid(path, content)}"')
        self.send_header("X-Repo-Commit", sha)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[start : len(content) if fault is None else max(start, fault.after)])
            if fault is not None:
                self.hang_up(fault.reset)
