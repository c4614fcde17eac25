"""Limits what a client's messages reveal: noise on statistics and Fisher."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.privacy.fisher import private_fisher as private_fisher
    from fedcompo.privacy.noise import noised as noised
    from fedcompo.privacy.statistics import private_sums as private_sums

__all__, __getattr__, __dir__ = face(__name__)
