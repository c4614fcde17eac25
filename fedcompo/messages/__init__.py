"""What clients and server say to each other: requests, Flower's records, fewer bits."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.messages.records import ClientRefusal as ClientRefusal
    from fedcompo.messages.records import from_record as from_record
    from fedcompo.messages.records import to_record as to_record
    from fedcompo.messages.wire import decode as decode
    from fedcompo.messages.wire import encode as encode

__all__, __getattr__, __dir__ = face(
    __name__,
    {
        "ClientRefusal": "records",
        "decode": "wire",
        "encode": "wire",
        "from_record": "records",
        "to_record": "records",
    },
)
