"""What the Hub of the tests holds, the faults it is told to show, and its refusals; `hub_server.py` serves them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".bin", ".png")


def file_oid(path: str, content: bytes) -> str:
    """What the Hub calls a file's oid and ETag: the sha256 of an LFS file, else git's blob hash."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: commits are whole snapshots `{path: content}`; branches and pull requests name commits."""

    owner: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Fault:
    """What goes wrong with requests whose path ends with `path`, `times` times (None: always).

    `status` is answered instead of the file; otherwise the connection ends when byte `after` of the file has been
    sent or received, by `reset` or by an orderly close.
    """

    path: str
    method: str = "GET"
    after: int = 0
    times: int | None = None
    reset: bool = True
    status: int | None = None


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            self.headers |= {"X-Error-Code": code, "X-Error-Message": message}
