"""Pre-train the embedded backbone: a small vision transformer that reads printed glyphs.

The glyphs are letters and symbols of several scripts, rendered from the fonts that ship with
matplotlib. No digit is among them in any form (plain, superscript, circled, of another script),
and neither is a letter whose picture agrees with that of a digit 0-9, so that the handwritten
digits of the default scenario are new to the backbone. Letters that resemble a digit less than
that, such as ``S`` and ``l``, do stay.

    python simulations/material/pretrain_glyphs.py --output fedcompo/assets/glyph_vit

writes ``glyph_vit.safetensors`` (half precision) and ``glyph_vit.json`` (a timm configuration with
the history of the training). About an hour on two cores, minutes on a GPU. It resumes from its
own checkpoint when started again; given other ``--steps``, it goes on with that schedule.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CANVAS = 56  # pixels of a rendered glyph, twice the size of the model's input
IMAGE = 28
SCRIPTS = (
    "LATIN GREEK CYRILLIC ARMENIAN GEORGIAN HEBREW ARABIC CANADIAN LISU LAO OLD TIFINAGH NKO OGHAM "
    "COPTIC CHEROKEE RUNIC"
).split()
SYMBOLS = (range(0x100), range(0x20A0, 0x20C0), range(0x2200, 0x2300))  # Latin-1, currency, maths
DIGITS = "0123456789"
FONTS = ("DejaVu", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10", "cmti10")
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": IMAGE,
    "patch_size": 7,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
}


@dataclass(frozen=True)
class Glyphs:
    """Rendered glyphs: ``images`` (count, CANVAS, CANVAS) uint8, ``classes`` (count,) int64."""

    images: Tensor
    classes: Tensor
    names: tuple[str, ...]


def is_wanted(code: int) -> bool:
    """Tell whether a code point is a plain letter or symbol, and not a digit in any form.

    Latin's tone letters are left out too: they were drawn after the digits 2, 5 and 6.
    """
    character = chr(code)
    category = unicodedata.category(character)
    words = unicodedata.name(character, "").split()
    if category[0] not in "LSP" or not words:
        return False
    folded = unicodedata.normalize("NFKD", character)
    if any(unicodedata.category(c)[0] == "N" for c in folded) or {"DIGIT", "TONE"} & set(words):
        return False
    if category[0] == "L":
        return folded == character and words[0] in SCRIPTS
    return any(code in block for block in SYMBOLS)


def render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """Draw one character, cropped and centred with its longer side filling 44 of 56 pixels."""
    sheet = Image.new("L", (160, 160))
    ImageDraw.Draw(sheet).text((48, 32), character, fill=255, font=font)
    box = sheet.getbbox()
    if box is None:
        return None
    glyph = sheet.crop(box)
    if min(glyph.size) < 2 or max(glyph.size) < 16:  # dots and commas lose their size when cropped
        return None
    scale = 44 / max(glyph.size)
    size = (max(2, round(glyph.width * scale)), max(2, round(glyph.height * scale)))
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(
        glyph.resize(size, Image.Resampling.BILINEAR),
        ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2),
    )
    return np.asarray(canvas)


def load_glyphs(min_fonts: int = 4) -> Glyphs:
    """Render every wanted character in every font that has it; look-alikes become one class."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    rendered: dict[str, list[np.ndarray]] = {}
    for path in sorted(folder.glob("*.ttf")):
        if not path.name.startswith(FONTS) or "Display" in path.name:
            continue
        font = ImageFont.truetype(str(path), 64)
        for code in sorted(FT2Font(str(path)).get_charmap()):
            wanted = is_wanted(code) or chr(code) in DIGITS
            if wanted and not (path.name.startswith("cm") and code > 126):
                image = render(font, chr(code))
                if image is not None:
                    rendered.setdefault(chr(code), []).append(image)
    rendered = {c: images for c, images in rendered.items() if len(images) >= min_fonts}
    return merge_look_alikes(rendered)


def merge_look_alikes(rendered: dict[str, list[np.ndarray]], threshold: float = 0.96) -> Glyphs:
    """Give characters whose pictures agree (Latin A, Greek Alpha, Cyrillic A) one class.

    The digits are rendered for this comparison alone: they go, and so does what agrees with one.
    """
    names = sorted(rendered)
    first = np.stack([np.mean(rendered[name], axis=0).ravel() for name in names])
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    alike = first @ first.T > threshold
    owner = list(range(len(names)))
    for i in range(len(names)):
        for j in np.flatnonzero(alike[i, :i]):
            owner[i] = min(owner[i], owner[j])
    digits = {owner[names.index(digit)] for digit in DIGITS}
    kept = sorted(set(owner) - digits)
    images, classes = [], []
    for i, name in enumerate(names):
        if owner[i] in digits:
            continue
        images.extend(rendered[name])
        classes.extend([kept.index(owner[i])] * len(rendered[name]))
    return Glyphs(
        torch.from_numpy(np.stack(images)),
        torch.tensor(classes),
        tuple(names[i] for i in kept),
    )


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Make printed glyphs look handwritten and badly scanned.

    Args:
        images: (batch, CANVAS, CANVAS) uint8.
        generator: Source of every random choice.

    Returns:
        (batch, 1, IMAGE, IMAGE) in [0, 1]: stroke width, affine and elastic distortion, resolution,
        contrast and noise all drawn at random.
    """
    batch = len(images)
    device = images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator).to(device)

    x = images.float().unsqueeze(1) / 255
    parts = list(x.chunk(4))  # stroke width: as printed, bolder, much bolder, thinner
    for i, width in ((1, 3), (2, 5)):
        if i < len(parts):
            parts[i] = F.max_pool2d(parts[i], width, 1, width // 2)
    if len(parts) == 4:
        parts[3] = -F.max_pool2d(-parts[3], 3, 1, 1)
    x = torch.cat(parts)

    angle = uniform(-0.35, 0.35, batch)
    shear = uniform(-0.4, 0.4, batch)
    scale_x, scale_y = uniform(0.8, 1.7, batch), uniform(0.8, 1.25, batch)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack(
        [
            torch.stack([cos * scale_x, (shear * cos - sin) * scale_y], 1),
            torch.stack([sin * scale_x, (shear * sin + cos) * scale_y], 1),
        ],
        1,
    )
    affine = torch.cat([affine, uniform(-0.12, 0.12, batch, 2, 1)], 2)
    grid = F.affine_grid(affine, [batch, 1, IMAGE, IMAGE], align_corners=False)
    field = torch.randn(batch, 2, 4, 4, generator=generator).to(device)
    field = F.interpolate(field, IMAGE, mode="bicubic", align_corners=True)
    strength = uniform(0.0, 0.13, batch, 1, 1, 1)
    grid = grid + strength * field.permute(0, 2, 3, 1)
    x = F.grid_sample(x, grid, align_corners=False)

    shuffle = torch.randperm(batch, generator=generator).to(device)
    x = x[shuffle]
    parts = []
    for part, side in zip(x.chunk(6), (8, 8, 10, 14, 20, 28), strict=False):
        if side < IMAGE:
            part = F.interpolate(part, side, mode="area")
            part = F.interpolate(part, IMAGE, mode="bilinear", align_corners=False)
        parts.append(part)
    x = torch.cat(parts)[shuffle.argsort()]
    x = x * uniform(0.7, 1.5, batch, 1, 1, 1)
    noise = torch.randn(x.shape, generator=generator).to(device)
    return (x + uniform(0.0, 0.12, batch, 1, 1, 1) * noise).clamp(0, 1)


def nearest_class_mean(model: torch.nn.Module, device: torch.device) -> float:
    """Accuracy of nearest-class-mean on scikit-learn's digits; watched, never trained on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, IMAGE, mode="bicubic", align_corners=False).clamp(0, 1)
    model.eval()
    with torch.no_grad():
        features = torch.cat([model((c.to(device) - 0.5) / 0.5) for c in images.split(256)]).cpu()
    model.train()
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    means = torch.stack([features[train][labels[train] == c].mean(0) for c in range(10)])
    return float((torch.cdist(features[test], means).argmin(1) == labels[test]).float().mean())


def learning_rate(step: int, steps: int, peak: float, warmup: int = 300) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(arguments: argparse.Namespace) -> None:
    """Train, with a checkpoint every 500 steps, and write the backbone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    glyphs = load_glyphs()
    classes, order = len(glyphs.names), torch.argsort(glyphs.classes, stable=True)
    images, labels = glyphs.images[order].to(device), glyphs.classes[order]
    counts = torch.bincount(labels, minlength=classes)
    starts = counts.cumsum(0) - counts
    print(
        f"{classes} classes, {len(labels)} glyphs, {time.monotonic() - started:.0f} s", flush=True
    )

    torch.manual_seed(arguments.seed)
    model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, **MODEL_ARGS)
    width = int(model.num_features)
    model, head = model.to(device), torch.nn.Linear(width, classes).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    output = Path(arguments.output)
    checkpoint, first = output.with_suffix(".checkpoint"), 0
    history: list[dict[str, int]] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        head.load_state_dict(saved["head"])
        optimiser.load_state_dict(saved["optimiser"])
        generator.set_state(saved["generator"].cpu())
        first, history = saved["step"], saved.get("history", [])
        print(f"resumed at step {first}", flush=True)

    history.append({"from_step": first, "schedule_steps": arguments.steps})
    loss_sum = hits = 0.0
    for step in range(first, arguments.steps):
        label = torch.randint(classes, (arguments.batch,), generator=generator)
        pick = torch.rand(arguments.batch, generator=generator)
        index = starts[label] + (pick * counts[label]).long()
        batch = (augment(images[index.to(device)], generator) - 0.5) / 0.5
        label = label.to(device)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate)
        logits = head(model(batch))
        loss = F.cross_entropy(logits, label, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        loss_sum += float(loss.detach())
        hits += float((logits.detach().argmax(1) == label).float().mean())
        if (step + 1) % 500 == 0:
            ncm = nearest_class_mean(model, device)
            print(
                f"step {step + 1}/{arguments.steps}  loss {loss_sum / 500:.3f}  "
                f"accuracy {hits / 500:.3f}  digits (nearest class mean) {ncm:.3f}  "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
            state = {
                "model": model.state_dict(),
                "head": head.state_dict(),
                "optimiser": optimiser.state_dict(),
                "generator": generator.get_state(),
                "step": step + 1,
                "history": history,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            accuracy, loss_sum, hits = hits / 500, 0.0, 0.0
    write(output, model, glyphs, arguments, history=history, accuracy=accuracy)


def write(
    output: Path,
    model: torch.nn.Module,
    glyphs: Glyphs,
    arguments: argparse.Namespace,
    *,
    history: list[dict[str, int]],
    accuracy: float,
) -> None:
    """Write the weights in half precision and the configuration that rebuilds the model."""
    tensors = {k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, output.with_suffix(".safetensors"))
    digest = hashlib.sha256(output.with_suffix(".safetensors").read_bytes()).hexdigest()
    config = {
        "architecture": ARCHITECTURE,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [1, IMAGE, IMAGE],
            "mean": [0.5],
            "std": [0.5],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
        "sha256": digest,
        "training": {
            "classes": len(glyphs.names),
            "glyphs": len(glyphs.classes),
            "steps": arguments.steps,
            "history": history,
            "batch": arguments.batch,
            "learning_rate": arguments.learning_rate,
            "seed": arguments.seed,
            "accuracy_augmented": round(accuracy, 4),
        },
    }
    output.with_suffix(".json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {output.with_suffix('.safetensors')} and {output.with_suffix('.json')}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--output", default="fedcompo/assets/glyph_vit", help="path, no suffix")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    pretrain(parser.parse_args())


if __name__ == "__main__":
    main()
