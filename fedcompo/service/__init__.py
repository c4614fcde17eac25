"""The registry over gRPC, with mutual TLS: publish, fetch, compose and leave.

A client of the service needs no torch.
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.service.access import Audience as Audience
    from fedcompo.service.authority import Authority as Authority
    from fedcompo.service.certificates import Credential as Credential
    from fedcompo.service.certificates import read_authority as read_authority
    from fedcompo.service.certificates import read_credential as read_credential
    from fedcompo.service.client import Client as Client
    from fedcompo.service.limits import Limits as Limits
    from fedcompo.service.receipt import Receipt as Receipt
    from fedcompo.service.server import Server as Server
    from fedcompo.service.server import Settings as Settings
    from fedcompo.service.server import serve as serve

__all__, __getattr__, __dir__ = face(__name__)
