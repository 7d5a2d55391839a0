"""Every kind of fault of a picture or its path; imported, they join FAULTS."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from tests.faults import FAULTS, DataSet, fault

__all__ = ["FAULTS"]


@fault
def path_absolute(data: DataSet) -> None:
    record = data.one()
    record["image"] = str(data.picture(record).resolve())


@fault
def path_outside(data: DataSet) -> None:
    data.one()["image"] = "../../../etc/passwd"


@fault
def path_url(data: DataSet) -> None:
    data.one()["image"] = "http://169.254.169.254/latest/meta-data"


@fault
def path_backslash(data: DataSet) -> None:
    record = data.one()
    record["image"] = record["image"].replace("/", "\\")


@fault
def picture_case(data: DataSet) -> None:
    record = data.one()
    record["image"] = record["image"].replace(".png", ".PNG")


@fault
def picture_missing(data: DataSet) -> None:
    record = data.one()
    data.picture(record).rename(data.picture(record).with_suffix(".gone.png"))


@fault
def picture_truncated(data: DataSet) -> None:
    path = data.picture(data.one())
    path.write_bytes(path.read_bytes()[:-400])


@fault
def picture_broken(data: DataSet) -> None:
    path = data.picture(data.one())
    raw = bytearray(path.read_bytes())
    middle = raw.index(b"IDAT") + 40
    raw[middle : middle + 200] = b"\xff" * 200
    path.write_bytes(raw)


@fault
def picture_format(data: DataSet) -> None:
    data.picture(data.one()).write_text("<html>not found</html>")


@fault
def picture_too_large(data: DataSet) -> None:
    path = data.picture(data.one())
    raw = bytearray(path.read_bytes())
    raw[16:24] = (30_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    path.write_bytes(raw)


@fault
def picture_32bit(data: DataSet) -> None:
    record = data.one()
    record["image"] = "wide.tiff"
    Image.fromarray(np.arange(64 * 64, dtype=np.int32).reshape(64, 64)).save(data.images / "wide.tiff")


@fault
def picture_white(data: DataSet) -> None:
    record = data.one()
    record["image"] = "dark.png"
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(data.images / "dark.png")


def photo(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Return a picture that looks like no other."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@fault
def picture_tiny(data: DataSet) -> None:
    photo(1, 30, 12).save(data.picture(data.one()))


@fault
def picture_narrow(data: DataSet) -> None:
    photo(2, 400, 20).save(data.picture(data.one()))


@fault
def picture_blank(data: DataSet) -> None:
    Image.new("RGB", (96, 96), "white").save(data.picture(data.one()))


def tiff(data: DataSet, name: str, *pages: Image.Image, **options: Any) -> None:
    """Give a record a TIFF of some pages."""
    data.one()["image"] = name
    pages[0].save(data.images / name, save_all=True, append_images=pages[1:], **options)


@fault
def picture_preview(data: DataSet) -> None:
    tiff(data, "slide.tif", photo(20), photo(21), tiffinfo={254: 1})


@fault
def picture_channels(data: DataSet) -> None:
    pages = [photo(seed).convert("L") for seed in (22, 23)]
    tiff(data, "cells.tif", *pages, tiffinfo={270: "ImageJ=1.54\nimages=2\nchannels=2\n"})


@fault
def picture_profile(data: DataSet) -> None:
    record = data.one()
    record["image"] = "printed.jpg"
    grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    photo(24).save(data.images / "printed.jpg", icc_profile=grey)


@fault
def picture_rotated(data: DataSet) -> None:
    record = data.one()
    record["image"] = "lying.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(3).save(data.images / "lying.jpg", exif=exif)


@fault
def picture_16bit(data: DataSet) -> None:
    grey = np.asarray(photo(4).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(data.picture(data.one()))


@fault
def picture_alpha(data: DataSet) -> None:
    image = photo(5)
    image.putalpha(128)
    image.save(data.picture(data.one()), pnginfo=PngImagePlugin.PngInfo())


@fault
def picture_animated(data: DataSet) -> None:
    record = data.one()
    record["image"] = "moving.gif"
    photo(6).save(data.images / "moving.gif", save_all=True, append_images=[photo(7)])


@fault
def picture_suffix(data: DataSet) -> None:
    photo(8).save(data.picture(data.one()), format="JPEG")


@fault
def picture_duplicate(data: DataSet) -> None:
    shutil.copy(data.picture(data.one()), data.picture(data.one()))


@fault
def picture_near_duplicate(data: DataSet) -> None:
    with Image.open(data.picture(data.one())) as image:
        image.resize((120, 120), Image.Resampling.BICUBIC).save(data.picture(data.one()))


@fault
def leak_picture(data: DataSet) -> None:
    shutil.copy(held_out_picture(data, 0), data.picture(data.one()))


@fault
def leak_near_picture(data: DataSet) -> None:
    with Image.open(held_out_picture(data, 1)) as image:
        image.resize((110, 110), Image.Resampling.BICUBIC).save(data.picture(data.one()))


def held_out_picture(data: DataSet, number: int) -> Path:
    held_out = json.loads((data.folder / "held_out.json").read_text(encoding="utf-8"))
    return data.images / held_out[number]["image"]
