"""Assembles the service, starts it and stops it.

Beside the registry it keeps ``.<name>.service/``: uploads under way, and models being composed.
None of it is part of the registry, and all of it may be deleted while no service runs.
"""

from __future__ import annotations

import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedcompo.errors import ConfigError, ServiceError
from fedcompo.names import address
from fedcompo.registry.registry import Registry
from fedcompo.registry.signing import place_of_key, signer_for
from fedcompo.service.access import Audience, Revoked
from fedcompo.service.certificates import Credential
from fedcompo.service.downloads import Downloads
from fedcompo.service.gate import Gate
from fedcompo.service.lifetimes import endings
from fedcompo.service.limits import EACH, Limits, Places
from fedcompo.service.members import Members
from fedcompo.service.methods import NAME, serve_methods
from fedcompo.service.publishing import Publishing, Uploads
from fedcompo.service.refusals import LOGGER

QUEUE = 8
"""Calls that wait for a thread, for each one there is: the gate refuses most of a flood at once."""
KEEPALIVE_SECONDS = 30
"""A client that vanished is noticed after about so long."""
DAY = 86400.0
CONNECTION_SECONDS = 3600
"""Then a client has to connect, and show its certificate, again."""


@dataclass(frozen=True)
class Settings:
    """The registry to serve, the server's certificate, and who may call."""

    registry: Path
    authority: bytes
    """Certificate of the authority that certifies the clients, PEM."""
    credential: Credential
    """The server's own."""
    host: str = "127.0.0.1"
    port: int = 9443
    """0: any that is free."""
    audience: Audience = Audience.OPERATORS
    least: int = 2
    """How many others a model for a member holds at least."""
    limits: Limits = field(default_factory=Limits)
    revoked: Path | None = None
    """File that lists revoked certificates."""
    signing_key: Path | None = None
    """File of the registry's private key; None: as the environment says, or in the registry."""


class Server:
    """A registry that is served; use it as a context, or start and stop it."""

    def __init__(self, settings: Settings) -> None:
        """Open the registry, and claim the port.

        Raises:
            RegistryError: If there is no registry.
            ConfigError: If the list of revoked certificates cannot be read, or the registry's
                private key is missing.
            ServiceError: If certificate and key cannot be used, or the port is taken.
        """
        self.settings, limits = settings, settings.limits
        root = Registry(settings.registry).path.resolve()
        folder = root.with_name(f".{root.name}.service")
        key = place_of_key(root, settings.signing_key).absolute()
        signer_for(root, key)  # or who leaves would get no receipt
        hidden = {key: "the signing key", root: "the registry", folder: "the upload"}
        revoked = Revoked(settings.revoked)
        folder.mkdir(exist_ok=True, mode=0o700)
        self._health = health.HealthServicer(experimental_non_blocking=False)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(limits.calls + limits.kept, thread_name_prefix="call"),
            interceptors=(Gate(limits, hidden, revoked),),
            options=_options(limits),
            maximum_concurrent_rpcs=QUEUE * (limits.calls + limits.kept),
        )
        uploads, writers = Uploads(folder / "uploads", limits), Places(1)
        uploads.sweep()
        heavy, models = Places(limits.heavy, kept=1), Places(limits.models, kept=EACH)
        composed, who, least = folder / "models", settings.audience, settings.least
        _delete_old(composed, limits.stale)
        downloads = Downloads(root, composed, who, least, heavy, models, limits)
        members = Members(root, uploads, writers, heavy, limits, hidden, key)
        serve_methods(
            self._server,
            Publish=Publishing(root, uploads, writers, limits).publish,
            Fetch=downloads.fetch,
            Compose=downloads.compose,
            Remove=members.remove,
            List=members.list,
            Verify=members.verify,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = self._claim(settings)

    def start(self) -> None:
        """Answer calls from now on."""
        self._server.start()
        self._health.set(NAME, health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Accept no more calls, and wait for those under way, as long as the limits allow."""
        self._health.enter_graceful_shutdown()
        self._server.stop(self.settings.limits.grace).wait()

    def __enter__(self) -> Server:
        """Start."""
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self.stop()

    def _claim(self, settings: Settings) -> int:
        place = address(settings.host, settings.port)
        try:
            credentials = grpc.ssl_server_credentials(
                [(settings.credential.key, settings.credential.certificate)],
                root_certificates=settings.authority,
                require_client_auth=True,
            )
            port = int(self._server.add_secure_port(place, credentials))
        except (RuntimeError, ValueError) as error:
            port, why = 0, f" ({error})"
        else:
            why = ""
        if not port:
            raise ServiceError(
                f"The service cannot listen on {place}{why}: the port is taken, the host is not "
                "this machine's, or certificate and key do not belong together."
            )
        return port


def serve(settings: Settings, *, on_ready: Callable[[Server], None]) -> None:
    """Serve until SIGTERM or SIGINT, then stop in good order; ``on_ready`` is called in between.

    Each day it warns of certificates that end within sixty days.

    Raises:
        ConfigError: If the server's certificate, or the authority's, has ended.
        RegistryError: If there is no registry.
        ServiceError: If the service cannot start.
    """
    # Calls run side by side: each on one thread, and fits of a head round the same in all of them.
    torch.set_num_threads(1)
    _open_more_files()
    over = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        over.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _report_endings(settings)
        with Server(settings) as server:
            on_ready(server)
            while not over.wait(DAY):
                try:
                    _report_endings(settings)
                except ConfigError as error:  # calls under way go on
                    LOGGER.error("%s", error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report_endings(settings: Settings) -> None:
    for warning in endings(settings.authority, settings.credential):
        LOGGER.warning("%s", warning)


def _open_more_files() -> None:
    """Let this process open as many files as the system allows: each connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems allow fewer than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _options(limits: Limits) -> list[tuple[str, int]]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        ("grpc.max_allowed_incoming_connections", min(limits.connections, files // 2)),
        ("grpc.max_receive_message_length", limits.message),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", limits.calls_each),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake * 1000)),
        ("grpc.max_connection_idle_ms", int(limits.idle * 1000)),
        ("grpc.max_connection_age_ms", CONNECTION_SECONDS * 1000),
        ("grpc.max_connection_age_grace_ms", int(limits.seconds * 1000)),
        ("grpc.so_reuseport", 0),  # a second service on the port is an error, not a lottery
    ]


def _delete_old(folder: Path, seconds: float) -> None:
    """Delete what a killed service left; another one may run beside this."""
    for path in folder.glob("*"):
        if path.stat().st_mtime < time.time() - seconds:
            shutil.rmtree(path, ignore_errors=True)
