"""The method, in five files to read in this order.

``task_vector`` (a client's change to the pre-trained weights), ``deltas`` (how one weight changes),
``fisher`` (the diagonal that the penalties weigh with), ``penalties`` (what keeps task vectors
composable), ``pool`` (add, leave out, compose). Beside them: ``statistics`` (sums that describe a
client's features), ``heads`` (what follows from them in closed form), ``contribution`` (all that a
client sends) and ``lineage``. ``features`` holds the mixtures of the published protocol.
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.method.contribution import Contribution as Contribution
    from fedcompo.method.deltas import IA3 as IA3
    from fedcompo.method.deltas import Full as Full
    from fedcompo.method.deltas import LoRA as LoRA
    from fedcompo.method.features import FeatureMixture as FeatureMixture
    from fedcompo.method.fisher import FisherDiagonal as FisherDiagonal
    from fedcompo.method.heads import Head as Head
    from fedcompo.method.lineage import Lineage as Lineage
    from fedcompo.method.penalties import iel_penalty as iel_penalty
    from fedcompo.method.penalties import ita_penalty as ita_penalty
    from fedcompo.method.pool import Pool as Pool
    from fedcompo.method.task_vector import TaskVector as TaskVector

__all__, __getattr__, __dir__ = face(__name__)
