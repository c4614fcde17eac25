"""Simulations, on Flower's real engine or in this process; no torch on import."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.engine.launcher import Simulation as Simulation
    from fedcompo.engine.launcher import find_app as find_app
    from fedcompo.engine.live import Display as Display
    from fedcompo.engine.resources import Resources as Resources
    from fedcompo.engine.resources import fair_resources as fair_resources
    from fedcompo.engine.simulation import prepare as prepare
    from fedcompo.engine.simulation import simulate as simulate

__all__, __getattr__, __dir__ = face(__name__)
