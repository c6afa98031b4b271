"""A Hub on this machine that takes model repositories: what it was sent can be read off it.

Tokens: `hf_good...` may write, `hf_reads...` may only read, any other is expired.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

GOOD, READS, EXPIRED = "hf_good-0123456789abcdef", "hf_reads-0123456789abcdef", "hf_gone-0123456789abcdef"
LARGE = (".safetensors", ".gguf", ".png")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    license: str | None = None

    @property
    def head(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        route = {"create": "create", "validate-yaml": "validate", "batch": "batch", "whoami-v2": "whoami"}.get(
            parts[-1]
        )
        rest = "".join(parts[4:5])
        route = route or ("put" if parts[0] == "lfs" else "info" if rest in {"", "revision"} else rest)
        self.server.asked.append(f"{self.command} {route}")
        if (trouble := self.server.troubles[route]) and not self._answer_trouble(trouble.pop(0)):
            return
        if self.server.before.get(route):
            self.server.before[route]()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if route != "put" and not token.startswith(("hf_good", "hf_reads")):
            self._json(
                {"error": "Invalid credentials"},
                401,
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        elif route in {"create", "preupload", "commit", "batch"} and not token.startswith("hf_good"):
            self._json({"error": "You don't have the rights"}, 403)
        else:
            getattr(self, f"_{route}".replace("-", "_"))(parts, body)

    def _answer_trouble(self, status: int) -> bool:
        """Fail once; True where all is well."""
        if status:
            self._send(b"<html>out of order</html>", status, {"Retry-After": "1"} if status == 429 else {})
            return False
        return True

    def _whoami(self, parts: list[str], body: bytes) -> None:
        self._json({"name": "me", "type": "user"})

    def _create(self, parts: list[str], body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name.startswith("theirs/"):
            return self._json({"error": "You don't have the rights to create a model under the namespace"}, 403)
        private = wanted.get("visibility") == "private" and not self.server.is_always_public
        self.server.repositories.setdefault(name, Repository(private))
        return self._json({"url": f"{self.server.address}/{name}", "name": name})

    def _info(self, parts: list[str], body: bytes) -> None:
        name = "/".join(parts[2:4])
        found = self.server.repositories.get(name)
        if found is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        card = {"license": found.license} if found.license else {}
        siblings = [{"rfilename": file} for file in found.files]
        return self._json(
            {
                "id": name,
                "sha": found.head,
                "private": found.private,
                "siblings": siblings,
                "tags": [],
                "cardData": card,
            }
        )

    def _validate(self, parts: list[str], body: bytes) -> None:
        is_bad = "base_model: not a model" in json.loads(body)["content"]
        errors = [{"message": '"base_model" must be a model id'}] if is_bad else []
        self._json({"errors": errors, "warnings": []}, 400 if is_bad else 200)

    def _preupload(self, parts: list[str], body: bytes) -> None:
        found = self.server.repositories["/".join(parts[2:4])]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": file["path"] in self.server.ignored,
                "oid": _oid(file["path"], found.files.get(file["path"])),
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _batch(self, parts: list[str], body: bytes) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.server.address}/lfs/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in self.server.large else {"actions": action}))
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, parts: list[str], body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != parts[1]:
            return self._json({"error": "the content has another hash"}, 400)
        self.server.large[parts[1]] = body
        return self._send(b"", 200)

    def _commit(self, parts: list[str], body: bytes) -> None:
        found = self.server.repositories["/".join(parts[2:4])]
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines[1:]:
            value = line["value"]
            is_large = line["key"] == "lfsFile"
            content = self.server.large[value["oid"]] if is_large else base64.b64decode(value["content"])
            found.files[value["path"]] = content
        found.commits.append(lines[0]["value"])
        url = f"{self.server.address}/{'/'.join(parts[2:4])}/commit/{found.head}"
        self._json({"commitUrl": url, "commitOid": found.head, "pullRequestUrl": None})

    def _paths_info(self, parts: list[str], body: bytes) -> None:
        found = self.server.repositories["/".join(parts[2:4])]
        names = [name for name in parse_qs(body.decode())["paths"] if name in found.files]
        self._json([
            {"type": "file", "path": name, "oid": _oid(name, found.files[name]), "size": len(found.files[name])}
            for name in names
        ])  # fmt: skip

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)


def _oid(name: str, content: bytes | None) -> str | None:
    """As huggingface_hub computes it to tell whether a file is the same: of large files the hash of the content."""
    if content is None:
        return None
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """Serves until the block ends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.troubles: dict[str, list[int]] = defaultdict(list)
        """Status codes that a route answers first; 0: well."""
        self.before: dict[str, Any] = {}
        """What is called before a route answers."""
        self.ignored: set[str] = set()
        self.is_always_public = False

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def slow(seconds: float) -> Any:
    """Something for `before`."""
    return lambda: time.sleep(seconds)
