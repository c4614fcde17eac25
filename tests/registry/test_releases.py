"""No release lays a client bare, whatever was released before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import run, told
from forgery import rewrite_line
from registry_builders import contents, member, registry_of

from fedcompo.errors import ConfigError, RegistryError
from fedcompo.export.release import STATEMENT, release
from fedcompo.registry import journal
from fedcompo.registry.envelope import opened
from fedcompo.registry.registry import Registry
from fedcompo.registry.releases import laid_bare
from fedcompo.registry.rotation import rotate
from fedcompo.registry.signing import signer_for
from fedcompo.registry.verification import verify_registry
from fedcompo.storage import files
from fedcompo.storage.files import WEIGHTS
from fedcompo.storage.tensorstream import StreamedTensors, file_sha256

NAMES = "ada", "ben", "cho", "dan"


def version(text: str) -> dict[tuple[str, str], float]:
    """Contributions such as ``a1 b1``: of a and of b, the first of each."""
    return {(part[:-1], part): 1.0 for part in text.split()}


@pytest.mark.parametrize(
    ("before", "now", "bare"),
    [
        ([], "a1", {"a"}),  # θ₀ is public
        ([], "a1 b1", set()),
        (["a1 b1 c1"], "b1 c1", {"a"}),
        (["a1 b1"], "a1 b1 c1", {"c"}),
        (["a1 b1 c1"], "a2 b1 c1", {"a"}),  # exchanged
        (["a1 b1 c1 d1"], "c1 d1", set()),
        (["a1 b1 c1 d1", "c1 d1"], "b1 c1 d1", {"a", "b"}),  # one less than the first
        (["a1 b1", "b1 c1"], "a1 c1", {"a", "b", "c"}),  # no two differ by one client
        (["a.task-01 a.task-11 b1 c1"], "b1 c1", {"a"}),  # two members of one client
        (["a.task-01 a.task-11 b1 c1"], "a.task-11 b1 c1", {"a"}),
        (["a.shard-01 a.shard-11 b1 c1"], "b1 c1", {"a"}),
        (["a1 b1 c1", "d1 e1"], "a1 b1 c1 d1 e1", set()),
    ],
)
def test_who_is_laid_bare_follows_from_all_versions(
    before: list[str], now: str, bare: set[str]
) -> None:
    found = laid_bare([version(text) for text in [*before, now]])
    assert {client for client, ways in found.items() if ways} == bare


def test_counts_and_newcomers_change_nothing_and_a_second_way_counts() -> None:
    weighted = [
        {("a", "1"): 3.0, ("b", "1"): 5.0, ("c", "1"): 7.0},
        {("b", "1"): 5.0, ("c", "1"): 7.0},
    ]
    assert laid_bare(weighted) == {"a": 1, "b": 0, "c": 0}
    again = [version(text) for text in ("a1 b1 c1", "b1 c1", "a2 b1 c1")]
    assert laid_bare(again)["a"] == 2


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Four clients, released as line 3."""
    made = registry_of(tmp_path / "registry", *(member(name) for name in NAMES))
    release(made, tmp_path / "first")
    return made


def refused(registry: Registry, match: str, **options: str) -> None:
    """A release is refused, in these words, and leaves nothing."""
    before = contents(registry.path.parent)
    with pytest.raises(RegistryError, match=match):
        release(registry, registry.path.parent / "refused", **options)
    assert contents(registry.path.parent) == before


def test_a_release_is_the_registrys_model_signed_and_in_the_journal(
    registry: Registry, tmp_path: Path
) -> None:
    theta = registry.theta_p()
    written = StreamedTensors(tmp_path / "first" / WEIGHTS)
    assert all(written[name].equal(theta[name]) for name in theta)
    envelope = opened((tmp_path / "first" / STATEMENT).read_bytes(), source="it")
    assert envelope.is_signed_by((registry.path / "public.pem").read_bytes())
    line = registry.entries()[-1]
    sha256 = file_sha256(tmp_path / "first" / WEIGHTS)
    assert envelope.statement["subject"][0]["digest"]["sha256"] == sha256
    assert envelope.statement["predicate"]["line"] == line.sequence
    assert line.details["weights_sha256"] == sha256
    assert line.clients == list(NAMES)
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_a_key_that_was_changed_while_one_waited_signs_no_release(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = signer_for(registry.path)
    rotate(registry)
    monkeypatch.setattr("fedcompo.export.release.signer_for", lambda path, key: old)
    with pytest.raises(ConfigError, match="is not that of"):
        release(registry, registry.path.parent / "refused")


def test_a_line_that_names_others_is_found(registry: Registry) -> None:
    lie = [{"client": name, "added": 2} for name in NAMES[1:]]
    rewrite_line(registry.path, 3, lambda details: {**details, "clients": lie})
    failing = [f.claim for f in verify_registry(registry.path) if f.holds is False]
    assert failing == ["line 3 names the members of the version that was released"]


def leaves(registry: Registry) -> None:
    registry.remove("ada")


def comes(registry: Registry) -> None:
    registry.add(member("eve"))


def is_exchanged(registry: Registry) -> None:
    registry.add(member("ada", seed=7), replacing=True)


@pytest.mark.parametrize("change", [leaves, comes, is_exchanged])
def test_a_version_that_differs_by_one_client_waits_or_says_whom_it_lays_bare(
    registry: Registry, tmp_path: Path, change: Callable[[Registry], None]
) -> None:
    change(registry)
    one = "eve" if change is comes else "ada"
    refused(registry, f"would lay bare {one}: .* --reveal {one}$")
    with pytest.raises(ConfigError, match="names ben, whom this version does not lay bare"):
        release(registry, tmp_path / "no", reveal=[one, "ben"])
    assert release(registry, tmp_path / "second", reveal=[one])["again"] is False
    assert registry.entries()[-1].details["revealed"] == [one]
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_who_comes_back_with_the_same_is_no_cover_and_older_releases_count(
    registry: Registry, tmp_path: Path
) -> None:
    """ada comes back on a new line: her column is the old one, and ben is all that changed."""
    leaves(registry)
    registry.remove("ben")
    release(registry, tmp_path / "second")
    registry.add(member("ada"))
    refused(registry, "would lay bare ada, ben: ")  # ben too: who left between first and this
    registry.add(member("eve"))
    assert not release(registry, tmp_path / "third")["again"]


def test_nobody_and_a_single_client_are_not_released(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "registry")
    run("release", "-o", tmp_path / "model", "-r", registry.path, code=1)
    registry.add(member("ada"))
    refused(registry, "would lay bare ada: with the pre-trained weights and the 0 versions")


def test_a_policy_is_kept_and_changed_by_a_release_that_keeps_it(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ["2030-01-01T00:00:00Z"]
    monkeypatch.setattr(journal, "utc_now", lambda: clock[0])
    with pytest.raises(ConfigError, match="neither a number of changes"):
        release(registry, tmp_path / "no", every="3 d")
    leaves(registry)
    comes(registry)
    refused(registry, r"every 3 changes .* there were 2 \(ada, eve\)", every="3")
    release(registry, tmp_path / "second", every="2")
    refused(registry, r"every 2 changes .* there were 0 \(–\)", every="1")  # not by the same bits
    registry.add(member("fay"))
    refused(registry, "would lay bare fay")
    registry.add(member("gus"), member("hal"))
    clock[0] = "2031-01-01T00:00:00Z"
    release(registry, tmp_path / "third", every="7d")
    clock[0] = "2031-01-07T23:00:00Z"
    registry.add(member("ida"), member("jan"))
    refused(registry, "every 7 days; since 2031-01-01T00:00:00Z there were 7.0 days")
    clock[0] = "2031-01-08T00:00:00Z"
    release(registry, tmp_path / "fourth")
    assert registry.entries()[-1].details["every"] == "7d"


@pytest.mark.parametrize("is_noted", [True, False])
def test_a_crash_leaves_no_release_that_the_journal_does_not_know(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_noted: bool
) -> None:
    leaves(registry)
    comes(registry)
    before, put = registry.entries(), files.put_in_place

    def dies(*given: Path) -> None:
        if is_noted and given[-1] != tmp_path / "second":
            return put(*given)
        raise KeyboardInterrupt

    where = "storage.files.put_in_place" if is_noted else "registry.draft.Draft.finish"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(f"fedcompo.{where}", dies)
        release(registry, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    assert len(registry.entries()) == len(before) + is_noted
    written = release(registry, tmp_path / "second")
    assert (written["again"], written["line"]) == (is_noted, len(before) + 1)
    assert all(finding.holds for finding in verify_registry(registry.path))


def test_the_command_releases_and_list_says_what_changed_since(tmp_path: Path) -> None:
    place = tmp_path / "registry"
    registry = registry_of(place, *(member(name) for name in NAMES))
    assert told("list", "-r", place)["release"] is None
    out = run("release", "-o", tmp_path / "a", "-r", place, "--every", "1").stdout
    assert "Released: line 3 of the journal" in " ".join(out.split())
    again = told("release", "-o", tmp_path / "b", "-r", place)
    assert (again["again"], again["line"]) == (True, 3)
    assert (tmp_path / "a" / STATEMENT).read_bytes() == (tmp_path / "b" / STATEMENT).read_bytes()
    assert not (place / "pending").exists()
    registry.refresh()
    leaves(registry)
    assert told("list", "-r", place)["release"]["changed_since"] == ["ada"]
    assert "Changed since: ada; a release every 1" in " ".join(
        run("list", "-r", place).stdout.split()
    )
    assert "--reveal ada" in run("release", "-o", tmp_path / "c", "-r", place, code=1).stderr
    run("release", "-o", tmp_path / "c", "-r", place, "--reveal", "ada")
    assert (
        json.loads(run("show", "ada", "-r", place, "--json").stdout)["history"][1]["event"]
        == "released"
    )
