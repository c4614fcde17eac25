"""The process of a client that is ready for each message: what it may not do before it forks."""

from __future__ import annotations

import os
import subprocess
import sys

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
from fedcompo.deployment.node import MODULES
for module in MODULES:
    importlib.import_module(module)
assert threads() == before, threads()
"""


def test_what_is_imported_in_advance_asks_for_no_gpu_and_starts_no_thread() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GPU], cwd=find_app(), env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


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
