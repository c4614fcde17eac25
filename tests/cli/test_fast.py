"""Commands that answer at once: they load no torch, which alone takes seconds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = ROOT / "tests" / "golden" / "mixed"
SLOW = ["torch", "timm", "flwr", "ray", "sklearn", "scipy", "matplotlib", "jinja2", "numpy", "PIL"]
RUNNER = f"""
import json, sys
from typer.testing import CliRunner
from fedcompo.cli.app import app

for words in json.load(sys.stdin):
    result = CliRunner().invoke(app, words)
    slow = sorted(set({SLOW}) & set(sys.modules))
    print(json.dumps(dict(words=words, code=result.exit_code, slow=slow)))
    if slow:
        break
"""
ANSWERS = [
    "--version",
    "--help",
    "remove --help",
    "compose --help",
    "settings",
    "list -r R",
    "list -r R --json",
    "show ada -r R",
    "show dan -r R --json",
    "remove ada -r R --dry-run --data none",
    "remove ada -r R --dry-run --data none --json",
]
REFUSALS = [
    "show zoe -r R",
    "remove zoe -r R --yes",
    "remove zoe -r R --dry-run",
    "negate zoe -r R -o out",
    "export -r R --client zoe -o out",
    "audit -r R --remove zoe",
    "import tuned.pth --client zoe --data images -r nowhere",
    *(f"{words} -r nowhere" for words in ("list", "add ada", "compose -o out", "evaluate")),
    *(f"{words} -r nowhere" for words in ("negate ada -o out", "verify record.json")),
    "compose -r R -o out --weights ada=2",
    "predict cat.png -r nowhere",
    "predict cat.png --model nowhere",
    "fetch -o out --weights ada=2 --server localhost:1 --ca no --certificate no --key no",
    "simulate --set knid=lora",
    "fisher --data digits -o out --set rank=many",
    "fit --data digits -o out -r nowhere",
    "fit --data digits -o out --set rank=many",
    "members --server localhost:1 --ca no --certificate no --key no",
    "init-deployment out",
    "check-certificate nowhere",
    "request-certificate",
]


@pytest.mark.parametrize(
    ("commands", "code"), [(ANSWERS, {0}), (REFUSALS, {1, 2})], ids=["answers", "refusals"]
)
def test_commands_answer_before_anything_slow_is_loaded(
    tmp_path: Path, commands: list[str], code: set[int]
) -> None:
    shutil.copytree(REGISTRY, tmp_path / "R")
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        cwd=tmp_path,
        input=json.dumps([words.split() for words in commands]),
        capture_output=True,
        text=True,
        check=True,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [entry for entry in told if entry["slow"] or entry["code"] not in code] == []
    assert len(told) == len(commands)


NEEDED = {
    "fedcompo.service.client, fedcompo.service.certificates": "torch timm flwr",
    "fedcompo.registry.removal, fedcompo.registry.signing": "torch timm flwr",
    "clients.app, server.app": "torch timm ray",  # what Flower loads before Ray starts
    "fedcompo.registry.registry, fedcompo.composition.version": "timm flwr scipy",
    "fedcompo.engine.simulation as s; s.count_clients(s.RunConfig())": "torch flwr sklearn",
}
"""What is imported, and what must not come with it."""


def test_nothing_slow_comes_with_what_does_without() -> None:
    for imported, slow in NEEDED.items():
        code = f"import sys, {imported}\nassert not set({slow.split()}) & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
