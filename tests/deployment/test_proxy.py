"""The proxy before the SuperLink: what it passes on, and that nothing of it is put on disk."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from deployed_federation import free_port, require_nginx
from guarded import start_guarded, until

from fedcompo.deployment.contents import server_files
from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import write_files
from fedcompo.service.authority import Authority

MEGABYTE = 1 << 20
PIECE = bytes(range(256)) * (MEGABYTE // 256)


@dataclass
class Site:
    """A proxy, and behind it a server that notes what reaches it."""

    folder: Path
    port: int
    paths: list[str] = field(default_factory=list)
    first_piece: threading.Event = field(default_factory=threading.Event)

    def connect(self) -> http.client.HTTPSConnection:
        trusted = ssl.create_default_context(cafile=str(self.folder / "certificates" / "ca.crt"))
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=trusted)

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        connection = self.connect()
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def bytes_on_disk(self) -> int:
        """Size of nginx's temporary files."""
        files = (self.folder / "state" / "tmp").rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())


def upstream(site: Site, port: int, certificates: Path) -> ThreadingHTTPServer:
    """A stand-in for the SuperLink: answers with the digest of the body, or with many bytes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            site.paths.append(self.path)
            digest, left = hashlib.sha256(), int(self.headers["Content-Length"] or 0)
            while left:
                piece = self.rfile.read(min(left, MEGABYTE))
                digest.update(piece)
                left -= len(piece)
                site.first_piece.set()
            self.answer(PIECE * 32 if self.path.endswith("/much") else digest.digest())

        def do_GET(self) -> None:
            site.paths.append(self.path)
            self.answer(b"got")

        def answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Deployment]:
    require_nginx()
    folder = tmp_path_factory.mktemp("proxy") / "server"
    deployment = Deployment("127.0.0.1", ("a",), free_port(), free_port())
    authority = Authority.create()
    authority.issue_server(["127.0.0.1", "localhost"]).save(folder / "certificates", "server")
    (folder / "certificates" / "ca.crt").write_bytes(authority.credential.certificate)
    write_files(folder, server_files(deployment))
    return folder, deployment


@pytest.fixture(scope="module")
def running(written: tuple[Path, Deployment]) -> Iterator[Site]:
    folder, deployment = written
    site = Site(folder, deployment.port)
    proxy = start_guarded(["./start-proxy"], folder, folder.parent / "proxy.log", {})
    server = upstream(site, deployment.superlink_port, folder / "certificates")
    try:
        until(lambda: (folder / "state" / "nginx.pid").exists() or not proxy.alive, 20, proxy)
        time.sleep(0.2)
        assert proxy.alive, proxy.said
        yield site
    finally:
        server.shutdown()
        server.server_close()
        proxy.end()


@pytest.fixture
def site(running: Site) -> Site:
    running.paths.clear()
    running.first_piece.clear()
    return running


def test_what_clients_need_is_passed_on_as_it_is(site: Site) -> None:
    body = PIECE * 20
    status, digest = site.ask("POST", "/v1/fleet/push-object", body)
    assert (status, digest) == (200, hashlib.sha256(body).digest())
    assert site.paths == ["/v1/fleet/push-object"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet//../../control/start-run",
        "/v1/FLEET/../control/start-run",
        "//v1/control/start-run",
        "/v1/control/start-run?/v1/fleet/",
        "/v1/control/start-run%3f/v1/fleet/",
    ],
)
def test_what_starts_runs_is_not_passed_on(site: Site, path: str) -> None:
    assert site.ask("POST", path, b"x")[0] in (301, 400, 403)
    assert site.paths == []


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/../fleet/x",
        "/v1/control/start-run/..%2f..%2ffleet/x",
        "/v1/control/start-run%3f/../../fleet/x",
    ],
)
def test_the_superlink_gets_the_path_that_was_compared(site: Site, path: str) -> None:
    assert site.ask("POST", path, b"x")[0] == 200
    assert all(seen.startswith("/v1/fleet/") for seen in site.paths)
    assert len(site.paths) == 1


def test_only_what_clients_do_is_allowed(site: Site) -> None:
    assert site.ask("GET", "/v1/fleet/x")[0] == 403
    assert site.paths == []


def test_a_body_goes_on_while_it_comes_and_never_to_disk(site: Site) -> None:
    connection = site.connect()
    connection.putrequest("POST", "/v1/fleet/push-object")
    connection.putheader("Content-Length", str(20 * MEGABYTE))
    connection.endheaders()
    for _ in range(10):
        connection.send(PIECE)
    assert site.first_piece.wait(10), "the proxy waited for the whole body"
    assert site.bytes_on_disk() == 0
    for _ in range(10):
        connection.send(PIECE)
    assert connection.getresponse().read() == hashlib.sha256(PIECE * 20).digest()
    connection.close()
    assert site.bytes_on_disk() == 0


def test_an_answer_that_is_read_slowly_is_not_put_on_disk(site: Site) -> None:
    connection = site.connect()
    connection.request("POST", "/v1/fleet/much")
    answer = connection.getresponse()
    assert answer.read(10) == PIECE[:10]
    time.sleep(0.5)
    assert site.bytes_on_disk() == 0
    assert len(answer.read()) == 32 * MEGABYTE - 10
    connection.close()


def test_a_body_that_no_client_sends_is_refused(site: Site) -> None:
    connection = site.connect()
    connection.putrequest("POST", "/v1/fleet/push-object")
    connection.putheader("Content-Length", str(65 * MEGABYTE))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_without_tls_nobody_is_answered(site: Site) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    connection.request("POST", "/v1/fleet/x", b"x")
    assert connection.getresponse().status == 400
    connection.close()
    assert site.paths == []


def test_whoever_poses_as_the_superlink_gets_nothing(
    written: tuple[Path, Deployment], tmp_path: Path
) -> None:
    original, _ = written
    deployment = Deployment("127.0.0.1", ("a",), free_port(), free_port())
    folder = tmp_path / "server"
    shutil.copytree(original / "certificates", folder / "certificates")
    write_files(folder, server_files(deployment))
    Authority.create().issue_server(["localhost"]).save(tmp_path / "other", "server")
    site = Site(folder, deployment.port)
    proxy = start_guarded(["./start-proxy"], folder, tmp_path / "proxy.log", {})
    server = upstream(site, deployment.superlink_port, tmp_path / "other")
    try:
        until(lambda: (folder / "state" / "nginx.pid").exists() or not proxy.alive, 20, proxy)
        time.sleep(0.2)
        assert site.ask("POST", "/v1/fleet/x", b"secret")[0] == 502
        assert site.paths == []
    finally:
        server.shutdown()
        server.server_close()
        proxy.end()
