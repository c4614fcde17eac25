"""One model of many task vectors, exactly.

The sum of the task vectors is kept in integers, so that adding and taking out are exact and the
order of clients does not matter; so are their statistics. Here are these sums, the rules that may
take their place, the factor on them and the vote that chooses it, the joint head, versions of a
model on disk, and folders that timm loads.
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.composition.diagnostics import Diagnostics as Diagnostics
    from fedcompo.composition.diagnostics import diagnose as diagnose
    from fedcompo.composition.fixed_point import Term as Term
    from fedcompo.composition.head import joint_head as joint_head
    from fedcompo.composition.models import load_tangent_model as load_tangent_model
    from fedcompo.composition.running_sum import RunningSum as RunningSum
    from fedcompo.composition.scale import Factor as Factor
    from fedcompo.composition.settings import CompositionSettings as CompositionSettings
    from fedcompo.composition.timm_folder import export_timm as export_timm

__all__, __getattr__, __dir__ = face(__name__)
