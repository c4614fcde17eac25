"""Seconds of each phase of a deployment on loopback, beyond the work itself.

    python tests/benchmarks/deployment_phases.py
    python tests/benchmarks/deployment_phases.py --runs 1 --images 10    # the smallest

Two clients take part in the same runs, so that both see the same load: one starts its node as a
deployment does (:mod:`fedcompo.deployment.node`), the other one as Flower does, with a new process
for each message. The work is what the phase takes in one process that has loaded everything. Needs
nginx; each run takes about a minute. Prints the median of the runs.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from deployed_federation import QUICK, TWO, deployed, digits_as_folders
from measuring import head, options, row

from fedcompo.engine.simulation import simulate

ANSWERED = re.compile(r"(\S+): (\S+) answered with \d+ bytes in ([\d.]+) s")
OURS, FLOWERS = TWO
NODE = '"$python" -P -m fedcompo.deployment.node'


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--images", type=int, default=40, help="training images a class")
    given = parser.parse_args()
    settings = {**QUICK, "realign": True}
    taken: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = digits_as_folders(folder / "images", TWO, training=given.images, test=12)
        alone = {**settings, "data": f"folder:{folder / 'images'}"}
        for number in range(2):  # the first one imports and compiles
            output = folder / f"alone-{number}"
            phases = simulate(alone, output=output, engine="in-process", check=False)["phases"]
        with deployed(folder / "federation", images) as federation:
            start = federation.home(FLOWERS) / "start"
            start.write_text(start.read_text().replace(NODE, "flower-supernode"))
            federation.start_server()
            federation.start_clients(images)
            for _ in range(given.runs):
                done = federation.run(settings)
                assert done.code == 0, done.said
                for phase, client, seconds in ANSWERED.findall(done.said):
                    taken.setdefault((phase, client), []).append(float(seconds))
    head("phase", "work, s", "new process, s", "beyond", "ready process, s", "beyond")
    for phase in dict.fromkeys(phase for phase, _ in taken):
        work = phases[phase]["seconds"] / len(images)
        both = (median(taken[phase, who]) for who in (FLOWERS, OURS))
        row(phase, f"{work:.2f}", *(f"{n:.1f}" for s in both for n in (s, s - work)))


if __name__ == "__main__":
    main()
