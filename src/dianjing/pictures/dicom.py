"""DICOM pictures, as a viewer first shows them; nothing that a file says of a person leaves this file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dianjing.extras import install
from dianjing.pictures.rule import PictureError
from dianjing.pictures.threads import WARNINGS
from dianjing.pictures.wide import Depth, Samples

NEEDS = "a DICOM file, which needs pydicom"
VIDEO = "1.2.840.10008.1.2.4.10"
"""How the transfer syntaxes of MPEG-2, MPEG-4 and HEVC begin."""
NO_PICTURE = "a DICOM file without a picture"
SEQUENCES = {"RescaleSlope": "PixelValueTransformationSequence", "WindowCenter": "FrameVOILUTSequence"}


class DicomPicture(Image.Image):
    """The header of a DICOM file, in the form of an opened picture."""

    format = "DICOM"

    def __init__(self, path: str, header: Any) -> None:
        super().__init__()
        self.path = path
        self.n_frames = max(int(header.get("NumberOfFrames") or 1), 1)
        self.frame = 0
        self._size = int(header.Columns), int(header.Rows)
        self._mode = "L" if int(header.get("SamplesPerPixel") or 1) == 1 else "RGB"
        profile = header.get("ICCProfile")
        if profile:
            self.info["icc_profile"] = bytes(profile)

    def seek(self, frame: int) -> None:
        """Choose a frame, counted from 0."""
        if not 0 <= frame < self.n_frames:
            raise EOFError
        self.frame = frame

    def tell(self) -> int:
        """Return the frame that is read."""
        return self.frame


def open_dicom(path: str, name: str) -> DicomPicture:
    """Return the header of a DICOM file.

    Raises:
        PictureError: pydicom is not installed, or there is no picture in the file.
    """
    with _silent(name) as pydicom:
        header = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        if "DirectoryRecordSequence" in header:
            raise PictureError("picture_format", name, "a DICOMDIR, the list of a disc's files: give one of the files")
        if not header.get("Rows") or not header.get("Columns"):
            text = f"{NO_PICTURE} (a report, plan, curve or waveform): leave the record out"
            raise PictureError("picture_format", name, text)
        return DicomPicture(path, header)


def dicom_samples(image: DicomPicture, name: str) -> Samples:
    """Return the pixels of a DICOM, with the black and white of its window.

    Raises:
        PictureError: its pixels cannot be read.
    """
    with _silent(name) as pydicom:
        data = pydicom.dcmread(image.path, force=True)
        _name_syntax(data, pydicom)
        _require_pixels(data, name, pydicom)
        syntax = data.file_meta.TransferSyntaxUID
        try:
            return _samples(data, image.frame)
        except RuntimeError:  # no decoder could
            text = (
                f"its pixels, compressed as {syntax.name}, are broken or of a kind that the installed decoders do not"
            )
            raise PictureError("picture_broken", name, f"{text} read; export it again, uncompressed") from None


def _samples(data: Any, frame: int) -> Samples:
    from pydicom.pixels.processing import apply_color_lut
    from pydicom.pixels.utils import pixel_array

    kind = str(data.PhotometricInterpretation)
    values = np.asarray(pixel_array(data, index=frame))
    bits, signed = int(data.BitsStored), bool(data.get("PixelRepresentation"))
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, data)
        return Samples(values=values[..., :3], depth=_of_bits(8 * values.dtype.itemsize, named=True))
    if int(data.get("SamplesPerPixel") or 1) > 1:
        return Samples(values=values, depth=_of_bits(bits))
    values, depth = _windowed(values, data, frame, bits, signed)
    return Samples(values=values[..., None], depth=depth, inverted=kind == "MONOCHROME1")


def _windowed(values: NDArray[Any], data: Any, frame: int, bits: int, signed: bool) -> tuple[NDArray[Any], Depth]:
    """Return grey values after slope and intercept, and which of them are black and white."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    if "ModalityLUTSequence" in data:
        values = apply_modality_lut(values, data)
        bits, signed = int(data.ModalityLUTSequence[0].LUTDescriptor[2]), False
    linear = _holder(data, frame, "RescaleSlope")
    slope, intercept = (
        float(linear.get(key) or other) for key, other in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    window = _holder(data, frame, "WindowCenter")
    center, width = (_first(window.get(key)) for key in ("WindowCenter", "WindowWidth"))
    if "VOILUTSequence" in window and slope == 1:
        looked_up = apply_voi((values + intercept).astype(np.int32), window)
        return looked_up, _of_bits(int(window.VOILUTSequence[0].LUTDescriptor[2]), named=True)
    if center is None or not width:
        black = -(2 ** (bits - 1)) if signed and bits < 16 else 0
        depth = _of_bits(bits, signed)
        ends = (depth.white, black) if slope < 0 else (black, depth.white)
        return values, Depth(bits=16, black=ends[0], white=ends[1], named_by=depth.named_by, signed=signed)
    values = values * slope + intercept
    shape = str(window.get("VOILUTFunction") or "LINEAR")
    named_by = "its window"
    if shape == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width)), Depth(bits=16, white=1, named_by=named_by)
    middle, reach = (center, width / 2) if shape == "LINEAR_EXACT" else (center - 0.5, (width - 1) / 2)
    return values, Depth(bits=16, black=middle - reach, white=middle + reach, named_by=named_by)


def _of_bits(bits: int, signed: bool = False, named: bool = False) -> Depth:
    """Return the depth of stored bits; 16 of them name no white, since that is the size of their cell."""
    if bits == 16 and not named:
        return Depth(bits=16, signed=signed)
    return Depth(bits=16, white=2 ** (bits - signed) - 1, named_by=f"BitsStored {bits}", signed=signed)


def _holder(data: Any, frame: int, key: str) -> Any:
    """Return what holds a value for a frame: its own group, that of all frames, or the file."""
    groups = [
        *data.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1],
        *data.get("SharedFunctionalGroupsSequence", [])[:1],
    ]
    for group in groups:
        for item in group.get(SEQUENCES[key], []):
            if key in item:
                return item
    return data


def _first(value: Any) -> float | None:
    """Return the first of one or several numbers."""
    if value is None or value == "":
        return None
    return float(value) if isinstance(value, int | float | str) else float(value[0])


def _name_syntax(data: Any, pydicom: Any) -> None:
    """Say how the pixels of a file without a meta header are written: as the rest of it."""
    meta = getattr(data, "file_meta", None) or pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in meta:
        implicit, little_endian = data.original_encoding
        kind = "ImplicitVR" if implicit else "ExplicitVR"
        meta.TransferSyntaxUID = getattr(pydicom.uid, f"{kind}{'Little' if little_endian else 'Big'}Endian")
    data.file_meta = meta


def _require_pixels(data: Any, name: str, pydicom: Any) -> None:
    if "FloatPixelData" in data or "DoubleFloatPixelData" in data or int(data.get("BitsAllocated") or 0) > 16:
        text = "a DICOM file with 32 or 64 bits a pixel (a dose or another map): no value is known to be white"
        raise PictureError("picture_32bit", name, text)
    if "PixelData" not in data:
        raise PictureError("picture_format", name, f"{NO_PICTURE}: its pixel data is missing")
    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return
    if str(syntax).startswith(VIDEO):
        raise PictureError("picture_format", name, f"a DICOM video ({syntax.name}): save its frames as PNG")
    try:
        available = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        text = f"a DICOM file compressed as {syntax.name}, which needs more packages: {install('dicom')}"
        raise PictureError("picture_format", name, text)


@contextmanager
def _silent(name: str) -> Iterator[Any]:
    """Give pydicom, and keep to ourselves whatever it says: its messages quote what a file says of a person.

    Raises:
        PictureError: pydicom is not installed, or it failed.
    """
    try:
        import pydicom
    except ImportError:
        raise PictureError("picture_format", name, f"{NEEDS}: {install('dicom')}") from None
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    try:
        with WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield pydicom
    except PictureError:
        raise
    except Exception:  # what pydicom and its decoders raise depends on where the file is wrong
        text = "a DICOM file whose header or pixels are broken, or not as the standard has them; export it again"
        raise PictureError("picture_broken", name, text) from None
