"""Models for others: a selection of task vectors as a folder with its card, or as an adapter."""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.export.folder import publish as publish
    from fedcompo.export.negation import negated as negated
    from fedcompo.export.peft import export_peft as export_peft
    from fedcompo.export.prediction import model_from as model_from
    from fedcompo.export.prediction import predict as predict
    from fedcompo.export.recipe import Recipe as Recipe
    from fedcompo.export.recipe_file import read_recipe as read_recipe
    from fedcompo.export.selected import Selection as Selection
    from fedcompo.export.selection import from_folders as from_folders
    from fedcompo.export.selection import from_registry as from_registry

__all__, __getattr__, __dir__ = face(__name__)
