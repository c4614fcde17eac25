"""The gate of a client: all that leaves it passes here, and errors leave without their text.

Texts of errors hold paths, names of files (a patient's, perhaps) and what is in them. So the server
is told the kind of an error, and what :attr:`FedcompoError.told` allows. The whole text goes into
the client's own log: in a deployment the standard error of its process, which stays on its machine.
In a simulation Flower collects what processes print, so each client logs into a file of its own, in
the folder that ``FEDCOMPO_CLIENT_LOGS`` names: `fedcompo simulate` sets it. Without it, as under a
plain `flwr run`, the text stands in Flower's log. Long work has a line there every ten seconds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import RecordDict

from fedcompo.engine.run_folder import LOGS, PROGRESS
from fedcompo.errors import FedcompoError
from fedcompo.messages.records import refusal
from fedcompo.report.log import LogFormatter, log_to_stderr
from fedcompo.report.progress import telling

SEE = "see the client's own log"
KNOWN = ("fedcompo", "builtins", "torch")
"""Packages whose errors are called by their names; others by that of their base."""
logger = logging.getLogger(__name__)


def answer_of(work: Callable[[], RecordDict], name: str, phase: str) -> RecordDict:
    """Return what may leave: the answer, or a refusal that says what the server may read.

    Args:
        work: Makes the answer; may raise anything.
        name: Of the client, as far as it is known; goes with a refusal, and names the log.
        phase: What is asked for, for whoever follows a simulation.
    """
    try:
        with own_log(name, phase):
            try:
                return work()
            except Exception as error:
                return refusal(told(error), name)
    except OSError as error:  # of the log itself
        return refusal(told(error), name)


def told(error: Exception) -> str:
    """Log an error in full; return what the server may read of it."""
    mro = type(error).__mro__
    kind = next(k.__name__ for k in mro if k.__module__.partition(".")[0] in KNOWN)
    if not isinstance(error, FedcompoError):
        logger.error("Refused, by an error that nobody foresaw.", exc_info=error)
        return f"{kind}; {SEE}."
    logger.error("Refused. %s: %s", kind, error)
    if error.told == str(error):
        return f"{kind}: {error}"
    return f"{kind}: {error.told}; {SEE}." if error.told else f"{kind}; {SEE}."


@contextmanager
def own_log(name: str, phase: str) -> Iterator[None]:
    """Write all messages, warnings and progress into the client's own file, if there is a folder.

    Raises:
        OSError: If the file cannot be opened.
    """
    if not os.environ.get(LOGS):
        log_to_stderr()
        with telling(logger.info):
            yield
        return
    folder, own = Path(os.environ[LOGS]), name or "client"
    folder.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    level, file = root.level, _File(folder / f"{own}.log", encoding="utf-8")
    file.setFormatter(LogFormatter())
    root.addHandler(file)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        with telling(logger.info, folder / PROGRESS / own, client=own, phase=phase):
            yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(file)
        file.close()


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Be silent on a full disk: Python would print the message where Flower collects it."""
