"""The sources of data, a file for each kind: what becomes a catalogue of images or texts.

:mod:`fedcompo.data.sources.kinds` tells them apart. What several share has a file of its own:
tables and their columns, labels, and the words for training, test and validation.
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.data.sources.kinds import catalogue_of as catalogue_of
    from fedcompo.data.sources.kinds import own_catalogue as own_catalogue
    from fedcompo.data.sources.kinds import own_clients as own_clients

__all__, __getattr__, __dir__ = face(__name__)
