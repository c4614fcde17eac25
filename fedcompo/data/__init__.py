"""The images of one client: from a named data set, folders, arrays or text to train and test."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.data.catalogue import Catalogue as Catalogue
    from fedcompo.data.client_data import ClientData as ClientData
    from fedcompo.data.client_data import Split as Split
    from fedcompo.data.client_data import client_names as client_names
    from fedcompo.data.client_data import load_client_data as load_client_data
    from fedcompo.data.client_data import set_aside as set_aside

__all__, __getattr__, __dir__ = face(__name__)
