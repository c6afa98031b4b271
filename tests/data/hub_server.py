"""A server on this machine that answers like the Hub and ModelScope, for one small repository in many conditions.

What a repository's name ends with is its condition: `good`, `gated` (its files are refused), `private` (so is the
repository), `breaks` (a file never comes through its middle), `resumes` (it breaks off once), `failing` (503),
`configs` (it has the configs `first` and `second`, the latter with the one split `prefs`). Any other name is unknown.
Revisions are `main` (ModelScope: `master`) and `v1`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CONDITIONS = ("good", "gated", "private", "breaks", "resumes", "failing", "configs")
COMMITS = {"main": "a" * 40, "master": "a" * 40, "v1": "b" * 40}


def rows_of(revision: str) -> list[dict[str, str]]:
    """What the file `train.jsonl` of a revision holds."""
    return [{"prompt": f"q{n} {revision}", "chosen": "good", "rejected": "bad"} for n in range(200)]


CONFIGS = """---
configs:
- config_name: first
  data_files: [{split: train, path: train.jsonl}, {split: test, path: train.jsonl}]
- config_name: second
  data_files: [{split: prefs, path: train.jsonl}]
---
"""


def _files(name: str, commit: str) -> dict[str, bytes]:
    revision = "v1" if commit == COMMITS["v1"] else "main"
    files = {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows_of(revision)).encode()}
    return files | ({"README.md": CONFIGS.encode()} if name.endswith("configs") else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.server.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".rstrip())
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        match parts:
            case ["api", "datasets", owner, name, *rest]:
                self._hub_api(f"{owner}/{name}", rest)
            case ["datasets", owner, name, "resolve", revision, *path]:
                self._hub_file(f"{owner}/{name}", revision, "/".join(path))
            case ["api", "v1", "datasets", _, name, "repo", *rest]:
                self._modelscope(name, rest, {key: values[0] for key, values in parse_qs(url.query).items()})
            case _:
                self._json({"error": "no such page"}, 404)

    def _hub_api(self, repository: str, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree", "paths-info") else "main"
        if not self._is_there(repository.split("/")[1], revision):
            return
        commit = _commit(revision)
        files = [
            {"type": "file", "path": path, "oid": "c" * 40, "size": len(content)}
            for path, content in _files(repository, commit).items()
        ]
        if rest and rest[0] == "tree":
            self._json(files)
        elif rest and rest[0] == "paths-info":
            self._json([file for file in files if file["path"] in self.form["paths"]])
        elif not rest or rest[0] == "revision":
            siblings = [{"rfilename": file["path"]} for file in files]
            self._json({"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        else:
            self._json({"error": "no such page"}, 404)

    def _is_there(self, name: str, revision: str) -> bool:
        condition = name.rpartition("-")[2]
        if condition == "failing":
            self._json({"error": "out of order"}, 503)
        elif condition not in CONDITIONS or condition == "private":
            self._json({"error": "Repository not found"}, 404 if condition != "private" else 401, "RepoNotFound")
        elif _commit(revision) not in COMMITS.values():
            self._json({"error": f"Invalid rev id: {revision}"}, 404, "RevisionNotFound")
        else:
            return True
        return False

    def _hub_file(self, repository: str, revision: str, path: str) -> None:
        name = repository.split("/")[1]
        if not self._is_there(name, revision):
            return
        commit = _commit(revision)
        if name.endswith("gated"):
            self._json({"error": "Access to dataset is restricted"}, 403, "GatedRepo")
        elif path not in _files(name, commit):
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")
        else:
            self._send_file(name, _files(name, commit)[path], {"X-Repo-Commit": commit})

    def _send_file(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        headers["Content-Length"] = str(len(content) - start)
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks = name.endswith("breaks") or (name.endswith("resumes") and name not in self.server.broken)
        self.wfile.write(content[start : len(content) // 2 if breaks else None])
        if breaks:
            self.server.broken.add(name)
            self.close_connection = True

    def _modelscope(self, name: str, rest: list[str], query: dict[str, str]) -> None:
        condition, revision = name.rpartition("-")[2], query.get("Revision", "master")
        if condition == "failing":
            self._json({"Code": 503, "Message": "out of order"}, 503)
        elif condition == "private":
            self._json({"Code": 403, "Message": "access denied", "Success": False}, 403)
        elif condition not in CONDITIONS or _commit(revision) not in COMMITS.values():
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        elif rest == ["tree"]:
            content = _files(name, _commit(revision))["train.jsonl"]
            file = {
                "Path": "train.jsonl", "Name": "train.jsonl", "Type": "blob", "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
            }  # fmt: skip
            first = query.get("PageNumber", "1") == "1"
            data = {"Files": [file] if first else [], "TotalCount": 1}
            self._json({"Code": 200, "Success": True, "Data": data})
        else:
            self._send_file(name, _files(name, _commit(revision))["train.jsonl"], {})

    def _json(self, value: object, status: int = 200, error_code: str | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if error_code:
            self.send_header("X-Error-Code", error_code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _commit(revision: str) -> str:
    return COMMITS.get(revision, revision)


class HubServer(ThreadingHTTPServer):
    """Serves until the block ends; `asked` has every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.broken: set[str] = set()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
