"""All errors that fedcompo raises on purpose.

::

    FedcompoError
    ├── ConfigError          a setting is unknown, of the wrong type or out of range
    ├── DataError            images or classes that cannot be used
    ├── BackboneError        pre-trained weights that cannot be found, read or adapted
    │   └── BackboneMismatch two parties hold different pre-trained weights
    ├── FileFormatError      a file or message that is truncated, altered or of another kind
    ├── ContributionError    a contribution whose tensors cannot enter a composition
    ├── RegistryError        a registry that cannot be opened, or cannot do what it is asked
    │   ├── RegistryLocked   another process is changing it
    │   └── RegistryDamaged  its files do not say what they should
    ├── TooFewClients        fewer usable clients than the run needs
    ├── LaunchError          a simulation that could not start or did not finish
    └── ServiceError         a registry's service, or a hub, that refuses or cannot be reached

A message says what is wrong, what was expected, what was found and how to fix it. It may hold
paths, names of files and what is in them, so it stays on the machine where it was raised. What a
client tells the server of it is ``told``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self


class FedcompoError(Exception):
    """Base class of all errors below; catch it to catch them all.

    Args:
        message: For whoever owns the machine.
        told: What the other side may read of it, one sentence without a full stop: no path, no name
            of a file, nothing of its content. Empty: nothing but the kind of error.
    """

    def __init__(self, message: str = "", *, told: str = "") -> None:
        super().__init__(message)
        self.told = told

    @classmethod
    def public(cls, message: str) -> Self:
        """Make an error whose whole message the other side may read: of settings and numbers."""
        return cls(message, told=message)


class ConfigError(FedcompoError, ValueError):
    """A setting is unknown, of the wrong type or out of range. Lists every fault at once."""


class DataError(FedcompoError, ValueError):
    """Images or classes that cannot be used; names the file, folder or class."""


class BackboneError(FedcompoError):
    """Pre-trained weights that cannot be found, read or adapted."""


class BackboneMismatch(BackboneError):
    """Two parties hold different pre-trained weights; names both fingerprints."""


class FileFormatError(FedcompoError):
    """A file or message that is truncated, altered or of another kind."""


class ContributionError(FedcompoError, ValueError):
    """A contribution whose tensors cannot enter a composition; names client and tensor."""

    client = ""
    """Without whom the others could enter; empty: not known."""


class RegistryError(FedcompoError):
    """A registry that cannot be opened, or cannot do what it is asked."""


class RegistryLocked(RegistryError):
    """Another process is changing the registry; says which, and since when."""


class RegistryDamaged(RegistryError):
    """A registry's files do not say what they should; names the file."""


class TooFewClients(FedcompoError):
    """Fewer usable clients than the run needs; names those left out and why."""


class LaunchError(FedcompoError):
    """A simulation that could not start or did not finish."""


class ServiceError(FedcompoError):
    """A registry's service that refuses, or cannot be reached; says which, and why."""


@contextmanager
def blaming(client: str) -> Iterator[None]:
    """Let a ``ContributionError`` that is raised within say whose contribution it is."""
    try:
        yield
    except ContributionError as error:
        error.client = client
        raise
