"""The command that makes a reference Fisher: an anchor that comes from no client."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompo.cli import common
from fedcompo.errors import ConfigError
from fedcompo.report.console import print_json, say
from fedcompo.report.progress import step
from fedcompo.report.units import duration, size

if TYPE_CHECKING:
    from fedcompo.config.run import RunConfig

SCALE = ", the scale on which `alpha` acts; a run notes if that is far from its clients' own"
"""Said where the penalty acts on the Fisher's own scale."""


def fisher(
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Images of no client: a source as in `data`, such as npz:<path> or folder:<path> "
            "with class folders in it.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write; must be new.")
    ],
    scenario: Annotated[
        Path | None, typer.Argument(help="TOML file of settings; none: the defaults.")
    ] = None,
    assignments: common.AssignmentsOption = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Make a reference Fisher: an anchor that comes from no client.

    Estimated on public images, or on the coordinator's own; of class probabilities (`curvature`),
    under a linear probe of their classes.

    SCENARIO is a TOML file of settings: that of the run which shall use it, so that backbone and
    target-weights agree; without one, the defaults.

    Then: fedcompo simulate --set anchor=reference --set reference=FILE
    """
    with common.errors_as_sentences(verbose):
        from fedcompo.config.choices import Penalty
        from fedcompo.config.scenario import settings_of

        if output.exists():
            raise ConfigError(f"{output} is there already. Name another file, or take it away.")
        values = settings_of(scenario, assignments or [], {"data": data})
        from fedcompo.config.run import RunConfig

        config = RunConfig.parse(values)
        summary = _make(config, output, quiet=as_json)
        if as_json:
            print_json(summary)
            return
        say(
            f"Reference Fisher of {summary['num_examples']} images of {summary['classes']} "
            f"classes, backbone {config.backbone.backbone}, in {duration(summary['seconds'])}: "
            f"{summary['file']} ({size(summary['bytes'])})"
        )
        acts = "" if config.train.penalty is Penalty.IMPLICIT else SCALE
        say(f"Its mean trace is {summary['mean_trace']:.3g}{acts}.")


def _make(config: RunConfig, output: Path, *, quiet: bool) -> dict[str, Any]:
    """Estimate a reference Fisher and write it; returns a summary."""
    from fedcompo.backbone.backbone import load_backbone
    from fedcompo.runtime import pick_device
    from fedcompo.training.probing import load_public_data, reference_fisher, save_reference

    started = time.monotonic()
    with common.progress(quiet=quiet):
        step("loading the backbone")
        backbone = load_backbone(config.backbone, pick_device(config.device))
        step("reading the images")
        public = load_public_data(config, backbone.preprocessing)
        step(f"{len(public.classes)} classes")
        fisher, report = reference_fisher(backbone, public, config)
        curvature = config.fisher.curvature
        digest = save_reference(output, fisher, base=backbone.fingerprint, curvature=curvature)
    return {
        "file": str(output.absolute()),
        "bytes": output.stat().st_size,
        "tensors_sha256": digest,
        "base": backbone.fingerprint,
        "curvature": str(curvature),
        "data": config.data.data,
        "classes": len(public.classes),
        "num_examples": fisher.num_examples,
        "mean_trace": fisher.mean_trace(),
        "report": asdict(report),
        "seconds": round(time.monotonic() - started, 3),
    }
