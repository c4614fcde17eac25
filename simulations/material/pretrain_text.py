"""Pre-train the byte transformer: it learns to predict a summary of a few lines of text.

The summary comes from latent semantic analysis (Deerwester et al., *JASIS* 1990): counts of pieces
of two to four characters, rare pieces weighing more, projected to the directions in which texts
differ most. The transformer reads the bytes and learns to predict the summary. This needs no label
and transfers to texts of other modules far better than learning to name the module: after two
minutes of training, a linear probe on 20 classes of the corpus reaches 44 % and 27 % (untrained
22 %); after the full training 50 %.

It learns on modules of Python's library that are no class of the text corpus (see text_corpus.py),
so that the tasks of the clients are new to it.

    python simulations/material/pretrain_text.py runs/text/byte_transformer_small.safetensors

takes some ten minutes on one core. Each step draws new lines; held-out stretches of every module
measure the result. The same library on the same machine gives the same weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from schedule import adamw, learning_rate
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from text_corpus import (
    CLASSES,
    STRETCH,
    TEST_EVERY,
    example_at,
    examples,
    library,
    lines_of,
    sources,
)
from torch import Tensor, nn

from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.backbone.text import LENGTH
from fedcompo.config.run import BackboneConfig
from fedcompo.storage.files import write_atomically

ARCHITECTURE = "byte_transformer_small"
LEFT_OUT = {"site-packages", "test", "tests", "encodings", "pydoc_data", "this"}
"""Folders that are no part of the library, or hold mainly tables."""
FEWEST_LINES = 300
DIRECTIONS = 256  # of the summary
ANALYSED = 20_000  # examples that the summary is fitted to
HELD_OUT = 1000  # examples that measure, and of no module's training stretches
LOGGED = 100  # steps between two lines of output
READS = Preprocessing(LENGTH, channels=1, mean=(0.0,), std=(1 / 255,), modality="texts")

Stretches = list[list[str]]
"""Consecutive lines, of one module."""


def load_modules() -> tuple[list[Stretches], list[Stretches]]:
    """Read all modules that are no class and have enough lines; return train and held-out parts."""
    names = {path.stem for path in library().iterdir() if path.suffix in ("", ".py")}
    # _sysconfigdata says how this very machine's Python was compiled
    wanted = {name for name in names if not name.startswith("_sysconfigdata")}
    parts: tuple[list[Stretches], list[Stretches]] = [], []
    for name in sorted(wanted - set(CLASSES) - LEFT_OUT):
        own: tuple[Stretches, Stretches] = [], []
        for file in sources(name):
            lines, size = lines_of(file), 4 * STRETCH  # an example has about four lines
            for place, start in enumerate(range(0, len(lines), size)):
                held_out = place % TEST_EVERY == TEST_EVERY - 1
                own[held_out].append(lines[start : start + size])
        if sum(map(len, own[0])) >= FEWEST_LINES and own[1]:
            parts[0].append(own[0])
            parts[1].append(own[1])
    return parts


def draw(modules: list[Stretches], count: int, generator: np.random.RandomState) -> list[str]:
    """Draw examples: a module, each equally likely, then a line at which the example starts."""
    texts = []
    for module in generator.randint(len(modules), size=count):
        lines = modules[module][generator.randint(len(modules[module]))]
        texts.append(example_at(lines, generator.randint(len(lines)), LENGTH)[0])
    return texts


def as_input(texts: list[str]) -> Tensor:
    """Convert texts to the layout of clients' data: (count, 1, 1, LENGTH), uint8."""
    return torch.stack([READS.prepare(text.encode()) for text in texts])


@dataclass(frozen=True)
class Summary:
    """Latent semantic analysis of texts, with all directions scaled alike."""

    counts: TfidfVectorizer
    directions: TruncatedSVD
    mean: np.ndarray
    spread: float

    @classmethod
    def of(cls, texts: list[str], seed: int) -> Summary:
        """Fit the analysis to texts."""
        counts = TfidfVectorizer(
            analyzer="char_wb",
            ngram_range=(2, 4),
            sublinear_tf=True,
            min_df=5,
            max_features=20_000,
        )
        directions = TruncatedSVD(DIRECTIONS, random_state=seed)
        found = directions.fit_transform(counts.fit_transform(texts)) / directions.singular_values_
        return cls(counts, directions, found.mean(0), float(found.std(0).mean()))

    def __call__(self, texts: list[str]) -> Tensor:
        """Summarise texts, (count, DIRECTIONS), float32."""
        found = self.directions.transform(self.counts.transform(texts))
        found = (found / self.directions.singular_values_ - self.mean) / self.spread
        return torch.from_numpy(found.astype(np.float32))


def analysed(modules: list[Stretches], generator: np.random.RandomState) -> list[str]:
    """Draw the examples that the summary is fitted to, from all of the modules' examples."""
    whole = [text for module in modules for lines in module for text in examples(lines)]
    return [whole[place] for place in generator.permutation(len(whole))[:ANALYSED]]


def pretrain(
    train: list[Stretches],
    held_out: list[Stretches],
    *,
    steps: int,
    batch: int,
    peak: float,
    seed: int,
) -> nn.Module:
    """Train a model to predict the summary; the held-out stretches measure it.

    Returns:
        The model, without the layer that predicts the summary from its features.
    """
    generator = np.random.RandomState(seed)
    summary = Summary.of(analysed(train, generator), seed)
    measured = draw(held_out, HELD_OUT, generator)
    inputs, targets = as_input(measured), summary(measured)
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(ARCHITECTURE, num_classes=0)
    both = nn.Sequential(model, nn.Linear(model.num_features, DIRECTIONS)).to(device)
    optimiser = adamw(both.parameters())
    started = time.monotonic()
    for step in range(steps):
        texts = draw(train, batch, generator)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup=100)
        loss = F.mse_loss(both(as_input(texts).to(device)), summary(texts).to(device))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % LOGGED == 0 or step + 1 == steps:
            print(
                f"step {step + 1}/{steps}  "
                f"held out: {explained(both, inputs, targets):.3f} of the summary explained  "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    return model


@torch.no_grad()
def explained(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the share of the variance of summaries that a model explains."""
    device = next(model.parameters()).device
    predicted = torch.cat([model(part.to(device)).cpu() for part in inputs.split(200)])
    return 1 - float(F.mse_loss(predicted, targets) / targets.var(0, unbiased=False).mean())


def main() -> None:
    """Parse the command line, train, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("output", type=Path, help="the .safetensors file to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.suffix != ".safetensors":
        sys.exit(f"The output must end in .safetensors, got {arguments.output}.")
    train, held_out = load_modules()
    lines = sum(len(part) for module in train for part in module)
    print(f"{len(train)} modules, {lines} lines to learn from", flush=True)
    model = pretrain(
        train,
        held_out,
        steps=arguments.steps,
        batch=arguments.batch,
        peak=arguments.learning_rate,
        seed=arguments.seed,
    )
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomically(arguments.output, safetensors.torch.save(tensors))
    loaded = load_backbone(BackboneConfig(backbone=ARCHITECTURE, checkpoint=str(arguments.output)))
    print(f"wrote {arguments.output}: {loaded.fingerprint}")


if __name__ == "__main__":
    main()
