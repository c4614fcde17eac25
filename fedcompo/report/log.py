"""Lines of a log that nobody can forge: control characters by their numbers, one entry each."""

from __future__ import annotations

import logging

from fedcompo.names import printable

FORMAT = "%(asctime)s %(levelname)s %(message)s"


class LogFormatter(logging.Formatter):
    """Writes time, level and message; further lines of an entry are indented."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        """Write one entry."""
        return printable(super().format(record), keep="\n\t").replace("\n", "\n    ")


def log_to_stderr() -> None:
    """Write all messages from INFO on to standard error, unless the process has a log already."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
