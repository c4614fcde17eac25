"""The README of an exported model: what it says, and that no name from outside breaks it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from builders import mixed_pool_members, pico_backbone, pico_weights
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import fedcompo
from fedcompo.backbone.origin import Origin
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.presets import IMPORTED, STAND_IN
from fedcompo.export.example import preprocessing_text
from fedcompo.export.model_card import (
    MOST_CLASSES,
    class_table,
    escaped,
    model_card,
)
from fedcompo.export.recipe import Group, Negation, Recipe
from fedcompo.export.selected import Selection
from fedcompo.method.contribution import Contribution
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.pool import Pool
from fedcompo.storage.files import WEIGHTS

GREY = pico_backbone().preprocessing
COEFFICIENTS = {"client-0": 0.5, "client-1": 0.2, "client-2": 0.3}
MEMBERS = tuple(mixed_pool_members(pico_weights()))


NOWHERE = Origin()


def card_of(
    *,
    members: tuple[Contribution, ...] = MEMBERS,
    classes: tuple[str, ...] = ("cat", "dog"),
    fingerprint: str = "embedded@1234",
    origin: Origin = NOWHERE,
    rule: str = "mean",
    negated: Negation | None = None,
    groups: tuple[Group, ...] = (),
    **names: tuple[str, ...],
) -> str:
    """The card of a model that nobody composed."""
    backbone = SimpleNamespace(
        fingerprint=fingerprint,
        origin=origin,
        architecture="vit_tiny_patch16_224",
        preprocessing=GREY,
    )
    weights = {m.client: COEFFICIENTS.get(m.client, 1.0) for m in members}
    selection = Selection(
        pool=Pool(members),
        backbone=backbone,
        settings=CompositionSettings(scale=0.75, rule=rule),
        head=Head(classes, torch.zeros(2, 8), torch.zeros(2)),
        factor=0.75,
        made_of="members",
        recipe=Recipe(weights=weights, negated=negated, groups=groups),
        **names,
    )
    return model_card(selection, WEIGHTS, "ab" * 32)


FRONT = {
    "license": "apache-2.0",
    "library_name": "timm",
    "pipeline_tag": "image-classification",
    "tags": ["fedcompo", "image-classification", "merge", "task-arithmetic", "timm"],
}
HOSTILE = [
    "|",
    "a|b|c",
    "\\|",
    "\\",
    "# x",
    "`x`",
    "```",
    "---",
    "- x",
    "1. x",
    "_x_",
    "__x__",
    "*x*",
    "~~x~~",
    "[a](http://evil.example)",
    "![a](b)",
    "<b>bold</b>",
    "<!--",
    "<script>",
    "&amp;",
    "&#124;",
    "https://evil.example",
    "www.evil.example",
    "a@b.example",
    "@someone",
    "$x$",
    ":smile:",
    "x: y",
    "> x",
    "%",
    "{{x}}",
    "a\nb",
    "a\r\n\r\n# b",
    "| a |\n| - |",
    "\u202eabc",
    "a\x00b",
    "\ud800",
    "日本語",
    "snake_case_name",
]


def parts(card: str) -> tuple[str, str]:
    """Front matter and Markdown."""
    assert card.startswith("---\n")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    return front, body


def tokens_of(body: str):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)


def tables_of(body: str) -> list[list[list[str]]]:
    """Text of each cell as a reader sees it; a cell that holds more than plain text is an error."""
    tables, tokens = [], tokens_of(body)
    for token, following in itertools.pairwise(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            assert {child.type for child in following.children} <= {"text", "text_special"}
            tables[-1][-1].append("".join(child.content for child in following.children))
    return tables


def outline(body: str) -> list[tuple[str, str]]:
    """Types and tags of a text's parts, without what they hold."""
    return [(token.type, token.tag) for token in tokens_of(body)]


def visible(text: str) -> str:
    """Oracle of what a reader sees of a name."""
    shown = [c if c.isprintable() else f"⟨U+{ord(c):04X}⟩" for c in text]
    return "".join(shown).strip()


def named(client: str) -> str:
    """A card in which a name stands wherever a name can stand."""
    lineage = Lineage(method=client, anchored_by=(client,))
    return card_of(
        members=(replace(MEMBERS[0], client=client, lineage=lineage),),
        classes=(client, "dog"),
        fingerprint=f"{client}@1",
        only=(client,),
        without=(client, "gone"),
        negated=Negation(client),
    )


def test_the_front_matter_is_yaml_as_hubs_read_it():
    assert yaml.safe_load(parts(card_of())[0]) == FRONT


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"members": MEMBERS[:1]}, {}),
        (
            {"origin": Origin("timm/vit.x", "cc-by-nc-4.0")},
            {
                "license": "cc-by-nc-4.0",
                "base_model": "timm/vit.x",
                "base_model_relation": "merge",
            },
        ),
        (
            {"origin": Origin("timm/y", "dinov3-license"), "members": MEMBERS[:1]},
            {
                "license": "other",
                "license_name": "dinov3-license",
                "base_model": "timm/y",
                "base_model_relation": "finetune",
            },
        ),
        (
            {"origin": Origin("org/y"), "members": MEMBERS[:1], "negated": Negation("gone")},
            {"base_model": "org/y", "base_model_relation": "merge"},
        ),
    ],
)
def test_lineage_and_license_are_the_hubs_names_or_left_out(changes, expected):
    card = card_of(**{"fingerprint": "vit@1", **changes})
    found = yaml.safe_load(parts(card)[0])
    several = expected.get("base_model_relation") == "merge"
    tags = [tag for tag in FRONT["tags"] if several or tag != "merge"]
    rest = {"library_name": "timm", "pipeline_tag": "image-classification", "tags": tags}
    assert found == {**rest, **expected}
    stated = ("license" in expected) == ("The backbone's license is" in card)
    assert stated and ("license" in expected) != ("No license is stated" in card)


def test_what_is_no_name_of_the_hub_is_not_repeated():
    cfg = {"hf_hub_id": "timm/name@v1", "license": "Apache-2.0"}
    assert Origin.of(cfg, from_hub=True) == Origin("timm/name", "apache-2.0")
    assert Origin.of(cfg, from_hub=False) == Origin()
    # timm writes the license of its own weights into every folder of the architecture.
    assert Origin.of({**cfg, "hf_hub_id": "org/name"}, from_hub=True) == Origin("org/name")
    for hub, license in (
        ("/home/eve", "ask eve: 555"),
        ("a b/c", "unknown"),
        (None, None),
        (3, []),
    ):
        assert Origin.of({"hf_hub_id": hub, "license": license}, from_hub=True) == Origin()
        assert Origin.parse({"hub": hub, "license": license}) == Origin()
    assert Origin.parse("text") == Origin.parse(None) == Origin()


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_changes_the_shape_of_the_card(name):
    front, body = parts(named(name))
    own = {key: value for key, value in FRONT.items() if key != "license"}  # no such backbone
    assert yaml.safe_load(front) == own
    assert outline(body) == outline(parts(named("plain"))[1])
    assert not any(token.type == "html_inline" for token in tokens_of(body))
    body.encode()


@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=20))
def test_any_name_is_shown_literally_in_its_cell(name):
    body = parts(named(name))[1]
    assert outline(body) == outline(parts(named("plain"))[1])
    classes, shares, origins, identity = tables_of(body)
    assert classes[1:] == [["0", visible(name)], ["1", "dog"]]
    assert shares[1][0] == origins[1][0] == origins[1][1] == visible(name)
    assert identity[1][1] == visible(name)
    assert identity[3][1] == visible(f"{name}@1")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_a_sentence_is_shown_literally(name):
    inline = next(t for t in tokens_of(f"Only {escaped(name)} of all.") if t.type == "inline")
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    shown = "".join(child.content for child in inline.children)
    assert shown == f"Only {visible(name)} of all."


def test_nothing_is_left_that_some_renderers_make_a_link_of():
    shown = escaped("https://a.example www.a.example a@b.example @a #1 :a: $a$")
    assert not {"://", "www.", "@", "#1", ":a:", "$a"} & {
        shown[i : i + n] for i in range(len(shown)) for n in (1, 2, 3, 4)
    }


def test_plain_names_are_left_as_they_are():
    for name in ("client-0", "snake_case", "Hospital B.2", "日本語", "café, au lait"):
        assert escaped(name) == name


def test_members_are_listed_with_kind_coefficient_and_examples():
    shares = tables_of(parts(card_of())[1])[1]
    assert shares == [
        ["client", "kind", "w", "training images", "classes"],
        ["client-0", "full", "0.5", "10", "2"],
        ["client-1", "lora", "0.2", "11", "2"],
        ["client-2", "ia3", "0.3", "12", "2"],
    ]


def test_no_images_are_claimed_where_a_classifier_stands_for_them():
    settings = {f"{IMPORTED}statistics": STAND_IN, f"{IMPORTED}dropped": "norm.* (2)"}
    card = card_of(members=(replace(MEMBERS[0], settings=settings),))
    shares = tables_of(parts(card)[1])[1]
    assert shares[1] == ["client-0", "full", "0.5", "none", "2"]
    assert "No images describe client-0: rows of its classifier stand for them." in card
    assert "Of client-0, changes of other weights were left out: norm." in card


def test_the_lineage_of_each_member_is_counted():
    lineage = Lineage("iel", ("a", "b", "c"), ("a", "b"), ("a",))
    member = replace(MEMBERS[0], client="x", lineage=lineage)
    origins = tables_of(parts(card_of(members=(member,)))[1])[2]
    assert origins[1] == ["x", "iel", "3", "2", "1"]


def test_backbone_and_digests_are_given():
    identity = tables_of(parts(card_of())[1])[3]
    assert dict(identity[1:]) == {
        "backbone": "embedded",
        "architecture": "vit_tiny_patch16_224",
        "fingerprint of θ₀": "embedded@1234",
        "SHA-256 of model.safetensors": "ab" * 32,
    }
    assert f"fedcompo {fedcompo.__version__}." in card_of()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "All clients. λ = 0.75."),
        ({"only": ("client-0", "client-1")}, "Only client-0, client-1. λ = 0.75."),
        ({"without": ("client-8",)}, "Without client-8. λ = 0.75."),
        (
            {"groups": (Group("a", 1.0),)},
            "All clients. λ = 0.75. The recipe's groups have w or λ of their own.",
        ),
        ({"rule": "ties:density=0.2"}, "All clients. By the rule `ties:density=0.2`. λ = 0.75."),
        ({"only": ("client-0",), "without": ("b",)}, "Only client-0. Without b. λ = 0.75."),
    ],
)
def test_the_card_says_how_the_model_was_composed(changes, sentence):
    card = card_of(**changes)
    assert f"\n{sentence}\n" in card
    assert "WARNING" not in card
    assert "# A model composed of 3 clients\n" in card


def test_a_negated_copy_is_labelled_in_title_banner_and_formula():
    card = card_of(negated=Negation("client-9", strength=1.5))
    body = parts(card)[1]
    assert body.startswith("\n# Negated copy of a model composed of 3 clients\n\n> [!WARNING]\n")
    assert "do not deploy" in body
    assert "1.5 times the task vector τ₋\n> of client-9 was subtracted" in body
    assert "θ₀ + λ Σ w τ − 1.5 τ₋" in body


def test_a_client_that_was_left_out_but_shaped_others_is_admitted():
    lineages = {
        "client-0": Lineage(aligned_with=("gone",)),
        "client-1": Lineage(ensemble=("client-0",)),  # through client-0
        "client-2": Lineage(anchored_by=("someone",)),
    }
    members = tuple(replace(m, lineage=lineages[m.client]) for m in MEMBERS)
    card = card_of(members=members, without=("gone", "stranger"))
    assert "its data shaped the training of client-0, client-1: this influence stays" in card
    assert "no member was trained with anything of stranger." in card


def test_a_long_list_of_classes_is_cut_and_says_so():
    names = [f"class {i}" for i in range(MOST_CLASSES + 2)]
    assert tables_of(class_table(names))[0][-1] == [str(MOST_CLASSES - 1), names[MOST_CLASSES - 1]]
    assert class_table(names).endswith("\n\n… and 2 more.")
    assert "more" not in class_table(names[:MOST_CLASSES])


def test_the_images_that_the_model_wants_are_described():
    seen = Preprocessing(32, 3, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), "bilinear", 0.875)
    text = preprocessing_text(seen)
    for words in (
        "RGB",
        "(batch, 3, 32, 32)",
        "bilinear",
        "crop_pct 0.875",
        "0.4, 0.5, 0.6",
        "0.2, 0.3",
    ):
        assert words in text
    assert "grey, (batch, 1, 8, 8)" in preprocessing_text(GREY)
