"""The process of a client that is ready for each message: what it may not do before it forks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

from fedcompo.deployment import node
from fedcompo.engine.launcher import find_app

WITHOUT_GPU = """
import importlib, numpy, scipy.linalg, torch
def threads():
    with open("/proc/self/status") as status:
        return next(line for line in status if line.startswith("Threads:"))
before = threads()  # those of BLAS survive a fork
def refuse(*_):
    raise SystemExit("CUDA was asked: no child of this process could use a GPU")
for name in ("_cuda_init", "_cuda_getDeviceCount"):
    assert hasattr(torch._C, name) or not torch.backends.cuda.is_built()
    setattr(torch._C, name, refuse)
from fedcompo.deployment import node
for module in node.MODULES:
    importlib.import_module(module)
assert threads() == before, threads()
node.REST = 0
node.serve("1", 1)
"""


def test_who_is_ready_asked_for_no_gpu_started_no_thread_and_rests_when_it_is_not_needed(
    tmp_path: Path,
) -> None:
    (tmp_path / "apps").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "FLWR_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(find_app())
    words, log = [sys.executable, "-c", WITHOUT_GPU], tmp_path / "log"
    with log.open("w") as sink:
        ready = subprocess.Popen(words, stdin=PIPE, stdout=sink, stderr=sink, env=environment)
    try:
        while "rests" not in log.read_text() or "libtorch" in maps(ready.pid):
            assert ready.poll() is None, log.read_text()
            time.sleep(0.05)
        assert f"Process {ready.pid} is ready" in log.read_text()
        while "begins anew" not in log.read_text():  # before a run of another app can come
            assert ready.poll() is None, log.read_text()
            (tmp_path / "apps" / str(time.monotonic_ns())).mkdir()
            time.sleep(1)
        assert ready.stdin is not None
        ready.stdin.close()  # as if the SuperNode had ended
        assert ready.wait(60) == 0, log.read_text()
    finally:
        ready.kill()


def maps(pid: int) -> str:
    """Files that a process has in its memory."""
    return Path(f"/proc/{pid}/maps").read_text()


def test_pauses_grow_with_the_time_waited_and_begin_again() -> None:
    pauses, slept = node.Pauses(), []
    for _ in range(12):
        pauses.sleep(0.05)
        slept.append(pauses.pause)
    assert slept[0] == node.FIRST
    assert slept[-1] == 0.05
    for number, pause in enumerate(slept):
        assert pause <= node.FIRST + 0.25 * sum(slept[:number]) + 1e-9
    pauses.sleep(0.5)  # it waits for something else
    assert pauses.pause == node.FIRST
