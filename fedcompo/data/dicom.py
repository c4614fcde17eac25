"""Grey pictures in DICOM files, read by pydicom (``pip install "fedcompo[dicom]"``).

Stored values become values of the modality (a table, or slope and intercept), and these become
0..255 as the file says: by its table of values of interest, or else by its window (PS3.3, C.11). A
file without either shows the range of its stored bits. ``MONOCHROME1`` is inverted, so that high
values are bright in all pictures.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from fedcompo.report.pictures import UNWINDOWED, WINDOWED

ODDITY = "fedcompo"
"""Key of a picture's ``info`` under which it says how its values were shown."""


def dicom_picture(content: bytes) -> Image.Image:
    """Read a DICOM file of one grey frame, as 8 bits; may raise any exception.

    Raises:
        ValueError: If pydicom is not installed, or the file holds colours or several frames.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise ValueError(
            'it is a DICOM file; install pydicom (pip install "fedcompo[dicom]"), or export it as '
            "PNG"
        ) from None
    file = dcmread(io.BytesIO(content))
    if (frames := int(file.get("NumberOfFrames") or 1)) > 1:
        raise ValueError(f"it is a DICOM file of {frames} frames; export those you want as PNG")
    kind = str(file.get("PhotometricInterpretation", "not told"))
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"it is a DICOM file whose pixels are {kind}; export it as PNG")
    values = apply_modality_lut(file.pixel_array, file)
    first, last = _range(file)
    if table := file.get("VOILUTSequence"):
        first, last = 0.0, 2.0 ** table[0].LUTDescriptor[2] - 1
    windowed = bool(table) or None not in (file.get("WindowCenter"), file.get("WindowWidth"))
    if not windowed:
        first, last = sorted((first, last))  # a negative slope turns the range round
    shares = (apply_voi_lut(values, file).astype(np.float64) - first) / (last - first)
    grey = np.rint(shares.clip(0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(255 - grey if kind == "MONOCHROME1" else grey)
    picture.info[ODDITY] = WINDOWED if windowed else UNWINDOWED
    return picture


def _range(file: Any) -> tuple[float, float]:
    """Return the values of the modality that the smallest and the largest stored one become."""
    if table := file.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** table[0].LUTDescriptor[2] - 1
    half = 2.0 ** (file.BitsStored - 1)
    low, high = (-half, half - 1) if file.PixelRepresentation else (0.0, 2 * half - 1)
    slope, intercept = file.get("RescaleSlope"), file.get("RescaleIntercept")
    if slope is None or intercept is None:
        return low, high
    return low * float(slope) + float(intercept), high * float(slope) + float(intercept)
