"""A stand-in for the hub: an HTTP server on loopback that takes the real client's requests."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """What the stand-in holds, and how it refuses."""

    address: str = ""
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: whether it is private, and its files as they arrived."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256, before the commit that names them."""
    refused: dict[str, int] = field(default_factory=dict)
    """Status to answer with, by a pattern of the path."""
    seen: list[str] = field(default_factory=list)

    def answer(self, verb: str, path: str, body: bytes) -> tuple[int, Any]:
        """Answer a request: the status, and JSON or a file."""
        for pattern, status in self.refused.items():
            if re.search(pattern, path):
                return status, {"error": "You shall not pass"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.repos
            if not known:
                private = asked.get("private") or asked.get("visibility") == "private"
                self.repos[name] = {"private": bool(private), "files": {}}
            return (409 if known else 200), {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if verb == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        name = re.search(r"/(org/[\w.-]+?)(\.git)?(/|$)", path)[1]
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        repo = self.repos[name]
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = ["lfs" if f["path"].endswith(".safetensors") else "regular" for f in files]
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": mode, "shouldIgnore": False}
                    for f, mode in zip(files, modes, strict=True)
                ]
            }
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.address}/put/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()[1:]):
                value = line["value"]
                repo["files"][value["path"]] = (
                    base64.b64decode(value["content"])
                    if line["key"] == "file"
                    else self.objects.pop(value["oid"])
                )
                data = repo["files"][value["path"]]
                if line["key"] == "lfsFile":
                    assert hashlib.sha256(data).hexdigest() == value["oid"]
                    assert len(data) == value["size"]
            return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40}
        if "/resolve/" in path:
            found = repo["files"].get(path.rpartition("/")[2])
            return (404, {"error": "Entry not found"}) if found is None else (200, found)
        return 200, {"id": name, "private": repo["private"], "siblings": []}


@contextlib.contextmanager
def hub_stand_in(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Serve a hub, to which the client's calls go, with a token; it ends with the context."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.seen.append(f"{self.command} {self.path}")
            own = self.path.startswith("/put/")  # a signed address, which needs no token
            if not own and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, value = 401, {"error": "Invalid credentials"}
            else:
                status, value = hub.answer(self.command, self.path, body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if isinstance(value, bytes):  # a file
                self.send_header("X-Repo-Commit", "1" * 40)
                self.send_header("ETag", hashlib.sha256(data).hexdigest())
            elif status == 404 and "/resolve/" in self.path:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    values = {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
    }
    for name, value in values.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
