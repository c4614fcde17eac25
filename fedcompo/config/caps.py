"""Limits on what a client sends: bits, form of the Fisher, noise, fewest images.

Both the run and the node set them. Of each, the stricter counts. So a node may send less than the
run asks for, and no run can make it send more than it allows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedcompo.config.choices import Curvature, FisherForm, HeadStart, Statistics, Wire
from fedcompo.config.setting import NOT_NEGATIVE, POSITIVE, Check, setting
from fedcompo.errors import ConfigError

PROBABILITY: Check = (lambda value: 0 < value < 1, "must be above 0 and below 1")
NODE_KEYS = ("wire", "fisher-form", "dp-noise", "dp-clip-features", "dp-clip-fisher", "min-images")
"""Keys that a node may set in its node config."""
FEWEST_IMAGES = 8
"""Default of ``min-images`` where a client's images are its own, not a part of a simulation's."""


@dataclass(frozen=True)
class CapsConfig:
    """Limits on what a client sends; a node may set stricter ones, by the same names."""

    wire: Wire = setting(
        Wire.BFLOAT16,
        "Numbers of task vector and Fisher on the wire: float32, bfloat16 (half the bytes) or int8 "
        "(a quarter); the error is reported.",
    )
    fisher_form: FisherForm = setting(
        FisherForm.FACTORED,
        "What of the Fisher leaves a client: dense, kronecker (directions, not only a diagonal), "
        "factored (row and column sums: kilobytes) or none (nobody's τ is anchored by it).",
    )
    dp_noise: float = setting(
        0.0,
        "Noise on feature statistics and Fisher, for differential privacy: its standard deviation, "
        "in sensitivities; 0: none. Under it squares of layers' inputs (`rule = regmean`) are not "
        "sent, nor counts of test images by class. τ, head, losses and accuracies leave as they "
        "are: they are NOT private by it.",
        NOT_NEGATIVE,
    )
    dp_clip_features: float = setting(
        20.0,
        "dp-noise: longest features that one image may add, on the backbone's own scale "
        "(embedded: about 21).",
        POSITIVE,
    )
    dp_clip_fisher: float = setting(
        8000.0,
        "dp-noise: largest Fisher, as a norm, that one image may add, in the form that is sent, on "
        "the backbone's own scale (embedded, factored: features about 8000).",
        POSITIVE,
    )
    dp_delta: float = setting(
        1e-5, "dp-noise: δ at which ε is reported; well below one over the examples.", PROBABILITY
    )
    min_images: int = setting(
        0,
        "Fewest images that a client makes anything of that it sends: training images of each "
        "class, test images (in all, and of a class that is counted), images kept aside; 0: 8 in a "
        "deployment, 1 in a simulation.",
        NOT_NEGATIVE,
    )
    min_others: int = setting(
        1,
        "Fewest other clients whose mean Fisher may anchor a client. With 1 and two clients, each "
        "is given the other's own.",
        POSITIVE,
    )

    def strictest(self, own: CapsConfig) -> CapsConfig:
        """Combine a run's limits with a node's own: of each, take the stricter.

        The node's clips replace the run's, because the noise is in proportion to them.
        """
        return replace(
            own,
            wire=max(self.wire, own.wire, key=list(Wire).index),
            fisher_form=max(self.fisher_form, own.fisher_form, key=list(FisherForm).index),
            dp_noise=max(self.dp_noise, own.dp_noise),
            min_images=max(self.min_images, own.min_images),
        )

    def check_noise(
        self, *, statistics: Statistics, curvature: Curvature, start: HeadStart
    ) -> None:
        """Refuse noise that would not protect; raises ``ConfigError``.

        A mixture is no sum, so what one image changes of it has no limit. Nor has, under a probe
        fitted to the images, what one image changes of the Fisher of every other.
        """
        if not self.dp_noise > 0:
            return
        if statistics is Statistics.MIXTURES:
            raise ConfigError.public(
                f"`dp-noise` is {self.dp_noise:g} and `statistics` is {statistics}: mixtures are "
                "not private by noise. Use `statistics = sums`."
            )
        if self.fisher_form is FisherForm.KRONECKER:
            raise ConfigError.public(
                f"`dp-noise` is {self.dp_noise:g} and `fisher-form` is {self.fisher_form}: there "
                "is no noise for Kronecker factors. Use `fisher-form = factored`."
            )
        if curvature is not Curvature.FEATURES and start is HeadStart.PROBE:
            raise ConfigError.public(
                f"`dp-noise` is {self.dp_noise:g}, `curvature` is {curvature} and `head-start` is "
                f"{start}: a Fisher under a head fitted to the same images is not private by "
                "noise. Use `curvature = features`, or `head-start = zero` or `aligned`."
            )
