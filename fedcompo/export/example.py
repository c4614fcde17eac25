"""Writes the example of a card: code that runs as it is printed, and what the model reads."""

from __future__ import annotations

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import Modality

CONFIGURED = "**timm.data.resolve_model_data_config(model)"
"""Arguments of timm's ``create_transform``, of a model that knows its own."""
TEXTS = "import fedcompo.backbone.text  # timm knows its models from here on\n"


def example(loading: str, seen: Preprocessing, config: str = "", beside: str = "") -> str:
    """Return code that gives the logits of one picture or text, and what the model reads.

    Args:
        loading: Code that makes the model.
        seen: The model's input.
        config: Arguments of timm's ``create_transform``; default: those of ``seen``.
        beside: File that it needs besides those of the folder.
    """
    if seen.modality == Modality.TEXTS:
        length, needed = seen.shape[2], beside
        first, last = TEXTS, ""
        reading = f"""\
text = "A text of yours."
row = list(text.encode()[:{length}].ljust({length}, b"\\0"))"""
        given = f"torch.tensor(row).float().view(1, 1, 1, {length})"
    else:
        needed = " and ".join(filter(None, ("a `picture.png` of yours", beside)))
        first, last = "", "from PIL import Image\n"
        config = config or (
            f"\n    input_size={seen.shape},\n    interpolation={seen.interpolation!r},"
            f"\n    mean={seen.mean},\n    std={seen.std},"
            f"\n    crop_pct={seen.crop_fraction},\n    crop_mode={seen.crop_mode!r},\n"
        )
        reading = f"""\
transform = timm.data.create_transform({config})
picture = Image.open("picture.png").convert("{"L" if seen.channels == 1 else "RGB"}")"""
        given = "transform(picture).unsqueeze(0)"
    return f"""\
Run it in this folder{f", with {needed} in it" if needed else ""}:

```python
{first}import timm
import torch
{last}{loading}
{reading}
with torch.no_grad():
    logits = model({given})
```

{preprocessing_text(seen)}"""


def preprocessing_text(seen: Preprocessing) -> str:
    """Return what a model's pictures, or texts, must be like."""
    if seen.modality == Modality.TEXTS:
        return (
            f"The model reads {seen.shape[2]} bytes of UTF-8, as numbers from 0 to 255. Longer "
            "texts are cut, shorter\nones filled with zeros."
        )
    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (seen.mean, seen.std))
    height, width = seen.shape[1:]
    return (
        f"The model reads {'grey' if seen.channels == 1 else 'RGB'}, "
        f"(batch, {seen.channels}, {height}, {width}), resized and cropped\nas timm's "
        f"`create_transform` does ({seen.interpolation}, crop_mode {seen.crop_mode}, crop_pct "
        f"{seen.crop_fraction:.4g}); values are in [0, 1], less {mean}, divided by {std}."
        + ("\nThe clients' pictures had slightly other roundings." if seen.rule == 1 else "")
    )
