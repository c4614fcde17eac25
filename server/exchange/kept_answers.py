"""Keep the answers of a run on disk until its results are safe.

A run that was killed is started again with the same settings, and asks the same questions. An
answer that was kept is used instead of asking the client. Two questions are the same if their bytes
are: if clients came or went meanwhile, requests differ, and are sent. Apart from the answers almost
nothing has to be saved, because the resumed run computes everything else from them again.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from fedcompo.errors import FileFormatError
from fedcompo.messages.body import Body
from fedcompo.storage import tensorfile
from fedcompo.storage.digests import tensor_digest
from fedcompo.storage.files import canonical
from fedcompo.storage.tensorstream import save_streamed
from server.exchange.books import Traffic

logger = logging.getLogger(__name__)

CONTENT = "answer"


def question(request: Body) -> str:
    """SHA-256 of a request, hexadecimal."""
    tensors, manifest = request
    text = tensor_digest(tensors) + canonical(manifest)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class KeptAnswers:
    """A folder with one file for each answer."""

    folder: Path

    def keep(self, phase: str, client: str, asked: str, answer: Body, cost: Traffic) -> None:
        """Keep an answer that was used, under the :func:`question` that was asked.

        Raises:
            OSError: If it cannot be written.
        """
        tensors, manifest = answer
        path = self._file(phase, client, asked)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = {"content": CONTENT, "asked": asked, "manifest": manifest, "cost": asdict(cost)}
        save_streamed(path, tensors, about)

    def recall(self, phase: str, client: str, asked: str) -> tuple[Body, Traffic] | None:
        """Return the answer to this question, and its cost; None if there is none.

        A file that cannot be read counts as none: the client is asked again.
        """
        path = self._file(phase, client, asked)
        if not path.exists():
            return None
        try:
            tensors, kept = tensorfile.load(path)
        except FileFormatError as error:
            logger.warning("%s is asked again: %s", client, error)
            return None
        if kept["content"] != CONTENT or kept["asked"] != asked:
            return None
        return (tensors, kept["manifest"]), Traffic(**kept["cost"])

    def clear(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, phase: str, client: str, asked: str) -> Path:
        folder = "".join(c if c.isalnum() else "-" for c in phase)
        who = hashlib.sha256(client.encode()).hexdigest()[:16]  # names may be as long as a file's
        return self.folder / folder / f"{who}.{asked[:16]}.safetensors"
