"""DICOM files: pydicom's own, read or refused in a radiographer's words, and nothing said of a person."""

from __future__ import annotations

import builtins
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dianjing.cli.main import main
from dianjing.make.pictures import data_uri, look
from dianjing.pictures.picture import PictureError, check_image, load_image
from dianjing.pictures.rule import PictureRule
from tests.odd_dicoms import FRAMES, PERSON, write_dicom
from tests.odd_pictures import TWELVE, grey, ramp, scaled, write_png

pydicom = pytest.importorskip("pydicom", reason="DICOM files are read by pydicom")

FILES = sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))
NAMING = ("PN", "LO", "SH", "DA", "TM", "DT", "UI", "LT", "ST", "UC", "UT", "AS", "AE")
"""Kinds of values that may tell of a person, a place or a day."""
REFUSALS = (
    "a DICOM file without a picture",
    "with 32 or 64 bits a pixel",
    "does not say which one is white",
    "are broken or of a kind that the installed decoders do not read; export it again, uncompressed",
    "whose header or pixels are broken, or not as the standard has them; export it again",
)


def values_of(data: Any) -> Iterator[str]:
    """Yield every text in a DICOM file that says something of its own."""
    for element in data:
        if element.VR == "SQ":
            for item in element.value or ():
                yield from values_of(item)
        elif element.VR in NAMING:
            yield from (part for part in re.split(r"[\\^]", str(element.value or "")) if len(part) >= 5)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_pydicoms_own_files(path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    said = ""
    with caplog.at_level(logging.DEBUG):
        for read in (load_image, check_image):
            try:
                read(str(path.parent), path.name)
            except PictureError as error:
                said += str(error)
    assert not said or any(words in said for words in REFUSALS)
    said += caplog.text + "".join(capfd.readouterr())
    try:
        told = {*values_of(pydicom.dcmread(path, force=True))}
    except Exception:  # what is broken tells nothing
        told = set()
    assert not [value for value in told if value in said.replace(path.name, "")]


def test_most_of_them_are_read() -> None:
    read = 0
    for path in FILES:
        try:
            load_image(str(path.parent), path.name, PictureRule(white=TWELVE))
        except PictureError:
            continue
        read += 1
    assert read >= 40


def test_a_frame_is_chosen_by_its_number(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.stack(FRAMES), BitsStored=12, NumberOfFrames=3)
    for number, frame in enumerate(FRAMES, 1):
        pixels = np.asarray(load_image(str(tmp_path), f"a.dcm#{number}"))
        assert np.array_equal(pixels, grey(scaled(frame, TWELVE)))
    with pytest.raises(PictureError, match="3 frames"):
        load_image(str(tmp_path), "a.dcm#4")


def test_without_pydicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dicom(tmp_path / "a.dcm", ramp(TWELVE), BitsStored=12)
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "pydicom":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PictureError, match=r"DICOM.*pip install .*pydicom"):
        load_image(str(tmp_path), "a.dcm")


def test_nothing_of_a_person_is_in_any_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    write_dicom(images / "a.dcm", ramp(TWELVE), BitsStored=12)
    write_dicom(images / "dark.dcm", ramp(TWELVE))
    write_dicom(images / "many.dcm", np.stack(FRAMES), BitsStored=12, NumberOfFrames=3)
    (images / "cut.dcm").write_bytes((images / "a.dcm").read_bytes()[:-100])
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A chest."}]
    records = [{"id": path.name, "image": path.name, "conversations": said} for path in sorted(images.iterdir())]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    given = [str(data), "--images", str(images)]
    main(["check", *given, "--report", str(tmp_path / "report.html"), "--json"])
    main(["check", *given, "--fix", str(tmp_path / "fixed.json"), "--pictures", str(tmp_path / "plain")])
    data.write_text(json.dumps([record for record in records if record["image"] in ("a.dcm", "many.dcm")]))
    shown = ["--vision-tower", "tinyworld", "--llm", "tinyworld", "--out", str(tmp_path / "show.html")]
    assert main(["show", *given, *shown]) == 0
    found = look(images, TWELVE)
    sent = data_uri(str(images), "a.dcm", 1024)
    printed = "".join(capfd.readouterr()) + repr(found) + sent
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.parent != images]
    assert len(written) >= 5
    for value in PERSON.values():
        for part in (value, *value.split("^")):
            assert part not in printed
            assert not [whole for whole in written if part.encode() in whole]


def test_make_sends_pixels_alone(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    write_dicom(tmp_path / "a.dcm", ramp(TWELVE), BitsStored=12)
    write_png(tmp_path / "b.png", ramp(65535))
    for name in ("a.dcm", "b.png"):
        with Image.open(io.BytesIO(base64.b64decode(data_uri(str(tmp_path), name, 1024).partition(",")[2]))) as image:
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
