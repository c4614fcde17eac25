"""The settings of a run, their choices and their checks; no torch.

Every setting has a default, a sentence that explains it, and checks; all faults are reported at
once. ``fedcompo settings`` lists them.
"""

from typing import TYPE_CHECKING

from fedcompo._lazy import face

if TYPE_CHECKING:
    from fedcompo.config.choices import Action as Action
    from fedcompo.config.choices import AnchorBy as AnchorBy
    from fedcompo.config.choices import Augmentation as Augmentation
    from fedcompo.config.choices import Coefficients as Coefficients
    from fedcompo.config.choices import Curvature as Curvature
    from fedcompo.config.choices import FisherForm as FisherForm
    from fedcompo.config.choices import HeadStart as HeadStart
    from fedcompo.config.choices import Kind as Kind
    from fedcompo.config.choices import Method as Method
    from fedcompo.config.choices import Penalty as Penalty
    from fedcompo.config.choices import Precision as Precision
    from fedcompo.config.choices import Preset as Preset
    from fedcompo.config.choices import Schedule as Schedule
    from fedcompo.config.choices import Statistics as Statistics
    from fedcompo.config.choices import Wire as Wire
    from fedcompo.config.run import RunConfig as RunConfig
    from fedcompo.config.run import all_settings as all_settings
    from fedcompo.config.scenario import settings_of as settings_of

__all__, __getattr__, __dir__ = face(__name__)
