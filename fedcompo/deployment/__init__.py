"""Writes what a federation on separate machines needs: one folder for the server, one a client."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.deployment.approval import approve as approve
    from fedcompo.deployment.approval import read_requests as read_requests
    from fedcompo.deployment.approval import renew as renew
    from fedcompo.deployment.folders import add as add
    from fedcompo.deployment.folders import create as create
    from fedcompo.deployment.folders import update as update
    from fedcompo.deployment.plan import Deployment as Deployment

__all__, __getattr__, __dir__ = face(__name__)
