"""What a client computes from its images: task vector, Fisher diagonal, accuracy."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.training.accuracy import Accuracy as Accuracy
    from fedcompo.training.accuracy import accuracy_of as accuracy_of
    from fedcompo.training.anchors import FisherSums as FisherSums
    from fedcompo.training.fisher_estimate import FisherReport as FisherReport
    from fedcompo.training.fisher_estimate import estimate_fisher as estimate_fisher
    from fedcompo.training.fit import Fitted as Fitted
    from fedcompo.training.fit import fit_task_vector as fit_task_vector
    from fedcompo.training.probing import fit_probe as fit_probe
    from fedcompo.training.probing import load_reference as load_reference
    from fedcompo.training.probing import reference_fisher as reference_fisher

__all__, __getattr__, __dir__ = face(__name__)
