"""Copies a contribution to where a change of the registry is prepared, and checks the copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fedcompo.errors import FileFormatError
from fedcompo.method.contribution import Contribution
from fedcompo.storage.files import CARD, CONTENT, FISHER


def stage_contribution(source: Contribution | Path, folder: Path) -> Contribution:
    """Copy a contribution to a new folder and check every byte of the copy.

    Args:
        source: A contribution, or the folder of one; of that, only its own files are taken.
        folder: Folder of the copy; must not exist.

    Returns:
        The staged contribution, streamed.

    Raises:
        FileFormatError: If a file is missing, truncated or altered.
    """
    if isinstance(source, Contribution):
        source.save(folder)
    else:
        folder.mkdir(parents=True)
        for name in (CONTENT, FISHER, CARD):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
                with (folder / name).open("rb") as copy:
                    os.fsync(copy.fileno())
    try:
        staged = Contribution.open(folder, check=isinstance(source, Path))
    except FileFormatError as error:
        if isinstance(source, Path):  # name the file that will still be there
            raise FileFormatError(str(error).replace(str(folder), str(source))) from error
        raise
    if staged.fisher is None:  # the card names none, so that one is not its own
        (folder / FISHER).unlink(missing_ok=True)
    return staged
