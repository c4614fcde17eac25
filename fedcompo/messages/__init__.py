"""The protocol: every request and every answer as a value, and how they travel.

``requests`` and ``answers`` are the messages, ``body`` turns them into tensors and a manifest,
``records`` packs these for Flower, ``wire`` writes tensors in fewer bits.
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.messages.answers import FisherAnswer as FisherAnswer
    from fedcompo.messages.answers import TrainAnswer as TrainAnswer
    from fedcompo.messages.body import Content as Content
    from fedcompo.messages.records import ClientRefusal as ClientRefusal
    from fedcompo.messages.records import from_record as from_record
    from fedcompo.messages.records import to_record as to_record
    from fedcompo.messages.requests import FisherRequest as FisherRequest
    from fedcompo.messages.requests import TrainRequest as TrainRequest
    from fedcompo.messages.wire import decode as decode
    from fedcompo.messages.wire import encode as encode

__all__, __getattr__, __dir__ = face(__name__)
