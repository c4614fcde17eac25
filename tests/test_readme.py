"""The READMEs: short enough to read, every link leads somewhere, every printed command exists."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main

from fedcompo.cli.app import app
from fedcompo.config.run import all_settings

ROOT = Path(__file__).parents[1]
MAIN = ROOT / "README.md"
FOLDERS = ("fedcompo", "clients", "server", "simulations")
READMES = [MAIN, *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("README.md"))]
LONGEST = 200

LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(fedcompo\s[^`]+)`")

each_readme = pytest.mark.parametrize(
    "readme", READMES, ids=lambda path: str(path.relative_to(ROOT).parent)
)


def anchors(page: Path) -> set[str]:
    """What a link may point to in a page: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """Every `fedcompo ...` of a text, in its blocks and in its lines, as words."""
    blocks = "\n".join(BLOCK.findall(text)).replace("\\\n", " ")
    lines = [line.strip() for line in blocks.splitlines()]
    lines += [" ".join(found.split()) for found in INLINE.findall(text)]
    words = [shlex.split(re.split(r"\s#\s|\s&", line)[0]) for line in lines if "fedcompo " in line]
    return [line[1:] for line in words if re.fullmatch(r"(.*/bin/)?fedcompo", line[0]) and line[1:]]


@each_readme
def test_a_readme_is_short(readme):
    assert len(readme.read_text().splitlines()) <= LONGEST


@each_readme
def test_every_link_within_the_repository_leads_somewhere(readme):
    for path, anchor in LINK.findall(readme.read_text()):
        target = (readme.parent / path).resolve() if path else readme
        assert target.is_relative_to(ROOT), path
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@each_readme
def test_every_printed_command_and_its_options_exist(readme):
    known = typer.main.get_command(app)
    for name, *words in commands(readme.read_text()):
        if name.startswith("-"):
            continue
        options = {option for p in known.commands[name].params for option in p.opts}
        used = {word for word in words if word.startswith("-")}
        assert used <= options, (name, used - options)
        keys = {word.split("=")[0] for before, word in pairwise(words) if before == "--set"}
        assert keys <= set(all_settings()), (name, keys)


def test_the_list_of_rooms_names_every_package_once():
    house = MAIN.read_text().split("## The house")[1].split("\n## ")[0]
    listed = re.findall(r"^\| \[`(\w+)`\]\(fedcompo/(\w+)", house, re.MULTILINE)
    packages = sorted(path.parent.name for path in (ROOT / "fedcompo").glob("*/__init__.py"))
    assert sorted(name for name, _ in listed) == packages
    assert all(name == folder for name, folder in listed)
    assert f"{len(packages)} packages" in house


def test_the_five_files_of_the_method_exist():
    order = re.findall(r"\(fedcompo/method/(\w+)\.py\)", MAIN.read_text())
    assert order == ["task_vector", "deltas", "fisher", "penalties", "pool"]
