"""A client's node: Flower's SuperNode, and beside it a process that is ready for each message.

    python -m fedcompo.deployment.node OPTIONS-OF-FLOWER-SUPERNODE

Flower starts a new process for each message, which imports torch and the app anew: seconds for each
phase. Here one process imports them once, and for each message forks a child, which does what
Flower's ``flwr-clientapp`` does. Memory, the GPU's too, is free when the child ends, and one that
crashes takes nothing along. The parent never touches a GPU, and computes nothing: neither CUDA nor
a pool of threads survives a fork. It ends with the SuperNode, which starts it again if it is
killed. Without a message for long, it gives its memory back, and imports anew for the next one.

Flower's node also waits up to three seconds between two looks for a message, however soon the next
one comes; :class:`Pauses` makes that a part of the time waited.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import NoReturn

from flwr.common.logger import log

from fedcompo.storage.files import PACKAGE

PORT = "--port"
FIRST, SLOWER, IDLE = 0.01, 1.25, 1.0
"""Seconds of the first pause, the growth from one to the next, and seconds of the longest one."""
MODULES = ("torch", "timm", "flwr.supernode.cli.flwr_clientapp", "clients.work")
"""What a phase imports; our own last, for what is left."""
REST = 300.0
"""Seconds without a message after which the memory of all that, 0.5 GB, is given back."""


class Pauses:
    """Stands in for the module ``time`` where Flower's node sleeps.

    A pause is about a fifth of the time waited so far: 10 ms at first, at most what Flower asks
    for. Flower asks for another pause where it waits for something else; it then begins again.
    """

    def __init__(self) -> None:
        self.most = self.pause = 0.0

    def sleep(self, most: float) -> None:
        """Wait for part of ``most`` seconds."""
        self.pause = FIRST if most != self.most else min(SLOWER * self.pause, most)
        self.most = most
        time.sleep(self.pause)


def main() -> None:
    """Be a SuperNode with the options of ``sys.argv``."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode

    port = sys.argv[sys.argv.index(PORT) + 1]
    start_client_internal.time = Pauses()
    sys.argv[:1] = ["flower-supernode", "--isolation", "process"]
    threading.Thread(target=_keep_ready, args=(port,), daemon=True).start()
    flower_supernode()


def _keep_ready(port: str) -> None:
    """Start the process that forks; start it again when it ends."""
    while True:
        code: object
        try:
            # Its standard input closes when we end, however we end.
            ready = subprocess.Popen(_command(port, os.getpid(), ready=True), stdin=subprocess.PIPE)
            code = ready.wait()
        except OSError as error:  # such as no memory: nobody else would start it
            code = error
        time.sleep(1)  # signals reach both: if we are to end, too, we have ended by then
        log(WARNING, "The process that answers has ended (%s): another makes ready", code)


def _command(port: str, node: int, *, ready: bool) -> list[str]:
    """The command that calls :func:`serve`."""
    call = f"from fedcompo.deployment.node import serve; serve({port!r}, {node}, ready={ready})"
    return [sys.executable, "-P", "-c", call]


def serve(port: str, node: int, *, ready: bool = True) -> None:
    """Take tasks from the SuperNode of that port and process id, and fork a child for each.

    It imports what phases need at once, or, if it is not to be ``ready``, at the first task.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    # Whether there is a GPU is asked of NVML then: CUDA's own answer would not survive a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    installed = _installed()
    if len(installed) == 2:  # of several apps a run says which one it is
        sys.path[:0] = [str(app) for app in installed if app != PACKAGE]
    if ready:
        _make_ready()
    address, pause, last = f"127.0.0.1:{port}", FIRST, time.monotonic()
    take = _taking(address)
    while not _left_alone(pause):
        if _installed() != installed:
            log(INFO, "Process %d begins anew: app or library is another", os.getpid())
            os.execv(sys.executable, _command(port, node, ready=ready))
        token = take()
        pause = FIRST if token else min(SLOWER * pause, IDLE)
        if token:
            if not ready:
                _make_ready()
            child = os.fork()
            if child == 0:
                # It outlives this process, if that is killed, but not the SuperNode.
                _phase(address, token, node)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                log(WARNING, "A phase was ended by signal %d", os.WTERMSIG(status))
            ready, last = True, time.monotonic()
        elif ready and time.monotonic() - last > REST:
            log(INFO, "Process %d rests: it gives its memory back", os.getpid())
            os.execv(sys.executable, _command(port, node, ready=False))


def _installed() -> dict[Path, int]:
    """The apps and this library, and when they were put there."""
    apps = Path(os.environ["FLWR_HOME"], "apps").glob("*")
    return {path: path.stat().st_mtime_ns for path in (*apps, PACKAGE)}


def _make_ready() -> None:
    """Import what phases need."""
    for module in MODULES:
        if _left_alone(0):
            sys.exit()
        try:
            importlib.import_module(module)
        except Exception:  # a phase fails at it too, and tells the server
            log(WARNING, "%s cannot be imported", module, exc_info=True)
    log(INFO, "Process %d is ready: it has imported what phases need", os.getpid())


def _left_alone(seconds: float) -> bool:
    """Wait so long; returns at once, with True, when who holds our standard input has ended."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _taking(address: str) -> Callable[[], str]:
    """Return what asks the SuperNode for a task: it gives the task's token, or nothing."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient
    from httpx import HTTPError

    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    client = RuntimeHttpClient.from_server_address(address, True, None, [version])
    wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])

    def take() -> str:
        try:
            return str(client.AcquireTask(wanted).token)
        except HTTPError:  # it starts, or ends
            return ""

    return take


def _phase(address: str, token: str, node: int) -> NoReturn:
    """Be Flower's ``flwr-clientapp``: answer the message of a token, and end."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    sys.argv = ["flwr-clientapp", "--insecure", "--runtime-api-address", address]
    sys.argv += ["--token", token, "--parent-pid", str(node)]
    code: object = 1
    try:
        flwr_clientapp()
    except SystemExit as end:
        code = end.code
    except BaseException:
        log(ERROR, "A phase failed", exc_info=True)
    finally:  # nothing of the parent's is to be undone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
