"""Measures a registry's model: accuracy by client, and whether it forgets a removed client."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.audit.evaluation import effect_of_removal as effect_of_removal
    from fedcompo.audit.evaluation import evaluate_clients as evaluate_clients
    from fedcompo.audit.measure import audit as audit
    from fedcompo.audit.membership import likelihood_ratio_attack as likelihood_ratio_attack
    from fedcompo.audit.membership import loss_attack as loss_attack
    from fedcompo.audit.report import print_audit as print_audit
    from fedcompo.audit.report import write_audit as write_audit

__all__, __getattr__, __dir__ = face(__name__)
