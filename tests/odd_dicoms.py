"""Odd DICOM files, each with the pixels that are right; imported, they join ODD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.odd_pictures import ODD, TWELVE, WHOLE, grey, odd, ramp, scaled
from tests.odd_tiffs import ODD as _WITH_TIFFS

__all__ = ["ODD"]
assert _WITH_TIFFS is ODD

PERSON = {
    "PatientName": "Mustermann^Erika",
    "PatientID": "PAT-4711-XY",
    "PatientBirthDate": "19640812",
    "AccessionNumber": "ACC998877",
    "InstitutionName": "St. Elsewhere Hospital",
    "ReferringPhysicianName": "Who^Doctor",
    "StudyDescription": "Thorax in two planes",
}
"""What no output may ever say."""


def write_dicom(path: Path, values: np.ndarray, syntax: str = "", bare: bool = False, **fields: Any) -> None:
    """Write a DICOM file of some pixels; `fields` replace what is derived from them."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    for name, value in PERSON.items():
        setattr(data, name, value)
    colours = values.ndim > 2 and values.shape[-1] == 3
    bits = 8 * values.dtype.itemsize
    derived: dict[str, Any] = {
        "Rows": values.shape[-3 if colours else -2],
        "Columns": values.shape[-2 if colours else -1],
        "SamplesPerPixel": 3 if colours else 1,
        "PhotometricInterpretation": "RGB" if colours else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "PixelRepresentation": int(values.dtype.kind == "i"),
        **fields,
    }
    derived["HighBit"] = derived["BitsStored"] - 1
    if colours:
        derived.setdefault("PlanarConfiguration", 0)
    for name, value in derived.items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    if syntax:
        data.compress(syntax, encoding_plugin="pydicom" if syntax.endswith(".5") else "")
    if bare:
        del data.file_meta
        data.save_as(path, implicit_vr=False, little_endian=True)
    else:
        data.save_as(path, enforce_file_format=True)


def windowed(values: np.ndarray, center: float, width: float) -> np.ndarray:
    """Return levels as the standard's formula for a LINEAR window gives them (PS3.3 C.11.2.1.2.1)."""
    inner = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    levels = np.where(values <= center - 0.5 - (width - 1) / 2, 0, inner)
    levels = np.where(values > center - 0.5 + (width - 1) / 2, 255, levels)
    return np.floor(levels + 0.5).astype(np.uint8)


def dicom(
    name: str, words: str, truth: Callable[[], np.ndarray], values: Callable[[], np.ndarray], white: int = 0, **how: Any
) -> None:
    """Add a DICOM file to ODD."""

    @odd(name, f"DICOM, {words}", truth, needs="pydicom", white=white)
    def _(path: Path) -> None:
        write_dicom(path, values(), **how)


HOUNSFIELD = -1024
dicom(
    "twelve.dcm",
    "12 bits (BitsStored), no window",
    lambda: grey(scaled(ramp(TWELVE), TWELVE)),
    lambda: ramp(TWELVE),
    BitsStored=12,
)
dicom(
    "film.dcm",
    "MONOCHROME1",
    lambda: 255 - grey(scaled(ramp(TWELVE), TWELVE)),
    lambda: ramp(TWELVE),
    BitsStored=12,
    PhotometricInterpretation="MONOCHROME1",
)
dicom(
    "window.dcm",
    "window",
    lambda: grey(windowed(ramp(TWELVE).astype(float), 1500, 1000)),
    lambda: ramp(TWELVE),
    BitsStored=12,
    WindowCenter=1500,
    WindowWidth=1000,
)
dicom(
    "film_window.dcm",
    "MONOCHROME1 with a window",
    lambda: 255 - grey(windowed(ramp(TWELVE).astype(float), 2000, 3000)),
    lambda: ramp(TWELVE),
    BitsStored=12,
    WindowCenter=2000,
    WindowWidth=3000,
    PhotometricInterpretation="MONOCHROME1",
)
dicom(
    "ct.dcm",
    "slope, intercept and the first of two windows",
    lambda: grey(windowed(ramp(TWELVE).astype(float) + HOUNSFIELD, 40, 400)),
    lambda: ramp(TWELVE).astype(np.int16),
    RescaleSlope=1,
    RescaleIntercept=HOUNSFIELD,
    WindowCenter=[40, -600],
    WindowWidth=[400, 1500],
)
dicom(
    "exact.dcm",
    "window LINEAR_EXACT",
    lambda: grey(scaled(ramp(TWELVE), 2000, 1000)),
    lambda: ramp(TWELVE),
    BitsStored=12,
    WindowCenter=1500,
    WindowWidth=1000,
    VOILUTFunction="LINEAR_EXACT",
)
dicom(
    "sigmoid.dcm",
    "window SIGMOID",
    lambda: grey(scaled(1 / (1 + np.exp(-4 * (ramp(TWELVE).astype(float) - 1500) / 1000)), 1)),
    lambda: ramp(TWELVE),
    BitsStored=12,
    WindowCenter=1500,
    WindowWidth=1000,
    VOILUTFunction="SIGMOID",
)
dicom(
    "signed12.dcm",
    "12 bits signed, no window",
    lambda: grey(scaled(ramp(TWELVE).astype(int) - 2048, 2047, -2048)),
    lambda: ramp(TWELVE).astype(np.int16) - 2048,
    BitsStored=12,
)
dicom(
    "sixteen.dcm",
    "16 bits, 12 of them used, no window",
    lambda: grey(scaled(ramp(TWELVE), TWELVE)),
    lambda: ramp(TWELVE),
    white=TWELVE,
)
dicom("whole.dcm", "16 bits, all used", lambda: grey(scaled(ramp(WHOLE), WHOLE)), lambda: ramp(WHOLE))
dicom(
    "eight.dcm",
    "8 bits",
    lambda: grey(ramp(255).astype(np.uint8)),
    lambda: ramp(255).astype(np.uint8),
)
dicom("rgb.dcm", "RGB", lambda: ramp(255, 3).astype(np.uint8), lambda: ramp(255, 3).astype(np.uint8))
dicom(
    "rle",
    "RLE, a name without ending",
    lambda: grey(scaled(ramp(TWELVE), TWELVE)),
    lambda: ramp(TWELVE),
    BitsStored=12,
    syntax="1.2.840.10008.1.2.5",
)
dicom(
    "bare.dcm",
    "without preamble",
    lambda: grey(scaled(ramp(TWELVE), TWELVE)),
    lambda: ramp(TWELVE),
    BitsStored=12,
    bare=True,
)


def ybr(rgb: np.ndarray) -> np.ndarray:
    """Return colours as YBR_FULL (PS3.3 C.7.6.3.1.2), rounded."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return np.clip(np.round(rgb.astype(float) @ matrix.T + (0, 128, 128)), 0, 255).astype(np.uint8)


@odd("ybr.dcm", "DICOM, YBR_FULL", lambda: ramp(255, 3).astype(np.uint8), within=2, needs="pydicom")
def _(path: Path) -> None:
    write_dicom(path, ybr(ramp(255, 3)), PhotometricInterpretation="YBR_FULL")


FRAMES = [ramp(TWELVE, seed=seed) for seed in range(3)]
dicom(
    "frames.dcm",
    "several frames, of which the first is read",
    lambda: grey(scaled(FRAMES[0], TWELVE)),
    lambda: np.stack(FRAMES),
    BitsStored=12,
    NumberOfFrames=3,
)


def lut() -> np.ndarray:
    """Return a table of 12 bits that is no straight line."""
    return np.round(np.sqrt(np.arange(TWELVE + 1) / TWELVE) * TWELVE).astype(np.uint16)


@odd("lut.dcm", "DICOM, VOI LUT", lambda: grey(scaled(lut()[ramp(TWELVE)], TWELVE)), needs="pydicom")
def _(path: Path) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    item = Dataset()
    item.LUTDescriptor = [TWELVE + 1, 0, 12]
    item.add_new("LUTData", "OW", lut().tobytes())
    write_dicom(path, ramp(TWELVE), BitsStored=12, VOILUTSequence=Sequence([item]))


def palette() -> np.ndarray:
    return np.stack([np.arange(256) * 257, np.arange(256)[::-1] * 257, np.full(256, 32896)]).astype(np.uint16)


@odd(
    "palette.dcm",
    "DICOM, PALETTE COLOR",
    lambda: scaled(palette().T[ramp(255)], WHOLE),
    needs="pydicom",
)
def _(path: Path) -> None:
    tables = dict(zip(("Red", "Green", "Blue"), palette(), strict=True))
    fields: dict[str, Any] = {}
    for colour, table in tables.items():
        fields[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        fields[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    write_dicom(path, ramp(255).astype(np.uint8), PhotometricInterpretation="PALETTE COLOR", **fields)


@odd(
    "enhanced.dcm",
    "DICOM, a window for each frame",
    lambda: grey(windowed(FRAMES[0] * 2.0 - 100, 900, 800)),
    needs="pydicom",
)
def _(path: Path) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    groups = []
    for number in range(3):
        window, values, group = Dataset(), Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = 900 + 100 * number, 800
        values.RescaleSlope, values.RescaleIntercept = 2, -100
        group.FrameVOILUTSequence = Sequence([window])
        group.PixelValueTransformationSequence = Sequence([values])
        groups.append(group)
    write_dicom(
        path, np.stack(FRAMES), BitsStored=12, NumberOfFrames=3, PerFrameFunctionalGroupsSequence=Sequence(groups)
    )
