"""The pre-trained backbone: loading it, its weights, its pixels, its first-order expansion."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.backbone.backbone import Backbone as Backbone
    from fedcompo.backbone.backbone import load_backbone as load_backbone
    from fedcompo.backbone.preprocessing import Preprocessing as Preprocessing
    from fedcompo.backbone.stored import StoredBackbone as StoredBackbone
    from fedcompo.backbone.stored import save_backbone as save_backbone
    from fedcompo.backbone.tangent import TangentModel as TangentModel

__all__, __getattr__, __dir__ = face(__name__)
