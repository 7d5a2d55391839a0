"""Odd pictures have the pixels that they should have, wherever they are read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dianjing.errors import DataError
from dianjing.pictures.picture import check_image, load_image
from dianjing.pictures.rule import PictureRule
from tests import picture_table
from tests.odd_dicoms import ODD
from tests.odd_pictures import HEIGHT, TWELVE, WIDTH, Odd, png_chunks, ramp, write_png
from tests.odd_tiffs import tiff

every = pytest.mark.parametrize("odd", ODD.values(), ids=lambda odd: odd.name)


def written(odd: Odd, folder: Path) -> str:
    if odd.needs and importlib.util.find_spec(odd.needs) is None:
        pytest.skip(f"{odd.needs} is not installed")
    odd.write(folder / odd.name)
    return odd.name


@every
def test_the_pixels_are_right(odd: Odd, tmp_path: Path) -> None:
    name, rule = written(odd, tmp_path), PictureRule(white=odd.white)
    image = load_image(str(tmp_path), name, rule)
    truth = odd.truth().astype(int)
    pixels = np.asarray(image).astype(int)
    assert image.mode == "RGB"
    assert not image.info
    assert pixels.shape == truth.shape
    assert np.abs(pixels - truth).max() <= odd.within
    assert check_image(str(tmp_path), name, rule) == (tmp_path / name).stat().st_size


def test_there_are_many() -> None:
    assert len(ODD) >= 40


@pytest.mark.parametrize(
    "name", [name for name, odd in ODD.items() if odd.white == TWELVE], ids=lambda name: name.partition(".")[0]
)
def test_a_dark_picture_without_a_white_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    ODD[name].write(tmp_path / name)
    for read in (load_image, check_image):
        with pytest.raises(DataError, match=r"only up to 4095 of 65535.*data\.white = 4095"):
            read(str(tmp_path), name)


def test_values_below_zero_ask_for_a_white(tmp_path: Path) -> None:
    tiff(tmp_path / "ct.tif", ramp(30_000).astype(np.int16) - 1000)
    with pytest.raises(DataError, match=r"from -1000 to 29000 of 32767.*data\.white = 32767, and values below 0"):
        load_image(str(tmp_path), "ct.tif")


def test_a_black_picture_needs_no_white(tmp_path: Path) -> None:
    write_png(tmp_path / "black.png", np.zeros((HEIGHT, WIDTH), np.uint16))
    assert load_image(str(tmp_path), "black.png").getextrema() == ((0, 0),) * 3


def test_a_quarter_of_the_range_is_enough(tmp_path: Path) -> None:
    write_png(tmp_path / "enough.png", ramp(16_384))
    write_png(tmp_path / "dark.png", ramp(16_383))
    assert load_image(str(tmp_path), "enough.png").getextrema()[0] == (0, 64)
    with pytest.raises(DataError, match="only up to 16383"):
        load_image(str(tmp_path), "dark.png")


def test_what_is_above_the_white_is_white(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", ramp(5000))
    pixels = np.asarray(load_image(str(tmp_path), "a.png", PictureRule(white=TWELVE)))[..., 0]
    assert (pixels[ramp(5000) >= TWELVE] == 255).all()


def test_sixteen_significant_bits_name_no_white(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", ramp(TWELVE))
    png_chunks(tmp_path / "a.png", (b"sBIT", b"\x10"))
    with pytest.raises(DataError, match=r"data\.white"):
        load_image(str(tmp_path), "a.png")


def test_a_page_is_chosen_by_its_number(tmp_path: Path) -> None:
    import tifffile

    pages = [ramp(255, 3, seed).astype(np.uint8) for seed in range(3)]
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        for page in pages:
            file.write(page, photometric="rgb", metadata=None)
    for number, page in enumerate(pages, 1):
        assert np.array_equal(np.asarray(load_image(str(tmp_path), f"pages.tif#{number}")), page)
    assert np.array_equal(np.asarray(load_image(str(tmp_path), "pages.tif")), pages[0])
    with pytest.raises(DataError, match="the file has 3 frames or pages"):
        load_image(str(tmp_path), "pages.tif#4")
    tiff(tmp_path / "a#2.tif", ramp(65535))
    assert load_image(str(tmp_path), "a#2.tif").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\0\0\0\x18ftypmp42", "a video"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"\0\5\x16\7" + bytes(40), "macOS"),
        (b"%PDF-1.7", "a PDF"),
        (b"II*\0" + bytes(40), "broken"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, start: bytes, message: str) -> None:
    (tmp_path / "a.jpg").write_bytes(start)
    with pytest.raises(DataError, match=message):
        load_image(str(tmp_path), "a.jpg")


def test_a_tiff_of_many_bands_is_refused(tmp_path: Path) -> None:
    bands = np.zeros((HEIGHT, WIDTH, 6), np.uint16)
    tiff(tmp_path / "a.tif", bands, photometric="rgb", extrasamples=["unspecified"] * 3)
    with pytest.raises(DataError, match="6 bands"):
        load_image(str(tmp_path), "a.tif")


@pytest.mark.parametrize("page", ["pictures.md", "pictures_zh.md"])
def test_the_tables_of_the_documents_are_what_the_script_prints(page: str) -> None:
    pytest.importorskip("pydicom", reason="the table has DICOM files")
    pytest.importorskip("pillow_heif", reason="the table has HEIC files")
    text = (Path(__file__).parents[3] / "docs" / page).read_text(encoding="utf-8")
    for row in (*picture_table.read(), *picture_table.refused()):
        assert f"\n{row}\n" in text
