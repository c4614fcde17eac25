"""Writes the README of an exported model: what it is made of, and what it is not made for.

Names of clients and classes come from outside and are shown literally, whatever they hold. The
front matter, which machines read, has fixed words and names of the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedcompo.backbone.origin import Origin
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.composition.settings import MEAN
from fedcompo.export.example import CONFIGURED, example
from fedcompo.export.hub_metadata import front_matter, license_text
from fedcompo.method.contribution import Contribution
from fedcompo.names import printable
from fedcompo.registry.removal import influence
from fedcompo.runtime import version

MOST_CLASSES = 200
MOST_LINES = 200
SHARE = "client", "kind", "w", "training images", "classes"
ORIGIN = "client", "method", "anchored by", "head aligned with", "trained in an ensemble with"
USE = """
model = timm.create_model("local-dir:.", pretrained=True).eval()  # or hf-hub:OWNER/NAME"""
USE_LINEARISED = """\
from fedcompo import load_tangent_model

model = load_tangent_model(".")"""
SPECIAL = re.compile(
    r"""[\\`*{}\[\]()<>#+!|~&:@$=^"'/]"""  # means something somewhere in Markdown or HTML
    r"|(?<![a-zA-Z0-9])_"  # starts emphasis, but not after a letter or digit
    r"|(?<=[wW])\."  # a link, where it follows www
)


@dataclass(frozen=True)
class ExportedModel:
    """All that the card says of a composed model: in a timm folder, or as an adapter."""

    members: Sequence[Contribution]
    shares: Mapping[str, float]
    """Coefficients w, by client."""
    classes: tuple[str, ...]
    """In the order of the logits."""
    architecture: str
    """timm's name of the architecture."""
    fingerprint: str
    """Of the pre-trained weights."""
    preprocessing: Preprocessing
    file: str
    """Name of the file that holds the weights."""
    sha256: str
    """Its SHA-256, hexadecimal."""
    scale: float = 1.0
    """λ."""
    rule: str = MEAN
    """Text of the rule of composition."""
    only: tuple[str, ...] = ()
    """Clients that were chosen by name; empty: all."""
    without: tuple[str, ...] = ()
    """Clients that were left out by name."""
    negated: str = ""
    """Client whose task vector was subtracted afterwards; empty: none."""
    negation_scale: float = 1.0
    """How often it was subtracted."""
    linearised: bool = False
    """Whether the members are tangents."""
    origin: Origin = Origin()
    """Of the pre-trained weights."""
    adapter: str = ""
    """Section on the use of an adapter; empty: it is a model in a folder."""
    recipe: str = ""
    """What `recipe.toml` holds; empty: there is none."""

    @property
    def backbone(self) -> str:
        """``embedded`` or timm's name."""
        return self.fingerprint.rpartition("@")[0]


def model_card(model: ExportedModel) -> str:
    """Return the Markdown text of a model card, with front matter as model hubs read it."""
    times = f"{model.negation_scale:g}"
    library = "fedcompo" if model.linearised else "peft" if model.adapter else "timm"
    noun = "A LoRA adapter" if model.adapter else "A model"
    loading = USE_LINEARISED if model.linearised else USE
    several = len(model.members) + bool(model.negated) > 1
    tags = {library, "task-arithmetic", *(["merge"] if several else [])}
    front = front_matter(
        library,
        tags | ({"lora", "timm"} if model.adapter else set()),
        backbone=model.backbone,
        origin=model.origin,
        relation="adapter" if model.adapter else "merge" if several else "finetune",
        modality=model.preprocessing.modality,
    )
    files = (
        ("backbone", model.backbone),
        ("architecture", model.architecture),
        ("fingerprint of θ₀", model.fingerprint),
        (f"SHA-256 of {model.file}", model.sha256),
    )
    return f"""\
{front}

# {"Negated copy of a model" if model.negated else noun} composed of \
{len(model.members)} client{"s" * (len(model.members) != 1)}
{_warning(model.negated, times) if model.negated else ""}
Each client fine-tuned the same pre-trained vision transformer θ₀ on its own images and gave the
change, its task vector τ. {_formula(model)}
The card says what is in it, not how accurate it is.

## Use

{model.adapter or example(loading, model.preprocessing, CONFIGURED)}

{class_table(model.classes)}

## Composition

{_composition(model)} λ = {model.scale:g}.

{table(SHARE, (_share(own, model.shares[own.client]) for own in model.members))}

{_recipe(model.recipe) if model.recipe else ""}
## Lineage

By the data of how many other clients the training of each member was shaped:

{table(ORIGIN, map(_origin, model.members))}

{_influences(model)}

## Identity

{table(("what", "value"), ((what, escaped(value)) for what, value in files))}

{license_text(model.backbone, model.origin)}

Composed with fedcompo {escaped(version("fedcompo"))}.
"""


def escaped(text: str) -> str:
    """Return Markdown that shows a text literally, on one line; invisible characters by number."""
    return SPECIAL.sub(lambda match: f"&#{ord(match[0])};", printable(text))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; its cells must be escaped already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def class_table(classes: Sequence[str]) -> str:
    """Return a table of logits and classes, cut where it gets too long to read."""
    rows = [(i, escaped(name)) for i, name in enumerate(classes[:MOST_CLASSES])]
    more = len(classes) - len(rows)
    return table(("logit", "class"), rows) + (f"\n\n… and {more} more." if more else "")


def _warning(client: str, times: str) -> str:
    return f"""
> [!WARNING]
> **A negated copy: do not deploy it.** From the composition below, {times} times the task vector τ₋
> of {escaped(client)} was subtracted. The model is now worse at what this client taught it
> than if the client had never taken part, and other classes may suffer. It is an experiment in
> forgetting ([Ilharco et al., ICLR 2023](https://arxiv.org/abs/2212.04089)). It proves no removal,
> and must never go into a registry.
"""


def _formula(model: ExportedModel) -> str:
    """Return the model's formula, and its source."""
    total = "Σ w τ" if model.rule == MEAN else f"`{model.rule}`(w, τ)"
    change = f"λ {total}" + (f" − {model.negation_scale:g} τ₋" if model.negated else "")
    if not model.linearised:
        return f"""\
{"With this adapter the" if model.adapter else "This"} model is θ₀ + {change}
([Porrello et al., ICLR 2025](https://arxiv.org/abs/2405.16350))."""
    return f"""\
This model is linearised at θ₀: with J the
Jacobian of its logits there, they are f(x; θ₀) + J ({change})
([Liu and Soatto, ICCV 2023](https://arxiv.org/abs/2307.08114)).

**Not for plain timm**, which is kept from loading it: with the weights θ₀ + {change} in
`model.safetensors` it would compute f(x; θ₀ + {change}), a model that nobody trained."""


def _composition(model: ExportedModel) -> str:
    chosen = f"Only {_list(model.only)}." if model.only else ""
    left_out = f"Without {_list(model.without)}." if model.without else ""
    whom = " ".join(filter(None, (chosen, left_out))) or "All clients."
    return whom if model.rule == MEAN else f"{whom} By the rule `{model.rule}`."


def _recipe(text: str) -> str:
    """Show a recipe, cut where it gets too long to read; its texts are quoted, each on one line."""
    lines = text.splitlines()
    cut = ["", f"# … and {len(lines) - MOST_LINES} lines more"] if len(lines) > MOST_LINES else []
    shown = "\n".join(lines[:MOST_LINES] + cut)
    return f"""\
## Recipe

Of the same contributions, this version of fedcompo makes the same bits again:
`fedcompo compose --recipe recipe.toml`.

```toml
{shown}
```
"""


def _share(own: Contribution, coefficient: float) -> tuple[object, ...]:
    images = "none" if own.without_images else own.num_examples
    kind, classes = own.task_vector.kind, len(own.head.classes)
    return escaped(own.client), kind, f"{coefficient:.6g}", images, classes


def _origin(own: Contribution) -> tuple[object, ...]:
    lineage = own.lineage
    shaped_by = lineage.anchored_by, lineage.aligned_with, lineage.ensemble
    return escaped(own.client), escaped(lineage.method), *map(len, shaped_by)


def _influences(model: ExportedModel) -> str:
    """List the members that were trained with data of clients that were left out."""
    lineages = {member.client: member.lineage for member in model.members}
    paragraphs = []
    for gone in model.without:
        touched = influence(gone, lineages, lineages).to_retrain
        paragraphs.append(
            f"Though {escaped(gone)} is not in the sum, its data shaped the training of "
            f"{_list(touched)}: this influence stays until they train again."
            if touched
            else f"By these lineages, no member was trained with anything of {escaped(gone)}."
        )
    return "\n\n".join(paragraphs)


def _list(clients: Iterable[str]) -> str:
    return ", ".join(map(escaped, clients))
