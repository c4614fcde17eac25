"""The commands that verify what a registry signs, publish its checkpoint, and change its key."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedcompo.cli import common, tables
from fedcompo.errors import ConfigError
from fedcompo.report.console import print_json, say
from fedcompo.storage.files import EGRESS


def verify(
    record: Annotated[
        Path | None,
        typer.Argument(help="A removal record, or egress.json; none: check the whole registry."),
    ] = None,
    registry: common.RegistryOption = None,
    public_key: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|SHA256",
            help="The key that must have signed: a PEM file, or its fingerprint. A file checks a "
            "record without the registry.",
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="ROOT@N|FILE",
            help="A root and its line of the journal, or a checkpoint, seen before: the registry "
            "must go on from there.",
        ),
    ] = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Re-derive the claims of a removal record, or of a whole registry.

    RECORD is a removal record; without one, every byte of the registry is checked. One that lies in
    its registry is held against that, one with a public key beside it, as `fedcompo
    request-removal` leaves it, against the key.

    The key must be one that this machine knows, or be given: else anybody may have signed.

    Exits with 0 if every claim that can be derived again holds, with 1 if one does not.
    """
    with common.errors_as_sentences(verbose):
        if record is not None and not record.exists():
            raise ConfigError(f"There is no file {str(record)!r}. Check the path of the record.")
        if record is not None and record.name == EGRESS:
            _verify_pack(record, as_json, alone=not (registry or public_key or since))
            return
        from fedcompo.registry.key_verification import continues, given_fingerprint, whose_key
        from fedcompo.registry.record_verification import verify_record
        from fedcompo.registry.removal import RemovalRecord
        from fedcompo.registry.state import PUBLIC
        from fedcompo.registry.verification import verify_registry

        given = given_fingerprint(public_key) if public_key else ""
        place, key = _witness_of(record, registry, public_key)
        if since and place is None:
            raise ConfigError("`--since` looks into a registry's journal: add --registry.")
        with common.progress(quiet=as_json):
            if record is None:
                findings = verify_registry(common.registry_path(registry))
                place = place if findings[0].holds else None
            opened = common.open_registry(place) if place else None
            if record is not None:
                findings = verify_record(record, registry=opened, public_key=key)
            if findings[0].holds:  # else it is nobody's whom one knows
                file = key or (opened.path / PUBLIC if opened else Path())
                findings.append(whose_key(opened, record, file, given))
            findings += continues(opened, since) if opened and since else ()
        if as_json:
            print_json([asdict(finding) for finding in findings])
        else:
            tables.print_findings(findings)
            if record is not None and findings[0].holds:
                told = RemovalRecord.parse(record.read_bytes(), source=str(record))
                if opened is None:
                    tables.print_record(told)
                else:
                    say(told.limits)
        if any(finding.holds is False for finding in findings):
            raise typer.Exit(1)


def _verify_pack(path: Path, as_json: bool, *, alone: bool) -> None:
    """Check what `fedcompo export --egress` wrote; its hash is for a person to compare."""
    if not alone:
        raise ConfigError("An egress pack is checked by itself: leave the other options out.")
    from fedcompo.export.pack import verify_pack
    from fedcompo.storage.tensorstream import file_sha256

    findings = verify_pack(path)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        tables.print_findings(findings)
        say(f"{EGRESS} has SHA-256 {file_sha256(path)}: it must be the one that was signed.")
    if any(finding.holds is False for finding in findings):
        raise typer.Exit(1)


def _witness_of(
    record: Path | None, registry: Path | None, public_key: str | None
) -> tuple[Path | None, Path | None]:
    """Find what is checked, or what a record is checked with: a registry, or else a key."""
    if record is None or registry is not None:
        return common.registry_path(registry), None
    given = Path(public_key) if public_key and Path(public_key).is_file() else None
    if given is not None:
        return None, given
    for home in (record.absolute().parent.parent, common.registry_path(None)):
        if (home / "registry.json").is_file():
            return home, None
    beside = record.with_suffix(".pem")
    if not beside.is_file() and public_key:
        raise ConfigError(
            "A fingerprint says which key it must be, but checks no signature. Get the key, too: "
            f"`fedcompo request-removal` wrote it beside the record, here {beside}, and it is the "
            "registry's public.pem. Or add --registry."
        )
    if not beside.is_file():
        raise ConfigError(
            f"{record} is checked with its registry, or with a public key: add --registry, or "
            "--public-key FILE."
        )
    return None, beside


def checkpoint(
    registry: common.RegistryOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: print it.")
    ] = None,
    signing_key: common.SigningKeyOption = None,
    verbose: common.VerboseOption = False,
) -> None:
    """Sign the registry's root and the end of its journal, to publish or to keep elsewhere.

    `fedcompo verify --since FILE` holds the registry against it later.
    """
    with common.errors_as_sentences(verbose):
        from fedcompo.registry.checkpoint import Checkpoint
        from fedcompo.registry.signing import signer_for
        from fedcompo.storage.files import write_atomically

        opened = common.open_registry(registry)
        stated = Checkpoint.of(opened.identity, opened.state)
        data = stated.sealed(signer_for(opened.path, signing_key))
        if output is None:
            typer.echo(data.decode(), nl=False)
            return
        write_atomically(output, data)
        say(f"Wrote {output}: root and line {stated.root}@{stated.sequence}")


def rotate_key(
    registry: common.RegistryOption = None,
    signing_key: common.SigningKeyOption = None,
    new_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of the new private key, made if it is not there; default: key.pem in the "
            "registry, if the old one is there.",
        ),
    ] = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Give the registry another key, and delete the old private key.

    The old key signs for the new one: clients that know the old one follow. Earlier receipts are
    checked with the key of their time.
    """
    with common.errors_as_sentences(verbose):
        from fedcompo.registry.rotation import rotate
        from fedcompo.registry.signing import fingerprint_of, place_of_key

        opened = common.open_registry(registry)
        old = place_of_key(opened.path, signing_key)
        rotation = rotate(opened, key=signing_key, new_key=new_key)
        place = new_key or old
        keys = {"before": fingerprint_of(rotation.before), "now": fingerprint_of(rotation.after)}
        if as_json:
            print_json({**keys, "line": rotation.sequence, "private_key": str(place.absolute())})
            return
        say(f"The key is {keys['now']} now (SHA-256), before {keys['before']}.")
        say(
            f"The private key lies in {place}; the old one was deleted. Copies are yours to delete."
        )
        say("Tell those who check receipts the new fingerprint.")
