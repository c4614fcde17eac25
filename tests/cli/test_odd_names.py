"""Names of clients with brackets, number signs, pluses and commas, at every door."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cli_runs import run, told
from registry_builders import contents, member, registry_of
from service_runs import authority, credential, saved, served, server_credential

from fedcompo.config.run import RunConfig
from fedcompo.config.scenario import as_toml
from fedcompo.config.setting import names_of
from fedcompo.data.client_data import client_names
from fedcompo.errors import ConfigError
from fedcompo.export.model_card import escaped
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.report.units import listed

WARD, SMITH, LINK = "Ward (3) [east]", "Smith, J. & Co", "[A+B](#2) {x}"
EVERYONE = sorted((WARD, SMITH, LINK))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    classes = {WARD: ("cat", "dog"), SMITH: ("emu",), LINK: ("fox", "yak")}
    members = [member(who, seed=i, classes=own) for i, (who, own) in enumerate(classes.items())]
    registry_of(tmp_path / "registry", *members)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_a_registry_lists_composes_and_removes_them(home: Path) -> None:
    out = run("list").stdout
    assert all(f" {name} " in out for name in EVERYONE)
    assert SMITH in run("show", SMITH).stdout
    run("compose", "-o", "some", "--only", f'{WARD},"{SMITH}"')
    run("compose", "-o", "same", "--without", LINK)
    some, same = (contents(home / folder) for folder in ("some", "same"))
    assert some["model.safetensors"] == same["model.safetensors"]
    run("compose", "-o", "weighed", "--weights", f'"{SMITH}"=0.25, {WARD}=0.75')
    assert "There is no client 'Smith'" in run("compose", "-o", "x", "--only", SMITH, code=1).output
    run("compose", "-o", "x", "--only", f'"{SMITH}', code=2)
    said = run("remove", WARD, "--dry-run", "--data", "none").stdout
    assert f'Stays: "{SMITH}", {LINK}' in said
    run("remove", SMITH, "--yes")
    (receipt,) = (home / "registry" / "removals").iterdir()
    assert RemovalRecord.parse(receipt.read_bytes(), source="it").client == SMITH
    run("verify", receipt)
    run("verify")
    assert Registry("registry").clients == tuple(sorted((WARD, LINK)))


def test_the_card_of_a_model_shows_them_literally(home: Path) -> None:
    run("export", "-o", "model")
    card = re.sub(r"```.*?```", "", (home / "model" / "README.md").read_text(), flags=re.DOTALL)
    for name in EVERYONE:
        assert escaped(name) in card
        assert name not in card


def test_the_service_knows_them_by_their_certificates(home: Path) -> None:
    authority().save(home)
    server_credential().save(home, "server")
    new = "Ward #4, west"
    for name, stem in ((WARD, "ward"), (new, "new")):
        credential(name).save(home, stem)
    saved(member(new, seed=9, classes=("owl",)), home / "made")
    with served(Registry(home / "registry")) as address:
        to = ["--server", address, "--ca", "ca.crt"]
        own = [*to, "--certificate", "new.crt", "--key", "new.key"]
        assert told("publish", "made", *own)["client"] == new
        assert {m["client"] for m in told("members", *own)["members"]} == {new, *EVERYONE}
        run("fetch", "-o", "model", "--only", f'"{new}","{SMITH}"', *own)
        assert told("fetch", new, "-o", "mine", *own)["clients"] == [new]
        as_ward = [*to, "--certificate", "ward.crt", "--key", "ward.key"]
        run("publish", "made", *as_ward, code=1)


def test_a_deployment_takes_what_names_a_service_alone(home: Path) -> None:
    for name in EVERYONE:
        words = ("--server", "localhost", "--clients", f'a,"{name}"')
        assert "cannot name a service" in run("init-deployment", "fed", *words, code=2).output
    assert not (home / "fed").exists()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("  ", ()),
        ("a, b,c ", ("a", "b", "c")),
        ('"b, c",a', ("b, c", "a")),
        (' a , "b, c" ', ("a", "b, c")),
        ('a,"b, c":2', ("a", "b, c:2")),
        ("a,,b", ("a", "", "b")),
        (",", ("", "")),
        ('""', ("",)),
        ('a,"b', ("",)),
        ("a\nb", ("",)),
    ],
)
def test_a_name_with_a_comma_stands_in_quotes_in_a_list(text: str, names: Any) -> None:
    assert names_of(text) == names


def test_settings_name_them_and_so_do_the_files_of_settings(tmp_path: Path) -> None:
    values = {"exclude": f'{WARD}, "{SMITH}"', "joins": f'"{SMITH}":2,{LINK}:3', "seed": 1}
    assert tomllib.loads(as_toml(values)) == values
    config = RunConfig.parse(values)
    assert names_of(config.server.exclude) == (WARD, SMITH)
    with pytest.raises(ConfigError, match="in double quotes"):
        RunConfig.parse({"exclude": f'"{SMITH}'})
    for name in EVERYONE:
        (tmp_path / name / "train").mkdir(parents=True)
    folder = RunConfig.parse({"data": f"folder:{tmp_path}"})
    assert sorted(client_names(folder.data)) == EVERYONE
    assert listed([SMITH, "b"]) == f'"{SMITH}", b'
    assert names_of(listed(EVERYONE)) == tuple(EVERYONE)
