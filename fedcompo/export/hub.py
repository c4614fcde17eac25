"""Uploads a folder that fedcompo wrote to a repository of the Hugging Face hub.

The folder is checked first. Only files that fedcompo writes are sent; the commit holds all of them
or none. The token is the one that ``hf auth login`` saved, or ``$HF_TOKEN``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fedcompo.backbone.adapter import ADAPTER, ADAPTER_CONFIG
from fedcompo.errors import ConfigError, FileFormatError, ServiceError
from fedcompo.export.recipe_file import read_recipe
from fedcompo.names import printable
from fedcompo.report.progress import step
from fedcompo.runtime import version
from fedcompo.storage.files import BACKBONE, CONFIG, MODEL_CARD, RECIPE, WEIGHTS
from fedcompo.storage.manifest import require_content
from fedcompo.storage.tensorstream import StreamedTensors, file_sha256

NEEDED = {
    "model": (WEIGHTS, CONFIG, MODEL_CARD),
    "peft-adapter": (ADAPTER, ADAPTER_CONFIG, MODEL_CARD),
}
"""Files of a folder, by the content of the first, which holds the weights."""
REFUSALS = {
    401: "The token is not valid there. `hf auth login` saves a new one.",
    403: "The token may not write there; it needs the role `write`, and you a right to {owner}.",
    404: "There is no {repo}, or the token may not see it.",
    429: "It asks for a pause. Try again later.",
}


@dataclass(frozen=True)
class Pushable:
    """A folder that can be uploaded."""

    folder: Path
    content: str
    """``model`` or ``peft-adapter``."""
    files: dict[str, int]
    """Size in bytes of each file that is sent, by name."""
    left: tuple[str, ...]
    """Names of what lies there too, and is not sent."""
    license: str
    """As the card states it; empty: not."""

    @classmethod
    def of(cls, folder: Path) -> Pushable:
        """Check a folder.

        Raises:
            ConfigError: If it is no folder that fedcompo wrote for others.
            FileFormatError: If a file was altered, or is another model's.
        """
        adapter = (folder / ADAPTER).is_file() and not (folder / WEIGHTS).is_file()
        content = "peft-adapter" if adapter else "model"
        if missing := [name for name in NEEDED[content] if not (folder / name).is_file()]:
            raise ConfigError(
                f"{folder} has no {missing[0]}. Name a folder that `fedcompo compose` or `fedcompo "
                "export` wrote."
            )
        more = () if adapter else (BACKBONE, RECIPE)
        names = [*NEEDED[content], *(name for name in more if (folder / name).is_file())]
        if links := [name for name in names if (folder / name).is_symlink()]:
            raise ConfigError(
                f"{folder / links[0]} is a link, which fedcompo does not write. Put the file in "
                "its place, or write the folder again."
            )
        return cls(
            folder,
            content,
            {name: (folder / name).stat().st_size for name in names},
            tuple(sorted(path.name for path in folder.iterdir() if path.name not in names)),
            _check_intact(folder, content),
        )

    def push(self, repo: str, *, private: bool = False) -> dict[str, Any]:
        """Upload the files; create the repository if there is none.

        Args:
            repo: ``OWNER/NAME``.
            private: Create it private; one that exists must be private.

        Returns:
            ``address`` of the repository and of the ``commit``.

        Raises:
            ConfigError: If the name is none, or there is no token.
            ServiceError: If the hub cannot be reached, or refuses.
        """
        check_name(repo)
        token = huggingface_hub.get_token()
        if token is None or not re.fullmatch("[!-~]+", token):  # errors would show such a one
            raise ConfigError(
                f"{'There is no token' if token is None else 'What is given is no token'} for the "
                "hub. `hf auth login` saves one, or set HF_TOKEN."
            )
        api = huggingface_hub.HfApi(library_name="fedcompo", library_version=version("fedcompo"))
        try:
            step("creating the repository")
            address = str(api.create_repo(repo, private=private or None, exist_ok=True))
            if private and not api.model_info(repo).private:
                raise ConfigError(
                    f"{repo} exists and is public, against `--private`. Nothing was sent. Make it "
                    "private on the hub, or choose another name."
                )
            step(f"sending {len(self.files)} files")
            sent = [huggingface_hub.CommitOperationAdd(n, self.folder / n) for n in self.files]
            message = f"Upload a {self.content} written by fedcompo"
            commit = api.create_commit(repo, sent, commit_message=message)
        except ConfigError:
            raise
        except Exception as error:  # those of the client and of its transports
            said = _refusal(error, repo, api.endpoint)
            raise ServiceError(re.sub("//[^/@ ]+@", "//", said)) from error  # a password in a URL
        return {"address": address, "commit": commit.commit_url}


def check_name(repo: str) -> None:
    """Raise ``ConfigError`` for what is no name of a repository."""
    try:
        validate_repo_id(repo)
        wrong = "" if repo.count("/") == 1 else "no owner"
    except ValueError as error:
        wrong = str(error).split("\n", 1)[0]
    if wrong:
        raise ConfigError(
            f"{repo!r} is no repository of the hub ({wrong}); write OWNER/NAME, such as "
            "my-hospital/scans."
        )


def _check_intact(folder: Path, content: str) -> str:
    """Check the digests, and that the other files belong to them; return the card's license."""
    first, config, card = (folder / name for name in NEEDED[content])
    tensors = _checked(first, content)
    base = tensors.manifest.get("base")
    try:
        json.loads(config.read_text(encoding="utf-8"))
        text = card.read_text(encoding="utf-8")
        license = huggingface_hub.ModelCard(text, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"{config.name} or {card.name} of {folder} cannot be read ({error}). Write the folder "
            "again."
        ) from error
    other = ""
    if file_sha256(first) not in text:
        other = f"{card} is the card of another model: it does not name the SHA-256 of {first.name}"
    recipe, stored = (folder / name for name in (RECIPE, BACKBONE))
    if content == "model" and recipe.is_file() and read_recipe(recipe).backbone != base:
        other = f"{recipe} is not the recipe of {first.name}: it does not name the backbone {base}"
    below = _checked(stored, "backbone") if content == "model" and stored.is_file() else None
    if below is not None and below.manifest.get("fingerprint") != base:
        other = f"{stored} is not what {first.name} was composed on"
    if other:
        raise FileFormatError(f"{other}. Write the folder again.")
    return str(license or "")


def _checked(file: Path, content: str) -> StreamedTensors:
    tensors = StreamedTensors(file)
    require_content(tensors.manifest, content, file)
    tensors.check()
    return tensors


def _refusal(error: Exception, repo: str, endpoint: str) -> str:
    """Say in one sentence what went wrong, and what to do."""
    causes = [error, *filter(None, (error.__cause__, error.__context__))]
    response = next(filter(None, (getattr(each, "response", None) for each in causes)), None)
    said = printable(str(getattr(error, "server_message", None) or error).strip().split("\n")[0])
    if response is None:
        return (
            f"{endpoint} cannot be reached, or does not answer as the hub does "
            f"({type(error).__name__}: {said[:200]}). Check the network, and HF_ENDPOINT and "
            "HF_HUB_OFFLINE."
        )
    status = response.status_code
    advice = REFUSALS.get(status, "Try again later, or look at its status page.")
    return (
        f"{endpoint} refuses {repo} ({status}: {said[:200]}). "
        f"{advice.format(repo=repo, owner=repo.partition('/')[0])}"
    )
