"""The ``fedcompo`` command: one file for each group of commands.

A command imports what it needs when it runs, so that help, refusals and whatever only reads a
registry answer at once.
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.cli.app import main as main

__all__, __getattr__, __dir__ = face(__name__)
