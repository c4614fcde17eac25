"""Writes the README of an exported model: what it is made of, and what it is not made for.

Names of clients and classes come from outside and are shown literally, whatever they hold. The
front matter, which machines read, has fixed words and names of the hub. It says only what is known:
a base model if the hub itself brought its weights, and nothing of data sets and measures, of which
a contribution knows no more than its client does. Its keys:
https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from huggingface_hub import ModelCardData

from fedcompo.backbone.backbone import EMBEDDED
from fedcompo.backbone.stored import StoredBackbone
from fedcompo.composition.settings import MEAN
from fedcompo.config.choices import Modality
from fedcompo.config.presets import IMPORTED
from fedcompo.export.example import CONFIGURED, example
from fedcompo.export.recipe import Negation
from fedcompo.export.selected import Selection
from fedcompo.method.contribution import Contribution
from fedcompo.method.pool import Pool
from fedcompo.names import printable
from fedcompo.registry.removal import Lineages
from fedcompo.runtime import version

OWN_LICENSE = "apache-2.0"
"""fedcompo's, under which the embedded weights come."""
HUB_LICENSES = {
    *("apache-2.0", "apple-amlr", "apple-ascl", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0"),
    *("fair-noncommercial-research-license", "gemma", "mit"),
}
"""Those of timm's that the hub knows by their identifier; it takes others as names."""
LIMITS = (
    "It knows its classes and no others: of any picture it names one of them.",
    "How accurate it is on other images than its clients' was not measured: do so before use.",
    "No decision about a person may rest on it alone.",
    "Noise on statistics, where there was any, bounds nothing of what the weights tell: whoever "
    "has them can try whether an image was trained on.",
    "Whoever has two models that differ by one client can subtract them, and gets its task vector.",
    "A removal is exact in the sum. What others learnt with a client's Fisher or statistics before "
    "it left stays until they train again; the lineage names them.",
)
"""What the model is not for, and what must be known of it, as a sentence each."""
LIMITS_LISTED = "\n".join(f"- {sentence}" for sentence in LIMITS)
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


def model_card(
    selection: Selection, file: str, sha256: str, *, adapter: str = "", recipe: str = ""
) -> str:
    """Return the Markdown text of a model card, with front matter as model hubs read it.

    Args:
        selection: What the model is composed of.
        file: Name of the file that holds its weights.
        sha256: Its SHA-256, hexadecimal.
        adapter: Section on the use of an adapter; empty: it is a model in a folder.
        recipe: What `recipe.toml` holds; empty: there is none.
    """
    pool, backbone, negation = selection.pool, selection.backbone, selection.recipe.negated
    name = backbone.fingerprint.rpartition("@")[0]
    license = license_of(backbone)
    noun = "A LoRA adapter" if adapter else "Negated copy of a model" if negation else "A model"
    loading = USE_LINEARISED if pool.linearised else USE
    files = (
        ("backbone", name),
        ("architecture", backbone.architecture),
        ("fingerprint of θ₀", backbone.fingerprint),
        (f"SHA-256 of {file}", sha256),
    )
    return f"""\
{_front_matter(selection, license, adapter=bool(adapter))}

# {noun} composed of {len(pool)} client{"s" * (len(pool) != 1)}
{_warning(negation) if negation else ""}
Each client fine-tuned the same pre-trained vision transformer θ₀ on its own images and gave the
change, its task vector τ. {_formula(selection, bool(adapter))}
The card says what is in it, not how accurate it is.

## Use

{adapter or example(loading, backbone.preprocessing, CONFIGURED)}

{class_table(selection.head.classes)}

## Composition

{_composition(selection)}

{table(SHARE, (_share(own, selection.shares[own.client]) for own in pool))}

{_imports(pool)}\
{_recipe(recipe) if recipe else ""}
## Lineage

By the data of how many other clients the training of each member was shaped:

{table(ORIGIN, map(_origin, pool))}

{_influences(selection)}

## Limits

{LIMITS_LISTED}

## Identity

{table(("what", "value"), ((what, escaped(value)) for what, value in files))}

{_license_text(license)}

Composed with fedcompo {escaped(version("fedcompo"))}.
"""


def _front_matter(selection: Selection, license: str, *, adapter: bool) -> str:
    hub, linearised = selection.backbone.origin.hub, selection.pool.linearised
    texts = selection.backbone.preprocessing.modality == Modality.TEXTS
    task = "text-classification" if texts else "image-classification"
    library = "fedcompo" if linearised else "peft" if adapter else "timm"
    several = len(selection.pool) + bool(selection.recipe.negated) > 1
    relation = "adapter" if adapter else "merge" if several else "finetune"
    tags = {"fedcompo", "task-arithmetic", library, task}
    tags |= {"merge"} if several else set()
    tags |= {"lora", "timm"} if adapter else set()
    named = license in ("", *HUB_LICENSES)
    data = ModelCardData(
        license=(license or None) if named else "other",
        license_name=None if named else license,
        base_model=hub or None,
        base_model_relation=relation if hub else None,
        library_name=library,
        pipeline_tag=task,
        tags=sorted(tags),
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---"


def license_of(backbone: StoredBackbone) -> str:
    """Identifier of a backbone's license; empty: not known."""
    embedded = backbone.fingerprint.rpartition("@")[0] == EMBEDDED
    return OWN_LICENSE if embedded else backbone.origin.license


def _license_text(license: str) -> str:
    """Return what a card says to people of licenses."""
    if license:
        return (
            f"The backbone's license is {license}, and stated above. What the clients ask for the "
            "use of\ntheir part is not known here: whoever publishes this must know it."
        )
    return (
        "No license is stated above: the backbone's is not known here, nor what the clients ask "
        "for the\nuse of their part."
    )


def escaped(text: str) -> str:
    """Return Markdown that shows a text literally, on one line; invisible characters by number."""
    return SPECIAL.sub(lambda match: f"&#{ord(match[0])};", printable(text))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = False) -> str:
    """Return a Markdown table, perhaps of numbers; its cells must be escaped already."""
    lines = [header, ["---", *["---:" if numbers else "---"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def class_table(classes: Sequence[str]) -> str:
    """Return a table of logits and classes, cut where it gets too long to read."""
    rows = [(i, escaped(name)) for i, name in enumerate(classes[:MOST_CLASSES])]
    more = len(classes) - len(rows)
    return table(("logit", "class"), rows) + (f"\n\n… and {more} more." if more else "")


def _warning(negation: Negation) -> str:
    client, times = escaped(negation.client), f"{negation.strength:g}"
    return f"""
> [!WARNING]
> **A negated copy: do not deploy it.** From the composition below, {times} times the task vector τ₋
> of {client} was subtracted. The model is now worse at what this client taught it
> than if the client had never taken part, and other classes may suffer. It is an experiment in
> forgetting ([Ilharco et al., ICLR 2023](https://arxiv.org/abs/2212.04089)). It proves no removal,
> and must never go into a registry.
"""


def _formula(selection: Selection, adapter: bool) -> str:
    """Return the model's formula, and its source."""
    rule, negation = selection.settings.rule, selection.recipe.negated
    total = "Σ w τ" if rule == MEAN else f"`{rule}`(w, τ)"
    change = f"λ {total}" + (f" − {negation.strength:g} τ₋" if negation else "")
    if not selection.pool.linearised:
        return f"""\
{"With this adapter the" if adapter else "This"} model is θ₀ + {change}
([Porrello et al., ICLR 2025](https://arxiv.org/abs/2405.16350))."""
    return f"""\
This model is linearised at θ₀: with J the
Jacobian of its logits there, they are f(x; θ₀) + J ({change})
([Liu and Soatto, ICCV 2023](https://arxiv.org/abs/2307.08114)).

**Not for plain timm**, which is kept from loading it: with the weights θ₀ + {change} in
`model.safetensors` it would compute f(x; θ₀ + {change}), a model that nobody trained."""


def _composition(selection: Selection) -> str:
    rule, groups = selection.settings.rule, selection.recipe.groups
    said = (
        f"Only {_list(selection.only)}." if selection.only else "",
        f"Without {_list(selection.without)}." if selection.without else "",
        "" if selection.only or selection.without else "All clients.",
        "" if rule == MEAN else f"By the rule `{rule}`.",
        f"λ = {selection.scale:g}.",
        "The recipe's groups have w or λ of their own." if groups else "",
    )
    return " ".join(filter(None, said))


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


def _imports(pool: Pool) -> str:
    """Say what members that were not trained here lack."""
    said = []
    for own in pool:
        name, dropped = escaped(own.client), own.settings.get(f"{IMPORTED}dropped")
        if dropped:
            said.append(f"Of {name}, changes of other weights were left out: {escaped(dropped)}.")
        if own.without_images:
            said.append(f"No images describe {name}: rows of its classifier stand for them.")
    return "".join(f"{sentence}\n\n" for sentence in said)


def _origin(own: Contribution) -> tuple[object, ...]:
    lineage = own.lineage
    shaped_by = lineage.anchored_by, lineage.aligned_with, lineage.ensemble
    return escaped(own.client), escaped(lineage.method), *map(len, shaped_by)


def still_shaped(selection: Selection) -> dict[str, tuple[str, ...]]:
    """Members that were trained with something of a client that was left out, by its name."""
    lineages = {member.client: member.lineage for member in selection.pool}
    known = Lineages(lineages.items())
    return {gone: known.influence(gone, lineages).to_retrain for gone in selection.without}


def _influences(selection: Selection) -> str:
    """List the members that were trained with data of clients that were left out."""
    return "\n\n".join(
        f"Though {escaped(gone)} is not in the sum, its data shaped the training of "
        f"{_list(touched)}: this influence stays until they train again."
        if touched
        else f"By these lineages, no member was trained with anything of {escaped(gone)}."
        for gone, touched in still_shaped(selection).items()
    )


def _list(clients: Iterable[str]) -> str:
    return ", ".join(map(escaped, clients))
