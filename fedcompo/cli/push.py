"""The command that uploads a folder to a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcompo.cli import common
from fedcompo.report.console import print_json, say
from fedcompo.report.progress import step


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that compose, negate or export wrote.")
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub.")],
    *,
    private: Annotated[
        bool, typer.Option("--private", help="Create it private; refuse one that is public.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be sent; send nothing.")
    ] = False,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Upload a model or an adapter to the Hugging Face hub, with its card.

    DIR is checked first, byte by byte. Only files that fedcompo writes are sent; others are named.

    The token is that of `hf auth login`, or $HF_TOKEN. $HF_ENDPOINT names another hub.
    """
    with common.errors_as_sentences(verbose), common.progress(quiet=as_json):
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        from fedcompo.export.hub import Pushable, check_name

        disable_progress_bars()
        check_name(repo)
        step("checking")
        sent = Pushable.of(folder)
        told = {} if dry_run else sent.push(repo, private=private)
    if as_json:
        license = sent.license or None
        print_json(
            {"repo": repo, "files": sent.files, "left": sent.left, "license": license, **told}
        )
        return
    for name, size in sent.files.items():
        say(f"{'Would send' if dry_run else 'Sent'} {name}: {size:,} bytes.")
    for name in sent.left:
        say(f"Left here: {name}.")
    named = f"the license {sent.license}" if sent.license else "no license; `license: ...` adds one"
    say(f"The card states {named}, in the first lines of README.md.")
    if told:
        say(f"Address: {told['address']}")
        say(f"Its card says how to use it, in a folder: hf download {repo} --local-dir DIR")
