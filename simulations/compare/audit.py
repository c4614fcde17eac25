"""Audit whether the model forgets a removed client, for three ways of training.

    python simulations/compare/audit.py runs/audit-digits
    python simulations/compare/audit.py runs/audit-cifar simulations/cifar100_small.toml \
        --reference reference.safetensors --set kind=full

A client is anchored by the others (*others*, the default), starts from its own probe and is
anchored by its own Fisher or by a reference (*lineage-free*), or is trained without an anchor
(*alpha-0*). The first, the central and the last client are audited. Each way has a run with all
clients and, for each of the three, a run without it; they are compared as by ``fedcompo audit``. A
finished run is not repeated. The figures of all audits go to ``table.md``; those of each audit to
``<way>/audit-<client>``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from runs import first_central_last, run

from fedcompo.audit.measure import FIGURES, LIKELIHOOD_RATIO, LOSS
from fedcompo.audit.measure import audit as measure
from fedcompo.audit.models import AFTER, BEFORE, GOLD
from fedcompo.audit.picture import TITLES
from fedcompo.audit.report import interval, markdown_table, write_audit
from fedcompo.errors import FedcompoError
from fedcompo.export.selection import new_folder
from fedcompo.registry.reader import RegistryReader
from fedcompo.report.units import percent

Audits = dict[tuple[str, str], dict]
"""What ``audit.json`` holds, by way of training and client."""
MODELS = (BEFORE, AFTER, GOLD)
WHOSE = ("removed", "remaining")


def ways(reference: str) -> dict[str, dict[str, str]]:
    """Settings by way of training."""
    free = {"anchor": "reference", "reference": reference} if reference else {"anchor": "own"}
    return {
        "others": {},
        "lineage-free": {**free, "head-start": "probe"},
        "alpha-0": {"alpha": "0", "trust-region": "0"},
    }


def audit(folder: Path, client: str, arguments: argparse.Namespace) -> dict:
    """Audit the removal of one client, or take the figures that are there; empty if it failed."""
    file = folder / f"audit-{client}" / "audit.json"
    if not file.exists():
        began = time.monotonic()
        registry, gold = (
            RegistryReader(folder / run / "registry") for run in ("everyone", f"without-{client}")
        )
        how = {"shadows": arguments.shadows, "seed": arguments.audit_seed}
        try:
            with new_folder(file.parent) as draft:
                write_audit(draft, measure(registry, client, gold=gold, **how))
        except FedcompoError as error:
            print(f"{file.parent} failed: {error}", flush=True)
            return {}
        print(f"{file.parent}: {time.monotonic() - began:.0f} s", flush=True)
    values = json.loads(file.read_text())
    made, wanted = (values["shadows"], values["seed"]), (arguments.shadows, arguments.audit_seed)
    if made != wanted:
        sys.exit(
            f"{file} was made with {made} shadows and seed, not {wanted}; choose another output."
        )
    return values


def tables(audits: Audits) -> str:
    """Accuracies, then attacks: a line for each way of training and client."""
    triple = " / ".join(MODELS)
    accuracy = [["training", "removed", *(f"{w}: {TITLES[k]}" for w in WHOSE for k in FIGURES)]]
    attacks = [["training", "removed", *(f"{a} {m}" for a in ("loss", "LiRA") for m in MODELS)]]
    attacks[0].append("distance to gold: before / after")
    for (way, client), values in audits.items():
        cells = [
            " / ".join(percent(values["accuracy"][whose][model][key]) for model in MODELS)
            for whose in WHOSE
            for key in FIGURES
        ]
        accuracy.append([way, client, *cells])
        found = values["membership"]
        aucs = [interval(found[a][m]["auc"]) for a in (LOSS, LIKELIHOOD_RATIO) for m in MODELS]
        far = values["distance_to_gold"]
        attacks.append([way, client, *aucs, f"{far[BEFORE]:.3g} / {far[AFTER]:.3g}"])
    return "\n\n".join(
        [
            f"Accuracy, %, {triple}, on images of the removed client, and mean of the remaining. "
            "After a removal the head has no rows of the client's own classes: class-IL is 0.",
            markdown_table(accuracy),
            "Membership inference against the removed client: AUC and 95 % interval, bold where "
            "that excludes chance, 0.5.",
            markdown_table(attacks) + "\n",
        ]
    )


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("scenario", nargs="?", default="")
    parser.add_argument("--reference", default="", help="a reference Fisher; without: own ones")
    parser.add_argument("--shadows", type=int, default=16, help="shadow models an audit")
    parser.add_argument("--audit-seed", type=int, default=0, help="seed of the audits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    arguments.output = arguments.output.absolute()
    audits: Audits = {}
    failed = 0
    for way, settings in ways(arguments.reference).items():
        folder = arguments.output / way
        everyone = run(folder / "everyone", arguments.scenario, settings, arguments.set)
        failed += not everyone
        for client in first_central_last(sorted(everyone["per_client"])) if everyone else []:
            without, settings_without = (
                folder / f"without-{client}",
                {**settings, "exclude": client},
            )
            gold = run(without, arguments.scenario, settings_without, arguments.set)
            values = audit(folder, client, arguments) if gold else {}
            failed += not values
            if values:
                audits[way, client] = values
                (arguments.output / "table.md").write_text(tables(audits))
    if audits:
        print(tables(audits))
    if failed:
        sys.exit(f"{failed} run(s) or audit(s) failed.")


if __name__ == "__main__":
    main()
