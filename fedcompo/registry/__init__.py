"""The pool on disk: add a client, remove one exactly, compose, verify.

A registry is a folder. Its state names every file with its SHA-256, its journal chains every
change, and each removal leaves a signed record. Reading what a registry holds needs no torch.
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.registry.inspection import removal_plan as removal_plan
    from fedcompo.registry.inspection import summary as summary
    from fedcompo.registry.reader import RegistryReader as RegistryReader
    from fedcompo.registry.record_verification import verify_record as verify_record
    from fedcompo.registry.rederivation import Finding as Finding
    from fedcompo.registry.registry import Registry as Registry
    from fedcompo.registry.removal import Influence as Influence
    from fedcompo.registry.removal import RemovalRecord as RemovalRecord
    from fedcompo.registry.state import Member as Member
    from fedcompo.registry.state import State as State
    from fedcompo.registry.verification import verify_registry as verify_registry

__all__, __getattr__, __dir__ = face(__name__)
