"""Grey pictures in DICOM files, read by pydicom (``pip install "fedcompo[dicom]"``).

Stored values become values of the modality (a table, or slope and intercept), and these become
0..255 as the file says: by its table of values of interest, or else by its window (PS3.3, C.11). A
file without either keeps its values, of CT from -1024 HU on, and all pictures of a client share the
range that becomes 0..255 (:mod:`fedcompo.data.pictures`). ``MONOCHROME1`` is inverted, so that high
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
AIR = 1024
"""What makes values of CT (Hounsfield units; air has -1000) positive."""


def dicom_picture(content: bytes) -> Image.Image:
    """Read a DICOM file of one grey frame; may raise any exception.

    Returns:
        8 bits; of a file without a window 32-bit integers or floating-point numbers.

    Raises:
        ValueError: If pydicom is not installed, or the file holds no picture, colours or several
            frames.
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
    if "PixelData" not in file:
        raise ValueError("it is a DICOM file without a picture")
    if (frames := int(file.get("NumberOfFrames") or 1)) > 1:
        raise ValueError(f"it is a DICOM file of {frames} frames; export those you want as PNG")
    kind = str(file.get("PhotometricInterpretation", "not told"))
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"it is a DICOM file whose pixels are {kind}; export it as PNG")
    inverted, (first, last) = kind == "MONOCHROME1", _range(file)
    values = apply_modality_lut(file.pixel_array, file)
    table = file.get("VOILUTSequence")
    if table:
        first, last = 0.0, 2.0 ** table[0].LUTDescriptor[2] - 1
    if table or None not in (file.get("WindowCenter"), file.get("WindowWidth")):
        shares = (apply_voi_lut(values, file).astype(np.float64) - first) / (last - first)
        grey = np.rint(shares.clip(0, 1) * 255).astype(np.uint8)
        picture, oddity = Image.fromarray(255 - grey if inverted else grey), WINDOWED
    else:
        if file.get("Modality") == "CT":
            values, last = (values + AIR).clip(0), last + AIR
        values = max(first, last) - values if inverted else values
        whole = (values == np.rint(values)).all()
        picture = Image.fromarray(values.astype(np.int32 if whole else np.float32))
        oddity = UNWINDOWED
    picture.info[ODDITY] = oddity
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
