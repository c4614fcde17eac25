"""DICOM files: windows, tables, inverted ones, and what is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.data.client_data import load_folder
from fedcompo.data.dicom import ODDITY, dicom_picture
from fedcompo.errors import DataError
from fedcompo.report.pictures import UNWINDOWED, WINDOWED, notes_on

pydicom = pytest.importorskip("pydicom")
GREY = Preprocessing(image_size=4, channels=1, mean=(0.5,), std=(0.5,), interpolation="nearest")
STORED = np.array([[0, 100, 900, 1000], [1024, 1100, 2000, 4095], [7, 8, 9, 10], [11, 12, 13, 14]])


def dicom(stored: np.ndarray = STORED, *, signed: bool = False, **elements: Any) -> bytes:
    """A file of 12 bits in 16, as CT and X-ray machines write them."""
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file.Rows, file.Columns = stored.shape[-2:]
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    file.SamplesPerPixel, file.PixelRepresentation = 1, int(signed)
    file.PhotometricInterpretation = "MONOCHROME2"
    file.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
    for name, value in elements.items():
        setattr(file, name, value)
    if file.PixelData is None:
        del file.PixelData
    written = io.BytesIO()
    pydicom.dcmwrite(written, file, enforce_file_format=True)
    return written.getvalue()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(dicom_picture(content))


def linear(value: float, centre: float, width: float) -> float:
    """The share of brightness of a value in a window, as the standard writes it (C.11.2.1.2.1)."""
    if value <= centre - 0.5 - (width - 1) / 2:
        return 0.0
    if value > centre - 0.5 + (width - 1) / 2:
        return 1.0
    return (value - (centre - 0.5)) / (width - 1) + 0.5


@pytest.mark.parametrize("slope", [1.0, 2.0, -1.0])
@pytest.mark.parametrize("signed", [False, True])
def test_a_window_on_values_of_the_modality_becomes_0_to_255(slope: float, signed: bool):
    stored = STORED - 2048 if signed else STORED
    content = dicom(
        stored,
        signed=signed,
        RescaleSlope=slope,
        RescaleIntercept=-1024,
        WindowCenter=[40, 300],  # the first one holds
        WindowWidth=[400, 1500],
    )
    expected = [
        [round(255 * linear(slope * int(value) - 1024, 40, 400)) for value in row] for row in stored
    ]
    np.testing.assert_array_equal(pixels(content), expected)
    assert dicom_picture(content).info[ODDITY] == WINDOWED


def test_without_a_window_the_values_are_kept_for_one_range_of_all_pictures():
    np.testing.assert_array_equal(pixels(dicom()), STORED)
    scaled = dicom(RescaleSlope=0.5, RescaleIntercept=3)
    np.testing.assert_array_equal(pixels(scaled), STORED / 2 + 3)
    assert [dicom_picture(content).mode for content in (dicom(), scaled)] == ["I", "F"]
    assert dicom_picture(dicom()).info[ODDITY] == UNWINDOWED


@pytest.mark.parametrize("inverted", [False, True])
def test_values_of_ct_begin_at_air(inverted: bool):
    kind = {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
    ct = dicom(Modality="CT", RescaleSlope=1, RescaleIntercept=-1524, **kind)
    expected = (STORED - 500).clip(0)  # -1024 HU and less become 0
    np.testing.assert_array_equal(pixels(ct), 4095 - 500 - expected if inverted else expected)


def test_a_table_of_values_wins_over_the_window():
    table = pydicom.Dataset()
    table.LUTDescriptor = [4, 1000, 8]
    table.add_new("LUTData", "US", [5, 6, 7, 250])
    content = dicom(VOILUTSequence=[table], WindowCenter=10, WindowWidth=10)
    for stored, shown in ((0, 5), (1000, 5), (1024, 250), (4095, 250)):
        assert pixels(content)[stored == STORED] == shown


def test_monochrome1_is_inverted():
    window = {"WindowCenter": 1000, "WindowWidth": 800}
    inverted = pixels(dicom(PhotometricInterpretation="MONOCHROME1", **window))
    np.testing.assert_array_equal(inverted, 255 - pixels(dicom(**window)))


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        (tmp_path / "ward" / name).mkdir(parents=True)
        for number in range(4):
            window = {"WindowCenter": 1000, "WindowWidth": 800} if number else {}
            (tmp_path / "ward" / name / f"{number}.dcm").write_bytes(dicom(**window))
    return tmp_path / "ward"


def test_a_folder_of_them_is_read_and_noted(ward: Path):
    client = load_folder(ward, GREY, seed=0)
    assert client.train.images[0].shape == (1, 4, 4)
    assert (client.facts[WINDOWED], client.facts[UNWINDOWED]) == (6, 2)
    notes = list(notes_on({"ward": client.facts}))
    assert f"Images that {UNWINDOWED}; at ward (2)." in notes
    bare = dicom_picture((ward / "cat/0.dcm").read_bytes())
    images = torch.cat([client.train.images[:], client.test.images[:]])[:, 0].numpy()
    shown = np.rint(np.asarray(bare) / 4095 * 255)
    assert sum((image == shown).all() for image in images) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (dicom(PixelData=None), "without a picture"),
        (dicom(np.stack([STORED, STORED]), NumberOfFrames=2), "2 frames; export those you want"),
        (dicom(PhotometricInterpretation="PALETTE COLOR"), "pixels are PALETTE COLOR; export it"),
    ],
)
def test_frames_and_colours_are_refused_with_what_to_do(ward: Path, content: bytes, reason: str):
    (ward / "cat/0.dcm").write_bytes(content)
    with pytest.raises(DataError, match=f"(?s)0.dcm .*it is a DICOM file.*{reason}"):
        load_folder(ward, GREY, seed=0)


def test_without_pydicom_the_error_says_what_to_install(
    ward: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"fedcompo\[dicom\].*export it as PNG"):
        load_folder(ward, GREY, seed=0)
