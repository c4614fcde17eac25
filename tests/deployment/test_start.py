"""A client's start script: what it checks before it starts Flower, and how it starts it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from deployed_federation import WITHOUT_OVERRIDE, settle
from guarded import START_SECONDS

from fedcompo.deployment import folders
from fedcompo.deployment.approval import authority_of
from fedcompo.deployment.plan import Deployment
from fedcompo.engine.launcher import find_app

MISCONFIGURED = 78
"""EX_CONFIG: another start would fail again."""

FAKE = f"""\
#!/bin/sh
case "$*" in
    "-P -m fedcompo.deployment.node "*) shift 3 ;;
    *) exec {sys.executable} "$@" ;;
esac
for argument in "$@"; do echo "$argument"; done
env
umask
"""
READY = re.compile(r"Process (\d+) is ready")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployment") / "fed"
    folders.create(folder, Deployment("fed.example.org", ("a",)), find_app(), with_keys=True)
    return folder / "clients" / "a"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with a ``python3`` that prints how the node was started."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("flower-supernode", "python3"):
        (folder / name).write_text(FAKE)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def client(written: Path, tmp_path: Path) -> Path:
    """A client on its machine, with images in a folder whose name has a space."""
    (tmp_path / "my images").mkdir()
    settle(written, tmp_path / "a", tmp_path / "my images")
    conf = tmp_path / "a" / "client.conf"
    conf.write_text(conf.read_text().replace("DATA=", 'DATA="').replace(" images\n", ' images"\n'))
    return tmp_path / "a"


def start(
    client: Path, programs: Path, *, ordinary: bool = True, code: int = 0
) -> subprocess.CompletedProcess[str]:
    path = [str(programs), sysconfig.get_path("scripts"), os.environ["PATH"]]
    words = WITHOUT_OVERRIDE if ordinary and os.geteuid() == 0 else []
    done = subprocess.run(
        [*words, client / "start"],
        cwd="/",
        env={**os.environ, "PATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_flower_is_started_with_keys_and_settings(client: Path, programs: Path) -> None:
    said = start(client, programs).stdout.splitlines()
    options = dict(zip(said[0:10:2], said[1:10:2], strict=True))
    data = client.parent / "my images"
    assert options == {
        "--superlink": "fed.example.org:8443",
        "--root-certificates": "certificates/ca.crt",
        "--auth-supernode-private-key": "certificates/supernode",
        "--port": "19094",
        "--node-config": f'client="a" data="{data}" device="cpu" state="{client}/state"',
    }
    assert f"FLWR_HOME={client}/flower" in said
    assert f"TMPDIR={client}/state/tmp" in said
    assert "OMP_NUM_THREADS=1" in said
    assert "FLWR_TELEMETRY_ENABLED=0" in said
    assert said[-1] == "0077"
    assert "--insecure" not in said


def test_flower_understands_the_settings_of_the_node(client: Path, programs: Path) -> None:
    from flwr.common.config import parse_config_args

    conf = client / "client.conf"
    conf.write_text(
        conf.read_text()
        .replace("KIND=\n", "KIND=full\n")
        .replace("CAPS=\n", "CAPS='min-images=20 wire=\"int8\"'\n")
    )
    said = start(client, programs).stdout.splitlines()
    assert parse_config_args([said[said.index("--node-config") + 1]]) == {
        "client": "a",
        "data": str(client.parent / "my images"),
        "device": "cpu",
        "state": f"{client}/state",
        "kind": "full",
        "min-images": 20,
        "wire": "int8",
    }


def test_the_app_cannot_be_joined_by_another(client: Path, programs: Path) -> None:
    start(client, programs)
    start(client, programs)  # and again, though it is write-protected now
    apps = client / "flower" / "apps"
    assert not stat.S_IMODE(apps.stat().st_mode) & 0o222
    assert len(list(apps.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may write everywhere")
def test_whoever_may_write_everywhere_is_refused(client: Path, programs: Path) -> None:
    said = start(client, programs, ordinary=False, code=MISCONFIGURED).stderr
    assert "flower/apps can be written to" in said
    assert "ordinary user" in said
    assert len(list((client / "flower" / "apps").iterdir())) == 1


def test_a_killed_process_that_was_ready_is_replaced_and_none_outlives_the_node(
    client: Path, tmp_path: Path
) -> None:
    words = WITHOUT_OVERRIDE if os.geteuid() == 0 else []
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    log = tmp_path / "log"
    with log.open("w") as sink:  # it looks for its server, which there is not, for ever
        node = subprocess.Popen(
            [*words, client / "start"], env={**os.environ, "PATH": path}, stdout=sink, stderr=sink
        )
    try:
        ready = [int(one) for one in waited(log, READY, 1)]
        os.kill(ready[0], signal.SIGKILL)
        ready = [int(one) for one in waited(log, READY, 2)]
        assert ready[0] != ready[1]
        node.send_signal(signal.SIGTERM)
        node.wait(30)
        deadline = time.monotonic() + 30
        while any(map(running, ready)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(running, ready))
    finally:
        node.kill()  # what it started ends with it


def running(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def waited(log: Path, wanted: re.Pattern[str], count: int) -> list[str]:
    """Wait until a log says something so often; returns what the pattern captures."""
    deadline = time.monotonic() + START_SECONDS
    while len(found := wanted.findall(log.read_text())) < count:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found


def unpacked(client: Path) -> Path:
    (app,) = (client / "flower" / "apps").iterdir()
    return app


def test_an_app_that_was_altered_is_not_started(client: Path, programs: Path) -> None:
    with (unpacked(client) / "clients" / "app.py").open("a") as file:
        file.write("# harmless\n")
    said = start(client, programs, code=MISCONFIGURED)
    assert "clients/app.py: FAILED" in said.stdout
    assert "not the one that this client was given" in said.stderr


def test_an_app_that_lacks_a_file_is_not_started(client: Path, programs: Path) -> None:
    (unpacked(client) / "clients" / "local.py").unlink()
    assert "not the one" in start(client, programs, code=MISCONFIGURED).stderr


def test_an_app_that_lies_beside_it_is_not_started(client: Path, programs: Path) -> None:
    shutil.copytree(unpacked(client), unpacked(client).with_name("other.app.1.0.0.12345678"))
    assert "holds more than the app" in start(client, programs, code=MISCONFIGURED).stderr


def test_another_version_of_the_library_is_not_started(client: Path, programs: Path) -> None:
    digests = client / "library.sha256"
    lines = digests.read_text().splitlines(keepends=True)
    changed = [f"{'0' * 64}  errors.py\n" if "  errors.py" in line else line for line in lines]
    assert changed != lines
    digests.write_text("".join(changed))
    said = start(client, programs, code=MISCONFIGURED)
    assert "errors.py: FAILED" in said.stdout
    assert "the installed fedcompo" in said.stderr


def test_a_client_that_runs_already_is_not_started_again(client: Path, programs: Path) -> None:
    start(client, programs)
    with (client / "state" / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        said = start(client, programs, code=1).stderr
    assert said.splitlines()[-1] == (
        "start: a runs in this folder already; end it before you start it again."
    )
    start(client, programs)


@pytest.mark.parametrize("key", ["DATA", "DEVICE", "KIND", "THREADS", "PORT"])
def test_a_setting_that_is_missing_is_named(client: Path, programs: Path, key: str) -> None:
    conf = client / "client.conf"
    lines = conf.read_text().splitlines()
    conf.write_text("\n".join(line for line in lines if not line.startswith(f"{key}=")))
    assert f"client.conf sets no {key}" in start(client, programs, code=78).stderr


def test_without_images_the_setting_is_named(client: Path, programs: Path) -> None:
    shutil.rmtree(client.parent / "my images")
    said = start(client, programs, code=MISCONFIGURED).stderr
    assert "DATA in client.conf does not exist" in said
    assert "my images" in said


def test_without_flower_the_command_to_install_it_is_named(client: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", client / "start"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == MISCONFIGURED
    assert "venv/bin/pip install" in done.stderr


def test_nothing_starts_with_a_certificate_that_has_ended(
    written: Path, client: Path, programs: Path, tmp_path: Path
) -> None:
    authority = authority_of(written.parents[1])
    server = Path(shutil.copytree(written.parents[1] / "server", tmp_path / "server"))
    for certificates, ended in (
        (client / "certificates", authority.issue_client("a", days=-1)),
        (server / "certificates", authority.issue_server(["x.org"], days=-1)),
    ):
        (stem,) = {path.stem for path in certificates.glob("*.key")}
        for file in (certificates / f"{stem}.crt", certificates / f"{stem}.key"):
            file.unlink()
        ended.save(certificates, stem)
    said = start(client, programs, code=MISCONFIGURED)
    assert "The certificate of a ended on 20" in said.stderr
    assert not said.stdout
    for words, code in ((["./start-superlink"], MISCONFIGURED), (["./run"], 2)):
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        done = subprocess.run(
            words, cwd=server, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (code, "")
        assert "The server's certificate ended on 20" in done.stderr
