"""Odd pictures in a data set: what check says, what it proposes, and copies that every program reads alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dianjing.check.check import Result, Settings, check
from dianjing.check.copies import write_copies
from dianjing.cli.main import main
from dianjing.errors import DataError
from dianjing.pictures.image import ImageProcessor
from dianjing.pictures.picture import load_image
from dianjing.pictures.rule import PLAIN, PictureRule
from tests.odd_pictures import TWELVE, WHOLE, ramp, write_png
from tests.odd_tiffs import ODD, tiff

CLIP = {
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
COPIED = [
    "lying.jpg",
    "rgb16.png",
    "rgba16.png",
    "p3.png",
    "p3_alpha.png",
    "planar16.tif",
    "sbit_rgb.png",
    "max_sample.tif",
    "white_is_zero16.tif",
    "lying6_cmyk8.tif",
    "rgb8.jp2",
    "grey16.pgm",
]


def records(folder: Path, names: list[str]) -> Path:
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Waves."}]
    written = [{"id": f"{i}", "image": name, "conversations": said} for i, name in enumerate(names)]
    (folder / "data.json").write_text(json.dumps(written))
    return folder / "data.json"


def checked(path: Path, **settings: Any) -> Result:
    return check(Settings(paths=(str(path),), workers=1, **settings), lambda *_: None)


def test_one_white_is_proposed_for_all(tmp_path: Path) -> None:
    for seed, brightest in enumerate((900, 3500, 2000)):
        write_png(tmp_path / f"{brightest}.png", ramp(brightest, seed=seed))
    path = records(tmp_path, ["900.png", "3500.png", "2000.png"])
    found = checked(path).findings.of("picture_white")
    assert len(found) == 3
    assert all("the brightest of all pictures is 3500: data.white = 4095" in finding.text for finding in found)
    result = checked(path, rule=PictureRule(white=4095))
    assert set(result.findings.counts) == {"picture_16bit"}
    assert "white is data.white 4095" in result.findings.of("picture_16bit")[0].text
    assert set(checked(path, rule=PictureRule(white=3000)).findings.counts) == {"picture_16bit", "picture_clipped"}


def test_a_brighter_picture_without_an_error_counts_for_the_proposal(tmp_path: Path) -> None:
    write_png(tmp_path / "dark.png", ramp(900))
    write_png(tmp_path / "bright.png", ramp(20_000, seed=1))
    (finding,) = checked(records(tmp_path, ["dark.png", "bright.png"])).findings.of("picture_white")
    assert "data.white = 32767" in finding.text


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("sbit.png", "picture_16bit", "sBIT 12"),
        ("max_sample.tif", "picture_16bit", "MaxSampleValue 4095"),
        ("grey16.tif", "picture_16bit", "65535, the largest there is"),
        ("p3.png", "picture_profile", "applied"),
        ("four16.tif", "picture_channels", "4 samples a pixel"),
        ("lying6_grey8.tif", "picture_rotated", "orientation 6"),
    ],
)
def test_what_is_said_of_a_picture(tmp_path: Path, name: str, code: str, words: str) -> None:
    ODD[name].write(tmp_path / name)
    assert words in checked(records(tmp_path, [name])).findings.of(code)[0].text


def test_a_lab_picture_is_not_transparent(tmp_path: Path) -> None:
    Image.new("LAB", (32, 32), (120, 100, 40)).save(tmp_path / "a.tif")
    assert "picture_alpha" not in checked(records(tmp_path, ["a.tif"])).findings.counts


@pytest.mark.parametrize(
    ("description", "code"),
    [
        ("ImageJ=1.54\nimages=2\nchannels=2\n", "picture_channels"),
        ('<?xml version="1.0"?><OME><Image><Pixels SizeC="2" SizeX="56"/></Image></OME>', "picture_channels"),
        ("a scan of two pages", "picture_animated"),
    ],
)
def test_pages_are_called_what_they_are(tmp_path: Path, description: str, code: str) -> None:
    pages = [Image.fromarray(ramp(255, seed=seed).astype(np.uint8)) for seed in range(2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], tiffinfo={270: description})
    assert code in checked(records(tmp_path, ["a.tif"])).findings.counts


def test_copies_are_read_alike_by_every_program(tmp_path: Path) -> None:
    """The stock image processor on a copy, opened by its path, against ours on the picture itself."""
    images, out = tmp_path / "images", tmp_path / "plain"
    images.mkdir()
    for name in COPIED:
        ODD[name].write(images / name)
    Image.fromarray(ramp(255, 3).astype(np.uint8)).save(images / "plain.jpg")
    changed = write_copies(str(images), [*COPIED, "plain.jpg"], out, PLAIN, lambda *_: None, workers=1)
    assert set(changed) == set(COPIED)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    ours = ImageProcessor.from_folder(tmp_path, "crop")
    stock = CLIPImageProcessorPil(**CLIP)
    for name in [*COPIED, "plain.jpg"]:
        seen = ours(load_image(str(images), name))
        with Image.open(out / changed.get(name, ("", name))[1]) as copy:
            assert copy.mode == "RGB"
            assert (stock(copy, return_tensors="pt")["pixel_values"][0] == seen).all()
    assert (out / "plain.jpg").read_bytes() == (images / "plain.jpg").read_bytes()


def test_fix_writes_records_that_name_the_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    write_png(images / "sub" / "scan.png", ramp(WHOLE))
    Image.fromarray(ramp(255, 3).astype(np.uint8)).save(images / "photo.png")
    Image.fromarray(ramp(255, 3, 1).astype(np.uint8)).save(images / "taken.tif.png")
    tiff(images / "taken.tif", ramp(WHOLE, 3, 2), photometric="rgb")
    path = records(tmp_path, ["sub/scan.png", "photo.png", "taken.tif", "taken.tif.png", "PHOTO.png"])
    out = tmp_path / "fixed.json"
    given = ["check", str(path), "--images", str(images), "--fix", str(out), "--pictures", str(tmp_path / "plain")]
    main(given)
    assert "other programs, such as the readers of an export" in capsys.readouterr().out
    names = [record["image"] for record in json.loads(out.read_text())]
    assert names == ["sub/scan.png.png", "photo.png", "taken.tif_.png", "taken.tif.png", "photo.png"]
    again = checked(out, images=str(tmp_path / "plain"))
    assert not set(again.findings.counts) & {"picture_16bit", "picture_missing"}
    with pytest.raises(DataError, match="not an empty folder"):
        write_copies(str(images), ["photo.png"], tmp_path / "plain", PLAIN, lambda *_: None, workers=1)
    assert main([*given[:-2]]) in (0, 1)


def test_the_white_of_the_command_line(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", ramp(TWELVE))
    path = records(tmp_path, ["a.png"])
    assert main(["check", str(path)]) == 1
    assert main(["check", str(path), "--white", "4095"]) == 0
