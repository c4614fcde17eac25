"""The pre-trained weights in one file, so that a registry needs neither hub nor checkpoint later.

Torch and timm are imported where weights are used: the description is read without them.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompo.backbone.origin import Origin
from fedcompo.errors import BackboneError, FileFormatError
from fedcompo.storage.manifest import require_content
from fedcompo.storage.tensorstream import Guard, StreamedTensors, save_streamed

if TYPE_CHECKING:
    import torch

    from fedcompo.backbone.backbone import Backbone
    from fedcompo.backbone.preprocessing import Preprocessing
    from fedcompo.method.deltas import Weights

CONTENT = "backbone"
COPIED = ("name", "fingerprint", "architecture", "classifier", "model_args", "num_features")
"""Keys of the manifest that are attributes of a :class:`Backbone`."""


def save_backbone(path: Path, backbone: Backbone) -> None:
    """Write all weights of a backbone, and a manifest from which it can be rebuilt."""
    manifest = {
        "content": CONTENT,
        **{key: getattr(backbone, key) for key in COPIED},
        "preprocessing": asdict(backbone.preprocessing),
        "target_weights": sorted(backbone.theta_0),
        **({"origin": asdict(backbone.origin)} if backbone.origin != Origin() else {}),
    }
    save_streamed(path, backbone.model.state_dict(), manifest)


def stored_at(path: Path) -> StoredBackbone | None:
    """Open a file that :func:`save_backbone` wrote; None for any other."""
    try:
        return StoredBackbone(path) if path.suffix == ".safetensors" else None
    except FileFormatError:
        return None


class StoredBackbone:
    """Pre-trained weights on disk; each weight is read when it is used."""

    def __init__(self, path: Path, *, guard: Guard = lambda wrong: None) -> None:
        """Read the header of a file that :func:`save_backbone` wrote.

        Args:
            path: The file.
            guard: See :class:`~fedcompo.storage.tensorstream.StreamedTensors`.

        Raises:
            FileFormatError: If it is altered, or no backbone.
        """
        self.tensors = StreamedTensors(path, guard=guard)
        manifest = self.tensors.manifest
        require_content(manifest, CONTENT, path)
        if missing := sorted({*COPIED, "preprocessing", "target_weights"} - manifest.keys()):
            raise FileFormatError(
                f"The manifest of {path} has no {missing[0]!r}. It was written by another version "
                "of fedcompo; use that one, or make the file again."
            )
        self.path = path
        self.fingerprint: str = manifest["fingerprint"]
        self.classifier: str = manifest["classifier"]
        self.num_features: int = manifest["num_features"]
        self.target_weights: tuple[str, ...] = tuple(manifest["target_weights"])
        self.origin = Origin.parse(manifest.get("origin"))

    @property
    def architecture(self) -> str:
        """Timm's plain name of the architecture."""
        return self._built[0]

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments that rebuild the model with ``timm.create_model``."""
        return self._built[1]

    @cached_property
    def _built(self) -> tuple[str, dict[str, Any]]:
        """Architecture and arguments; older files name a folder instead, which is then read."""
        manifest = self.tensors.manifest
        if ":" not in manifest["architecture"]:
            return manifest["architecture"], manifest["model_args"]
        from fedcompo.backbone.source import source_of

        source = source_of(manifest["name"])
        return source.architecture, {**source.model_args, **manifest["model_args"]}

    def name_as(self, name: str) -> str:
        """Return the name of a backbone that a setting names and whose weights are these.

        Raises:
            BackboneError: If the setting names another architecture.
        """
        kind, colon, _ = name.partition(":")
        if kind.lower() == "local-dir":  # which is known by its architecture
            return f"local-dir:{self.architecture}"
        if not colon and name.partition(".")[0] != self.architecture:
            raise BackboneError(
                f"{self.path} holds the weights of {self.architecture!r}, but `backbone` is "
                f"{name!r}. Name that architecture."
            )
        return name

    @property
    def theta_shapes(self) -> Weights:
        """The target weights on torch's ``meta`` device: shapes and dtypes without values."""
        import torch

        layout = self.tensors.layout
        return {
            name: torch.empty(layout[name][1], dtype=layout[name][0], device="meta")
            for name in self.target_weights
        }

    def load(self, device: torch.device | str = "cpu") -> Backbone:
        """Build the model and load its weights.

        Raises:
            FileFormatError: If a byte of the weights was altered.
            BackboneError: If this timm cannot build the model.
        """
        from fedcompo.backbone.backbone import Backbone
        from fedcompo.backbone.text import timm

        self.tensors.check()
        manifest = self.tensors.manifest
        try:
            model = timm.create_model(
                self.architecture, pretrained=False, num_classes=0, **self.model_args
            )
            model.load_state_dict(dict(self.tensors))
        except (RuntimeError, TypeError, ValueError) as error:
            raise BackboneError(
                f"timm {timm.__version__} cannot rebuild {self.architecture!r} from "
                f"{self.path}: {error}. Use the timm version that the weights were stored with."
            ) from error
        model = model.float().eval().requires_grad_(False).to(device)
        parameters = dict(model.named_parameters())
        return Backbone(
            model=model,
            theta_0={name: parameters[name].detach() for name in self.target_weights},
            name=manifest["name"],
            fingerprint=self.fingerprint,
            preprocessing=self.preprocessing,
            architecture=self.architecture,
            classifier=self.classifier,
            model_args=self.model_args,
            origin=self.origin,
        )

    @property
    def old_pixels(self) -> bool:
        """Whether pictures are prepared by the first rule, see :class:`Preprocessing`."""
        values = self.tensors.manifest["preprocessing"]
        return bool(values.get("rule", 1) == 1 and values.get("modality") != "texts")

    @property
    def preprocessing(self) -> Preprocessing:
        """Input of the model."""
        from fedcompo.backbone.preprocessing import Preprocessing

        return Preprocessing.parse(self.tensors.manifest["preprocessing"])
