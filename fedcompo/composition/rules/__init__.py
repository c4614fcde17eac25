r"""Rules of composition, a file for each idea: how the members' changes of a weight become one.

A rule turns them into a *total* in the size of their sum, so that one factor fits all rules,

.. math:: \theta_P = \theta_0 + \lambda' \cdot \mathrm{total}, \qquad \lambda' = \lambda / M

Its text names it everywhere: ``ties:density=0.2`` (:func:`parse_rule`).
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.composition.rules.parsing import parse_rule as parse_rule
    from fedcompo.composition.rules.rule import Changes as Changes
    from fedcompo.composition.rules.rule import Rule as Rule

__all__, __getattr__, __dir__ = face(__name__)
