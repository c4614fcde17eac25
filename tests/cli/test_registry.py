"""Commands that look into a registry and change it: what they say, refuse, and leave alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from cli_runs import CLASSES, digits_registry, run, told
from forgery import reworded
from registry_builders import backbone, contents, member, registry_of, scale_by_hand

from fedcompo.cli.app import app
from fedcompo.cli.common import VARIABLE, listed_names, weights_of
from fedcompo.composition.head import head_of
from fedcompo.config.choices import Kind
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.errors import ConfigError
from fedcompo.names import printable
from fedcompo.registry import admission
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import LIMITS, REVEALS, RemovalRecord
from fedcompo.registry.state import PUBLIC
from fedcompo.registry.verification import verify_registry
from fedcompo.report.confusion import interval
from fedcompo.report.units import percent
from fedcompo.storage.files import CONTENT
from fedcompo.training.accuracy import accuracy_of

ODD = ("[/]", "[bold]7", ":smile:", "\x1b[31mred", "7\nRoot\r")
"""Names of classes that markup, emoji codes and terminals would swallow, or lines forged by one."""
RECORD = "000003-client-1.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_registry(tmp_path_factory.mktemp("digits") / "registry").path


@pytest.fixture
def home(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are given: a folder with a copy of the registry in it."""
    shutil.copytree(original, tmp_path / "registry", symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def odd(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with a client whose classes have odd names, which older versions took in."""
    monkeypatch.setattr(admission, "check_class_names", lambda names, owner: None)
    Registry("registry").add(member("odd", Kind.IA3, seed=8, classes=sorted(ODD)))
    return home


# -- list and show --------------------------------------------------------------------------------


def test_list_says_who_is_there(home: Path) -> None:
    out = run("list").stdout
    for client, classes in CLASSES.items():
        (line,) = (line for line in out.splitlines() if f" {client} " in line)
        assert f" {', '.join(classes)} " in line
        assert f" {Registry('registry').created[:10]} " in line
    assert f"Root {Registry('registry').state.root}" in out
    assert f"Model: {home / 'registry' / 'model'}" in out
    assert "Joint head of 6 classes, aligned on pre-trained features" in out


def test_list_for_programs_is_the_registry_itself(home: Path) -> None:
    registry, found = Registry("registry"), told("list")
    assert found["registry"] == str(home / "registry")
    assert (found["root"], found["backbone"]) == (registry.state.root, registry.state.base)
    assert (Path(found["model"]) / "model.safetensors").is_file()
    assert found["classes"] == list(registry.classes)
    assert found["settings"]["align_samples"] == registry.settings.align_samples
    assert (found["joint_head"], found["kept_versions"]) == ("aligned", [])
    shown = {row["client"]: row for row in found["clients"]}
    assert [(c, row["kind"], row["num_examples"]) for c, row in shown.items()] == [
        ("client-0", "full", 20),
        ("client-1", "lora", 20),
        ("client-2", "ia3", 20),
    ]
    assert (shown["client-0"]["shaped_by"], shown["client-0"]["shapes"]) == (["client-1"], [])
    assert (shown["client-1"]["shaped_by"], shown["client-1"]["shapes"]) == ([], ["client-0"])
    folder = home / "registry" / "clients" / "client-0"
    assert shown["client-0"]["bytes"] == sum(f.stat().st_size for f in folder.iterdir())
    assert shown["client-0"]["added"] == registry.entries()[1].time


def test_list_names_classes_that_may_be_one(home: Path) -> None:
    assert (told("list")["twins"], "Note" in run("list").stdout) == ([], False)
    Registry("registry").add(member("north", seed=7, classes=["Three", "seven"]))
    Registry("registry").add(member("west", seed=8, classes=["THREE", "nine"]))
    assert told("list")["twins"] == [{"THREE": ["west"], "Three": ["north"]}]
    assert "'THREE' (west), 'Three' (north)" in run("list").stdout


def test_an_empty_registry_can_be_listed(tmp_path: Path) -> None:
    registry_of(tmp_path / "r")
    assert "none, nobody is there" in run("list", "-r", tmp_path / "r").stdout
    assert told("list", "-r", tmp_path / "r")["model"] is None


def test_show_tells_all_of_a_member(home: Path) -> None:
    out, found = run("show", "client-0").stdout, told("show", "client-0")
    member = Registry("registry").member("client-0")
    assert found["files"] == member.files and len(member.files) == 3
    for text in ("full", "1, 6", "client-1", *member.files, *member.files.values()):
        assert text in out
    assert found["present"] is True
    assert found["lineage"]["anchored_by"] == ["client-1"]
    assert found["settings"] == RunConfig().of_client()
    assert [event["event"] for event in found["history"]] == ["added"]


def test_show_knows_who_was_there(home: Path) -> None:
    run("remove", "client-1", "--yes")
    out, found = run("show", "client-1").stdout, told("show", "client-1")
    assert found["present"] is False
    assert [(e["event"], e.get("record")) for e in found["history"]] == [
        ("added", None),
        ("removed", f"removals/{RECORD}"),
    ]
    assert "not any more" in out and f"removals/{RECORD}" in out


def test_show_tells_of_a_replacement(home: Path) -> None:
    registry = Registry("registry")
    registry.add(member("client-2", seed=7, classes=CLASSES["client-2"]), replacing=True)
    assert "to be replaced" in run("show", "client-2").stdout
    events = [event["event"] for event in told("show", "client-2")["history"]]
    assert events == ["added", "removed", "added"]


@pytest.mark.parametrize("command", ["show", "remove", "negate", "specialise", "export"])
def test_a_client_that_is_unknown_is_compared_with_those_there_are(
    home: Path, command: str
) -> None:
    arguments = {
        "negate": ["clent-1", "-o", "x"],
        "specialise": ["clent-1", "-o", "x"],
        "export": ["--client", "clent-1", "-o", "x"],
    }
    error = run(command, *arguments.get(command, ["clent-1"]), code=1).stderr
    assert "There is no client 'clent-1'" in error
    assert "Did you mean 'client-1'?" in error
    assert not (home / "x").exists()


@pytest.mark.parametrize("arguments", [("show", "odd"), ("remove", "odd", "--dry-run")])
def test_names_are_printed_as_they_are(odd: Path, arguments: tuple[str, ...]) -> None:
    assert_clean(run(*arguments).stdout, *ODD)


def test_names_are_listed_as_they_are(odd: Path) -> None:
    for name in ODD:  # a list has room for the first of them
        Registry("registry").add(member("odd", classes=[name]), replacing=True)
        assert_clean(run("list").stdout, name)


def assert_clean(out: str, *names: str) -> None:
    assert [name for name in names if printable(name) not in out] == []
    assert "\x1b" not in out
    assert "7\nRoot" not in out


def test_names_come_whole_out_of_json(odd: Path) -> None:
    assert told("show", "odd")["classes"] == sorted(ODD)
    assert "\x1b" not in run("list", "--json").stdout


def test_a_path_is_printed_as_it_is(home: Path) -> None:
    (home / "registry").rename(home / "[bold]r:smile:")
    out = run("list", "-r", "[bold]r:smile:").stdout
    assert "".join(out.split()).count("[bold]r:smile:") == 2  # wherever lines break
    assert "[bold]r:smile:" in run("remove", "client-1", "--yes", "-r", "[bold]r:smile:").stdout


# -- which registry -------------------------------------------------------------------------------


def test_the_registry_is_named_or_near(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = registry_of(home / "other", member("else")).path
    assert "client-0" in run("list").stdout  # ./registry
    monkeypatch.chdir(other)
    assert "else" in run("list").stdout  # where one stands
    assert "client-0" in run("list", "--registry", home / "registry").stdout
    monkeypatch.setenv(VARIABLE, str(home / "registry"))
    assert "client-0" in run("list").stdout
    assert "else" in run("list", "-r", other).stdout
    monkeypatch.setenv(VARIABLE, "")
    assert "else" in run("list").stdout


@pytest.mark.parametrize("command", ["list", "verify"])
def test_without_a_registry_the_answer_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert "There is no registry at ." in run(command, code=1).output
    assert "nowhere" in run(command, "-r", "nowhere", code=1).output
    assert list(tmp_path.iterdir()) == []


# -- add ------------------------------------------------------------------------------------------


@pytest.fixture
def mail(home: Path) -> Path:
    """Contributions that came by mail."""
    member("new", seed=5, classes=("3", "4")).save(home / "mail" / "new")
    member("client-2", seed=6, classes=CLASSES["client-2"]).save(home / "mail" / "client-2")
    return home / "mail"


def test_add_takes_what_came_by_mail(home: Path, mail: Path) -> None:
    out = run("add", mail / "new").stdout
    assert out.startswith("Added new.\n4 clients, 8 classes.")
    assert Registry("registry").clients == ("client-0", "client-1", "client-2", "new")
    run("verify")


def test_add_replaces_only_when_told_to(home: Path, mail: Path) -> None:
    before = contents(home / "registry")
    error = run("add", mail / "new", mail / "client-2", code=1).stderr
    assert "Client 'client-2' is in the registry" in error and "--replace" in error
    assert contents(home / "registry") == before  # all or none
    found = told("add", mail / "new", mail / "client-2", "--replace")
    assert (found["added"], found["replaced"]) == (["new"], ["client-2"])
    assert found["root"] == Registry("registry").state.root
    assert found["clients"] == ["client-0", "client-1", "client-2", "new"]
    assert "Replaced new, client-2" not in run("add", mail / "new", "--replace").stdout
    run("verify")


def test_add_refuses_what_is_damaged_or_absent(home: Path, mail: Path) -> None:
    before = contents(home / "registry")
    data = (mail / "new" / CONTENT).read_bytes()
    (mail / "new" / CONTENT).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    error = run("add", mail / "client-2", mail / "new", "--replace", code=1).stderr
    assert "was altered" in error and str(mail / "new" / CONTENT) in error
    assert "nowhere" in run("add", "nowhere", code=1).stderr
    assert contents(home / "registry") == before


# -- remove ---------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_happen_and_changes_no_byte(home: Path) -> None:
    before = contents(home / "registry")
    out = run("remove", "client-1", "--dry-run").stdout
    assert contents(home / "registry") == before
    for text in (
        "clients/client-1",
        "classes of the joint head: 0, 7",
        "compositions that contain it: versions/000002",
        "Stays: client-0, client-2",
        "anchored by its Fisher: client-0",
        "train again: client-0",
    ):
        assert text in out


def test_a_dry_run_measures_the_effect_on_the_clients_own_digits(home: Path) -> None:
    """Held against the library, before and after."""
    registry, config = Registry("registry"), RunConfig()
    accuracy = told("remove", "client-1", "--dry-run")["accuracy"]
    out = run("remove", "client-1", "--dry-run").stdout
    pool = registry.pool()
    compositions = {
        "before": (pool, registry.joint_head()),
        "after": (pool.without("client-1"), head_of(pool.without("client-1"), registry.settings)),
    }
    for moment, (members, head) in compositions.items():
        scale = scale_by_hand(members, backbone().theta_0)
        theta = members.compose(backbone().theta_0, scale=scale)
        assert set(accuracy[moment]) == set(members.clients)
        for partition in range(3):
            name = f"client-{partition}"
            if name not in members.clients:
                continue
            own = load_client_data(
                config.data, backbone().preprocessing, partition=partition, seed=config.seed
            )
            found = accuracy_of(backbone(), theta, head, own.classes, own.test)
            assert accuracy[moment][name] == {
                "class_il_accuracy": found.class_il,
                "interval": interval(found.class_il, len(own.test.labels)),
                "task_il_accuracy": found.task_il,
                "num_examples": len(own.test.labels),
            }
            (line,) = (line for line in out.splitlines() if f" {name} " in line and "│" in line)
            assert f" {percent(found.class_il)} " in line
    assert accuracy["before"]["client-0"] != accuracy["after"]["client-0"]


def test_a_dry_run_without_data_at_hand_says_why(home: Path) -> None:
    arguments = "remove", "client-1", "--dry-run", "--data", "folder:/nowhere"
    assert "was not measured: " in run(*arguments).stdout
    assert "/nowhere" in told(*arguments)["accuracy"]["reason"]


def test_a_removal_asks_first(home: Path) -> None:
    before = contents(home / "registry")
    result = run("remove", "client-1", code=1, answer="n\n")
    assert "Remove client-1 from registry?" in result.stdout
    assert "--yes does without" in run("remove", "client-1", code=1).stdout  # nobody answers
    assert contents(home / "registry") == before
    run("remove", "client-1", answer="y\n")
    assert Registry("registry").clients == ("client-0", "client-2")


def test_a_removal_ends_with_its_record_and_how_to_check_it(home: Path) -> None:
    out = run("remove", "client-1", "--yes", "--requested-by", "them", "--reason", "why").stdout
    *_, last = out.splitlines()
    start = "Check it by: fedcompo "
    assert last.startswith(start)
    run(*last.removeprefix(start).split())
    path = home / "registry" / "removals" / RECORD
    record = RemovalRecord.parse(path.read_bytes(), source=str(path))
    assert (record.requested_by, record.reason) == ("them", "why")


def test_of_a_client_with_several_tasks_each_member_goes_by_itself(tmp_path: Path) -> None:
    members = (member(f"ada.task-{n}", seed=n, classes=(f"{n}",)) for n in range(2))
    registry = registry_of(tmp_path / "r", *members, member("ben", seed=2, classes=("2",))).path
    out = run("remove", "ada", "--yes", "-r", registry).stdout
    assert "ada has 2 members; each is removed by itself" in out
    assert out.count("Record: ") == 2
    assert Registry(registry).clients == ("ben",)


def test_a_removal_for_programs_prints_the_record(home: Path) -> None:
    before = contents(home / "registry")
    assert "--yes" in run("remove", "client-1", "--json", code=2).stderr  # nobody can be asked
    assert contents(home / "registry") == before
    reason = ":smile: [bold] é\u00a0\u202e"
    out = run("remove", "client-1", "--yes", "--json", "--reason", reason).stdout
    assert out == (home / "registry" / "removals" / RECORD).read_text()
    assert RemovalRecord.parse(out.encode(), source="it").reason == reason
    (home / "kept.json").write_text(out)
    run("verify", "kept.json")


@pytest.mark.parametrize("keep", [False, True])
def test_the_plan_says_which_compositions_are_kept(home: Path, keep: bool) -> None:
    options = ["--keep-versions"] if keep else []
    plan = told("remove", "client-1", "--dry-run", *options)
    out = run("remove", "client-1", "--yes", *options).stdout
    there = [str(p.relative_to(home / "registry")) for p in (home / "registry/versions").iterdir()]
    assert plan["goes"]["versions"] == ([] if keep else ["versions/000002"])
    assert plan["stays"]["versions"] == (["versions/000002"] if keep else [])
    assert sorted(there) == [*plan["stays"]["versions"], "versions/000003"]
    assert ("that contain it, as asked: versions/000002" in out) is keep
    assert ("that contain it: versions/000002" in out) is not keep


def test_a_removal_without_influence_says_so(home: Path) -> None:
    plan = told("remove", "client-2", "--dry-run")
    assert plan["influence_exact"] is True
    assert "nothing of it is left" in run("remove", "client-2", "--dry-run").stdout


def test_options_that_would_be_passed_over_are_refused(home: Path) -> None:
    before = contents(home / "registry")
    assert "--dry-run" in run("remove", "client-1", "--data", "digits", "-y", code=2).stderr
    assert "UTF-8" in run("remove", "client-1", "-y", "--reason", "\udcff", code=2).stderr
    assert contents(home / "registry") == before


# -- verify ---------------------------------------------------------------------------------------


def test_verify_says_that_all_holds(home: Path) -> None:
    claims = len(verify_registry(home / "registry")) + 1  # and whose key it is
    out = run("verify").stdout
    assert f"{claims} of {claims} claims hold, 0 fail" in out
    assert "14 files are unaltered" in out
    assert [finding["holds"] for finding in told("verify")] == [True] * claims


def test_verify_names_what_was_altered_and_fails(home: Path) -> None:
    path = home / "registry" / "clients" / "client-0" / CONTENT
    path.write_bytes(path.read_bytes()[:-1])
    out = run("verify", code=1).stdout
    assert f"FAILS: {CONTENT} of client-0 is unaltered: registry/clients/client-0" in out
    assert "1 fails" in out
    (failed,) = (f for f in told("verify", code=1) if not f["holds"])
    assert failed["claim"] == f"{CONTENT} of client-0 is unaltered"


def test_verify_checks_a_record_with_the_registry_or_the_key_alone(home: Path) -> None:
    run("remove", "client-1", "--yes")
    path = home / RECORD
    shutil.copy(home / "registry" / "removals" / RECORD, path)
    assert "0 fail" in run("verify", path).stdout
    assert len(told("verify", path)) > 10
    shutil.move(home / "registry", home / "elsewhere")
    assert "0 fail" in run("verify", home / "elsewhere" / "removals" / RECORD).stdout
    assert "add --registry" in run("verify", path, code=2).stderr
    shutil.copy(home / "elsewhere" / PUBLIC, path.with_suffix(".pem"))
    assert "2 of 2 claims hold" in run("verify", path).stdout
    path.with_suffix(".pem").unlink()
    assert "checks no signature" in run("verify", path, "--public-key", "0" * 64, code=2).stderr
    out = run("verify", path, "--public-key", home / "elsewhere" / PUBLIC).stdout
    assert "2 of 2 claims hold" in out
    for line in (r"who: +client-1, a lora task vector of", r"stays: +client-0, client-2\n"):
        assert re.search(line, out)
    assert "It does not prove that it was done" in out and LIMITS in out and REVEALS in out
    path.write_bytes(reworded(path.read_bytes(), "client-1", "client-9"))
    assert (
        "who:"
        not in run("verify", path, "--public-key", home / "elsewhere" / PUBLIC, code=1).stdout
    )
    (failed,) = told("verify", path, "--public-key", home / "elsewhere" / PUBLIC, code=1)
    assert "is signed by" in failed["claim"]  # and nothing says that the key has signed it
    assert "is no removal record" in run("verify", __file__, "-r", "elsewhere", code=1).stdout


def test_a_key_is_rotated_and_held_against_pins_and_checkpoints(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An auditor's machine has no pins: it needs the fingerprint."""
    own = shutil.copy(os.environ["FEDCOMPO_KNOWN"], tmp_path / "owner.json")  # others have copies
    monkeypatch.setenv("FEDCOMPO_KNOWN", str(own))
    run("checkpoint", "-o", "before.json")
    out = run("checkpoint").stdout
    root = Registry("registry").state.root
    keys = told("rotate-key")
    assert "signed by the key in registry/public.pem" in run("verify").stdout.replace("\n", " ")
    run("verify", "--since", "before.json")
    run("verify", "--since", f"{root}@2")
    assert "FAILS" in run("verify", "--since", f"{'0' * 64}@2", code=1).stdout
    Path("later.json").write_text(run("checkpoint").stdout)
    assert out.startswith('{"payload":')
    monkeypatch.setenv("FEDCOMPO_KNOWN", str(tmp_path / "auditor.json"))
    failed = [f for f in told("verify", code=1) if f["holds"] is False]
    assert [f["claim"].endswith("which this machine knows") for f in failed] == [True]
    assert f"--public-key {keys['now']}" in failed[0]["detail"]
    for key in (keys["now"], keys["before"], "registry/public.pem"):
        run("verify", "--public-key", key, "--since", "later.json")
    run("verify", "--public-key", "0" * 64, code=1)
    assert "neither a PEM file" in run("verify", "--public-key", "nothing", code=2).stderr


def test_an_open_claim_is_no_failure(home: Path) -> None:
    run("remove", "client-1", "--yes")
    run("remove", "client-2", "--yes")
    out = run("verify", f"registry/removals/{RECORD}").stdout
    assert "0 fail, 4 cannot be derived again" in out
    assert "open: the survivors alone" in out
    found = told("verify", f"registry/removals/{RECORD}")
    assert sum(finding["holds"] is None for finding in found) == 4


# -- the program ----------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, click.Command]]:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    yield from group.commands.items()


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[n for n, _ in commands()])
def test_every_option_is_explained(
    name: str, command: click.Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = " ".join(run(name, "--help").stdout.split())
    summary, *_ = (command.help or "").splitlines()
    assert summary in out
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert option.opts[0] in out
            assert " ".join(option.help.split())[:40] in out.replace(" │ │ ", " ")
        else:
            assert option.make_metavar(click.Context(command)).strip("[]. ") in out


def test_a_real_process_keeps_its_output_clean(home: Path) -> None:
    command = [sys.executable, "-m", "fedcompo.cli", "remove", "client-1", "--yes", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=home)
    assert done.stdout == (home / "registry" / "removals" / RECORD).read_text()
    assert done.stderr == ""
    assert Registry("registry").clients == ("client-0", "client-2")


def test_an_error_of_the_system_is_a_sentence(home: Path) -> None:
    (home / "file").write_text("")
    error = run("export", "-o", "file/x", code=1).stderr
    assert error == "The system refuses: [Errno 17] File exists: 'file'\n"


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, ()), ("a", ("a",)), ("a,b-1", ("a", "b-1")), (" a , b ", ("a", "b"))],
)
def test_lists_of_names_are_split(text: str | None, expected: tuple[str, ...]) -> None:
    assert listed_names(text) == expected


@pytest.mark.parametrize("text", ["", " ", ",", "a,,b", "a,"])
def test_lists_with_an_empty_name_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no list of clients"):
        listed_names(text)


def test_weights_are_parsed() -> None:
    assert weights_of(None) is None
    assert weights_of("a=0.25, b = 0.75") == {"a": 0.25, "b": 0.75}
    assert weights_of("a=1,b=0") == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a", "not of the form"),
        ("a=", "not of the form"),
        ("=1", "not of the form"),
        (" =1", "not of the form"),
        ("a=x", "not of the form"),
        ("a=0.5,a=0.5", "not of the form"),
        ("a=0.5, a=0.5", "not of the form"),
        ("a=1,", "no list of clients"),
        ("", "no list of clients"),
        ("a=0.5,b=0.6", "sum to 1.1"),
        ("a=2,b=-1", "must be >= 0"),
        ("a=nan", "sum to nan"),
        ("a=inf", "sum to inf"),
        ("a=1e308,b=1e308", "sum to inf"),
        ("a=inf,b=-inf", "must be >= 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        weights_of(text)


def test_a_new_registry_is_empty_and_composes_as_its_settings_say(tmp_path: Path) -> None:
    made = told("create", tmp_path / "new", "--set", "rule=ties:density=0.5", "--set", "scale=2")
    opened = Registry(made["registry"])
    assert (opened.clients, opened.backbone.fingerprint) == ((), made["backbone"])
    assert (opened.settings.rule, opened.settings.scale) == ("ties:density=0.5", 2)
    assert told("list", "-r", opened.path)["clients"] == []
    said = run("create", opened.path, code=1).output
    assert "holds something already" in " ".join(said.split())
