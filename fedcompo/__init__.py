"""Federated fine-tuning of vision transformers into task vectors that add up, and come apart.

Each client fine-tunes a shared pre-trained backbone into a task vector; their sum, at a scale that
the clients choose together, is one model that knows all tasks. Read ``task_vector``, ``deltas``,
``fisher``, ``penalties`` and ``pool`` of ``fedcompo.method`` in this order, and you know the
method.

Run a federation on this machine, and take a client out of the model that comes of it::

    from fedcompo import Registry, simulate

    results = simulate({"num-tasks": 3}, output="runs/first")
    registry = Registry("runs/first/registry")
    record = registry.remove("client-1", requested_by="client-1")
    model = registry.model()  # a ready timm model, as if client-1 had never been there

These names are loaded when they are first used: ``import fedcompo`` alone loads no torch.
"""

from typing import TYPE_CHECKING, Any

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.backbone.backbone import Backbone as Backbone
    from fedcompo.backbone.backbone import load_backbone as load_backbone
    from fedcompo.composition.models import load_tangent_model as load_tangent_model
    from fedcompo.config.run import RunConfig as RunConfig
    from fedcompo.engine.simulation import simulate as simulate
    from fedcompo.errors import FedcompoError as FedcompoError
    from fedcompo.method.contribution import Contribution as Contribution
    from fedcompo.method.fisher import FisherDiagonal as FisherDiagonal
    from fedcompo.method.pool import Pool as Pool
    from fedcompo.method.task_vector import TaskVector as TaskVector
    from fedcompo.registry.registry import Registry as Registry

    __version__: str

__all__, _get, __dir__ = face(__name__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from fedcompo.runtime import version

        return version("fedcompo")
    return _get(name)
