"""Writes what model hubs read of a card: license, lineage, library and task, as YAML.

Only what is known is said: a base model is named if the hub itself brought its weights. Nothing is
said of data sets and measures: of neither does a contribution know more than its client does.
The keys: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

from collections.abc import Iterable

from huggingface_hub import ModelCardData

from fedcompo.backbone.preprocessing import Modality

OWN_LICENSE = "apache-2.0"
"""fedcompo's, under which the embedded weights come."""
HUB_LICENSES = {
    *("apache-2.0", "apple-amlr", "apple-ascl", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0"),
    *("fair-noncommercial-research-license", "gemma", "mit"),
}
"""Those of timm's that the hub knows by their identifier; it takes others as names."""


def front_matter(
    library: str,
    tags: Iterable[str],
    *,
    license: str,
    hub: str,
    relation: str,
    modality: str = Modality.PICTURES,
) -> str:
    """Return the front matter of a card.

    Args:
        library: ``timm``, ``peft`` or ``fedcompo``: what loads the folder.
        tags: Further tags.
        license: Identifier of the license of the backbone's weights; empty: not known.
        hub: Repository of the hub that they came from; empty: none.
        relation: To the backbone: ``merge``, ``finetune`` or ``adapter``.
        modality: pictures or texts.
    """
    named = license in ("", *HUB_LICENSES)
    task = "text-classification" if modality == Modality.TEXTS else "image-classification"
    data = ModelCardData(
        license=(license or None) if named else "other",
        license_name=None if named else license,
        base_model=hub or None,
        base_model_relation=relation if hub else None,
        library_name=library,
        pipeline_tag=task,
        tags=sorted({"fedcompo", library, task, *tags}),
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---"


def license_text(license: str) -> str:
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
