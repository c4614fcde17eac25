"""Machines for tests: network namespaces on one switch, which nothing outside can reach."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

NETWORK = "192.0.2"
"""Kept for documentation (RFC 5737): nobody has these addresses."""
CABLE = "cable"


@dataclass(frozen=True)
class Machines:
    """Machines by name; the first of them is also the switch."""

    addresses: dict[str, str]
    namespaces: dict[str, str]
    """Empty where namespaces are not allowed: all machines are then this one's loopback."""

    @property
    def separate(self) -> bool:
        """Whether each has a network of its own."""
        return bool(self.namespaces)

    def on(self, machine: str) -> list[str]:
        """Words that make the command behind them run on a machine."""
        return ["ip", "netns", "exec", self.namespaces[machine]] if self.separate else []

    def plug(self, machine: str, *, plugged: bool) -> None:
        """Plug in or unplug a machine's cable, or skip the test if there is none."""
        if not self.separate:
            pytest.skip("network namespaces are not allowed here")
        # At the switch: an interface that is set down at home would lose its settings.
        end = f"port-{list(self.namespaces).index(machine)}"
        switch = next(iter(self.namespaces.values()))
        _ip("-n", switch, "link", "set", end, "up" if plugged else "down")

    @classmethod
    @contextlib.contextmanager
    def connected(cls, names: Sequence[str]) -> Iterator[Machines]:
        """Machines that reach each other while the context lasts."""
        namespaces = {name: f"fedcompo-{os.getpid()}-{i}" for i, name in enumerate(names)}
        with contextlib.ExitStack() as stack:
            try:
                for position, name in enumerate(namespaces.values()):
                    _ip("netns", "add", name)
                    stack.callback(_ip, "netns", "del", name)
                    _wire(name, position, switch=namespaces[names[0]])
                addresses = {name: _address(i) for i, name in enumerate(names)}
            except (OSError, subprocess.CalledProcessError):
                stack.close()
                namespaces, addresses = {}, dict.fromkeys(names, "127.0.0.1")
            yield cls(addresses, namespaces)


def _wire(name: str, position: int, *, switch: str) -> None:
    """Connect a namespace with the switch, which lies in the first one."""
    _ip("-n", name, "link", "set", "lo", "up")
    if name == switch:
        _ip("-n", name, "link", "add", CABLE, "type", "bridge")
    else:
        port = f"port-{position}"
        _ip("-n", name, "link", "add", CABLE, "type", "veth", "peer", port, "netns", switch)
        _ip("-n", switch, "link", "set", port, "master", CABLE, "up")
    _ip("-n", name, "addr", "add", f"{_address(position)}/24", "dev", CABLE)
    _ip("-n", name, "link", "set", CABLE, "up")


def _address(position: int) -> str:
    return f"{NETWORK}.{position + 1}"


def _ip(*words: str) -> None:
    tool = shutil.which("ip", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if tool is None:
        raise FileNotFoundError("ip")
    subprocess.run([tool, *words], check=True, capture_output=True)
