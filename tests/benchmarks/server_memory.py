"""Peak memory of the ServerApp as clients grow in number, beside Flower's FedAvg.

    python tests/benchmarks/server_memory.py
    python tests/benchmarks/server_memory.py --kind lora --clients 2 8 --folder /scratch
    python tests/benchmarks/server_memory.py --scale tiny

ViT-B/16 with random values: a full task vector has 340 MB, a LoRA of rank 16 has 14. The ServerApp
is the real one, in a process of its own for each figure. What clients answer is made up by another
process, one answer at a time, and handed over as a file when the ServerApp pulls it: what is
measured is what the server holds. FedAvg is Flower's, over one array of as many bytes as the
adapted weights have.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import measuring
import numpy as np
import torch
from measuring import head, options, parsed, row
from registry_workload import RANK
from server_memory_clients import ARCHITECTURES, NUM_EXAMPLES, Clients, checkpoint

from fedcompo.runtime import peak_bytes, reset_peak

FEDAVG = 16
"""Clients at most; it holds them all."""


@dataclass(frozen=True)
class Job:
    """One figure."""

    what: str
    """``ita``, ``fedavg``, or ``nothing``: imports and the backbone."""
    kind: str
    clients: int
    scale: str
    folder: str
    seconds: float = 0.0
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes, resident: ``run`` (of all), and by phase."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--kind", nargs="+", choices=("full", "lora"), default=("lora", "full"))
    parser.add_argument("--clients", nargs="+", type=int, default=(2, 8))
    parser.add_argument("--scale", choices=tuple(ARCHITECTURES), default="vit-b")
    parser.add_argument("--folder", help="where to work; full, 32 clients: 45 GB")
    parser.add_argument("--job", help="what one process does")
    arguments = parsed(parser, kind=["lora"], clients=[2], scale="tiny")
    if arguments.job:
        print(json.dumps(asdict(measure(Job(**json.loads(arguments.job))))))
        return
    head(
        "kind", "clients", "server", "seconds", "peak MB", "more than one that does nothing", text=3
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        base = run(Job("nothing", "lora", 0, arguments.scale, folder))
        for kind in arguments.kind:
            for clients in sorted(arguments.clients):
                for what in ("ita", "fedavg"):
                    if what == "fedavg" and clients > FEDAVG:
                        continue
                    found = run(Job(what, kind, clients, arguments.scale, folder))
                    peaks = (found.peaks["run"], found.peaks["run"] - base.peaks["run"])
                    name = "ITA" if what == "ita" else "FedAvg"
                    megabytes = (f"{peak / 1e6:.0f}" for peak in peaks)
                    row(kind, clients, name, f"{found.seconds:.0f}", *megabytes)


def run(job: Job) -> Job:
    """Run a job in a process of its own."""
    words = __file__, "--job", json.dumps(asdict(job))
    return Job(**measuring.run(*words, here=job.scale == "tiny", OMP_NUM_THREADS="1").told)


def measure(job: Job) -> Job:
    """Do a job in this process."""
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(dir=job.folder))
    reset_peak()
    began = time.monotonic()
    try:
        phases = JOBS[job.what](job, work)
    finally:
        shutil.rmtree(work)
    peaks = {"run": max(peak_bytes()["resident"], *phases.values(), 0), **phases}
    return Job(**{**asdict(job), "seconds": time.monotonic() - began, "peaks": peaks})


def nothing(job: Job, work: Path) -> dict[str, int]:
    """Import the apps and load the backbone."""
    import server.work
    from fedcompo.backbone.backbone import load_backbone
    from fedcompo.config.run import BackboneConfig

    assert server.work.run
    file = checkpoint(Path(job.folder), job.scale)
    load_backbone(BackboneConfig(str(file["backbone"]), str(file["checkpoint"])))
    return {"load": peak_bytes()["resident"]}


def ita(job: Job, work: Path) -> dict[str, int]:
    """A whole run of the ServerApp; nobody is trained."""
    from flwr.app import Context, RecordDict

    from server.app import app as server_app

    settings = {
        **checkpoint(Path(job.folder), job.scale),
        "kind": job.kind,
        "rank": RANK,
        "fisher-form": "none",
        "keep-fisher": False,
        "realign": False,
        "scale": 1.0,
        "in-flight": 1,
        "num-clients": job.clients,
        "output": str(work / "run"),
        "timeout": 36000.0,
    }
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(settings)
    )
    with answering(job, work) as answer:
        server_app(grid_of(job.clients, answer, packed=True), context)
    results = json.loads((work / "run" / "results.json").read_text())
    assert len(results["registry"]["joined"]) == job.clients, results["left_out"]
    return {
        phase: figures["peak_memory_bytes"]["server"]
        for phase, figures in results["phases"].items()
    }


def fedavg(job: Job, work: Path) -> dict[str, int]:
    """A round of Flower's FedAvg."""
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    with answering(job, work) as answer:
        size = int(np.load(answer("size", 0)).item())
        strategy = FedAvg(fraction_evaluate=0.0, weighted_by_key="num-examples")
        strategy.start(
            grid_of(job.clients, answer, packed=False),
            ArrayRecord({"w": Array(np.zeros(size, np.float32))}),
            num_rounds=1,
        )
    return {"round": peak_bytes()["resident"]}


JOBS: dict[str, Callable[[Job, Path], dict[str, int]]] = {
    "nothing": nothing,
    "ita": ita,
    "fedavg": fedavg,
}


@contextmanager
def answering(job: Job, work: Path) -> Iterator[Callable[[str, int], Path]]:
    """Start the process that makes answers up; yields a function that returns the file of one."""
    about = {"scale": job.scale, "kind": job.kind, "folder": job.folder, "work": str(work)}
    about = {**about, "clients": job.clients}
    if job.scale == "tiny":
        yield Clients(about).answer
        return
    script = Path(__file__).with_name("server_memory_clients.py")
    with subprocess.Popen(
        [sys.executable, script, json.dumps(about)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def answer(message: str, client: int) -> Path:
            assert process.stdin
            assert process.stdout
            print(json.dumps([message, client]), file=process.stdin, flush=True)
            return Path(process.stdout.readline().strip())

        yield answer


def grid_of(clients: int, answer: Callable[[str, int], Path], *, packed: bool):
    """A Grid whose replies are read from files when they are pulled."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    from fedcompo.engine.in_process import FIRST_NODE, InProcessGrid

    key = "payload" if packed else "w"

    class FileGrid(InProcessGrid):
        in_flight = 0

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids = []
            for message in messages:
                ids.append(f"{message.metadata.dst_node_id} {message.metadata.message_type}")
                # As Flower does, the request is sent and forgotten; a reply needs its metadata.
                about = message.metadata
                self.replies[ids[-1]] = Message(RecordDict(), about.dst_node_id, about.message_type)
            return ids

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [self._pull(i) for i in list(message_ids) if i in self.replies]

        def _pull(self, message_id: str) -> Message:
            request = self.replies.pop(message_id)
            node, message_type = message_id.split(" ", 1)
            file = answer(message_type if packed else "model", int(node) - FIRST_NODE)
            data = np.fromfile(file, np.uint8)
            file.unlink()
            array = Array(data if packed else data.view(np.float32))
            content = RecordDict({key: ArrayRecord({key: array})})
            if not packed:
                content["metrics"] = MetricRecord({"num-examples": NUM_EXAMPLES})
            request.metadata.__dict__["_src_node_id"] = 1
            return Message(content, reply_to=request)

    return FileGrid(None, {}, clients)


if __name__ == "__main__":
    main()
