"""Limits what a client's messages reveal: noise, and smaller forms of the Fisher diagonal."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.privacy.factored import reduced as reduced
    from fedcompo.privacy.factored import restored as restored
    from fedcompo.privacy.fisher import private_fisher as private_fisher
    from fedcompo.privacy.noise import noised as noised
    from fedcompo.privacy.statistics import private_mixtures as private_mixtures

__all__, __getattr__, __dir__ = face(__name__)
