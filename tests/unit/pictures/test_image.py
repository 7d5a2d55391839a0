from __future__ import annotations

import io
import json
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dianjing.errors import DataError, ModelError
from dianjing.export.layout import preprocessor_config
from dianjing.pictures.image import ImageProcessor, check_image, load_image
from dianjing.pictures.rule import PictureRule

SIZES = [
    (40, 40),
    (28, 28),
    (97, 31),
    (29, 113),
    (1, 1),
    (1, 7),
    (3, 2),
    (30, 41),
    (300, 2),
    (27, 29),
    (57, 28),
    (640, 477),
]
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 27, "width": 27},
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Pad with numpy, half of the missing rows or columns (rounded down) first."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    side = max(height, width)
    padded = np.full((side, side, 3), colour, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    padded[top : top + height, left : left + width] = pixels
    return Image.fromarray(padded)


def processor_from(tmp_path: Path, config: dict, aspect: str | None = None) -> ImageProcessor:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    return ImageProcessor.from_folder(tmp_path, aspect)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_pixels_are_bit_equal_to_transformers(tmp_path: Path, config: dict, aspect: str, size: tuple[int, int]) -> None:
    reference = (CLIPImageProcessorPil if config is CLIP else SiglipImageProcessorPil)(**config)
    image = noise(size)
    colour = (122, 116, 104) if config is CLIP else (127, 127, 127)
    given = square(image, colour) if aspect == "pad" else image
    expected = reference(given, return_tensors="pt")["pixel_values"][0]
    pixels = processor_from(tmp_path, config, aspect)(image)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_a_padded_export_gives_stock_processors_the_same_pixels(
    tmp_path: Path, config: dict, size: tuple[int, int]
) -> None:
    """It names the shorter side alone, which readers need that know no height and width."""
    ours = processor_from(tmp_path, config, "pad")
    written = preprocessor_config(ours)
    assert written["size"] == {"shortest_edge": ours.size}
    image = noise(size)
    stock = LlavaImageProcessorPil(**written)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(stock, ours(image))
    assert processor_from(tmp_path, written) == ours


def test_the_picture_can_be_had_back(tmp_path: Path) -> None:
    image = noise((28, 28))
    processor = processor_from(tmp_path, CLIP)
    assert np.array_equal(np.asarray(processor.to_picture(processor(image))), np.asarray(image))


def test_old_configs_give_sizes_as_numbers(tmp_path: Path) -> None:
    old = processor_from(tmp_path, {**CLIP, "size": 28, "crop_size": 28})
    assert old == processor_from(tmp_path, CLIP)


def test_a_processor_config_holds_it_too(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": CLIP, "patch_size": 14}))
    found = ImageProcessor.from_folder(tmp_path)
    (tmp_path / "other").mkdir()
    assert found == processor_from(tmp_path / "other", CLIP)


@pytest.mark.parametrize(("settings", "aspect"), [({}, "pad"), ({"do_pad": True}, "pad"), ({"do_pad": False}, "crop")])
def test_the_folder_says_whether_to_pad(tmp_path: Path, settings: dict, aspect: str) -> None:
    assert processor_from(tmp_path, {**CLIP, **settings}).aspect == aspect


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": None}, "not a preprocessing"),
        ({"crop_size": {"height": 900, "width": 900}}, "is larger than size"),
        ({"size": {"height": 20, "width": 30}}, "size"),
        ({"do_normalize": False}, "do_normalize is false"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        processor_from(tmp_path, {**CLIP, **change})


def test_a_tower_without_preprocessing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json"):
        ImageProcessor.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.gif", "a.tiff", "a.jpg", "sub/ä 图.png"])
def test_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (20, 10), (200, 30, 30)).save(path)
    image = load_image(str(tmp_path), name)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), (200, 30, 30), strict=True)) < 6
    assert check_image(str(tmp_path), name) == path.stat().st_size


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 1), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 1), (0, 0, 0, 128)).save(tmp_path / "half.png")
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    load = [load_image(str(tmp_path), f"{name}.png") for name in ("clear", "half", "palette")]
    assert [image.getpixel((0, 0)) for image in load] == [(255, 255, 255), (127, 127, 127), (255, 255, 255)]
    assert load[2].getpixel((1, 0)) == (40, 50, 60)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_dropped_transparency_is_pillows_conversion_to_rgb(tmp_path: Path, mode: str) -> None:
    """XTuner and LLaVA read a picture as Image.open(path).convert("RGB")."""
    colours = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4) * 2
    image = Image.fromarray(colours).convert(mode.replace("PA", "P"))
    options = {"P": {"transparency": 7}, "PA": {"transparency": bytes(range(256))}, "RGB": {"transparency": (0, 2, 4)}}
    image.save(tmp_path / "a.png", **options.get(mode, {}))
    with Image.open(tmp_path / "a.png") as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(np.asarray(load_image(str(tmp_path), "a.png", PictureRule(transparency="drop"))), expected)
    assert not np.array_equal(np.asarray(load_image(str(tmp_path), "a.png")), expected)


def test_a_folder_may_say_how_pictures_are_read(tmp_path: Path) -> None:
    said = {"white": 4095, "profiles": "ignore", "transparency": "drop"}
    assert processor_from(tmp_path, {**CLIP, "dianjing_pictures": said}).rule == PictureRule(**said)
    assert processor_from(tmp_path, CLIP).rule == PictureRule()
    for wrong in ({"transparency": "black"}, {"white": -1}, {"white": "x"}, {"profiles": 1}, {"other": 1}):
        with pytest.raises(ModelError, match="not a preprocessing that can be done here"):
            processor_from(tmp_path, {**CLIP, "dianjing_pictures": {**said, **wrong}})


def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert np.asarray(load_image(str(tmp_path), "grey.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r'picture "a\.tiff": 32-bit'):
        load_image(str(tmp_path), "a.tiff")


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.tiff")
    assert load_image(str(tmp_path), "a.tiff").mode == "RGB"


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(str(tmp_path), "a.jpg").size == (10, 20)


def test_a_truncated_picture_is_found_at_the_door(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp"):
        path = tmp_path / name
        noise((64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:-900])
        for read in (check_image, load_image):
            with pytest.raises(DataError, match=f'picture "{name}": .*broken'):
                read(str(tmp_path), name)


def test_a_complete_jpeg_with_bytes_after_its_end_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    noise((8, 8)).save(path)
    path.write_bytes(path.read_bytes() + b"\0\0\0")
    assert check_image(str(tmp_path), "a.jpg") == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "no such file"),
        ("", "no such file"),
        ("folder", "no such file"),
        ("../outside.png", "leads out of the image folder"),
        ("folder/../../outside.png", "leads out of the image folder"),
        ("../images-of-another/a.png", "leads out of the image folder"),
        ("link.png", "leads out of the image folder"),
        ("https://host/a.png", "not a path inside"),
        ("data:image/png;base64,iVBO", "not a path inside"),
        ("a\0.png", "not a path inside"),
        ("text.png", "cannot be opened"),
        ("empty.png", "the file is empty"),
        ("vector.ico", "cannot be opened"),
    ],
)
def test_what_is_not_opened(tmp_path: Path, name: str, message: str) -> None:
    noise((4, 4)).save(tmp_path / "outside.png")
    root = tmp_path / "images"
    (root / "folder").mkdir(parents=True)
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "text.png").write_text("no picture")
    (root / "empty.png").touch()
    noise((16, 16)).save(root / "vector.ico")
    for read in (check_image, load_image):
        with pytest.raises(DataError, match=message):
            read(str(root), name)


def test_an_absolute_path_is_refused_even_inside(tmp_path: Path) -> None:
    noise((4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="write one relative to it"):
        load_image(str(tmp_path), str(tmp_path / "a.png"))


def test_a_picture_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    noise((4, 4)).save(tmp_path / "real" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert load_image(str(tmp_path / "link"), "a.png").size == (4, 4)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that says it is this large, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8000, 8000), (12000, 10000), (60000, 60000), (16385, 200), (2000, 9)], ids=str)
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    for read in (check_image, load_image):
        with pytest.raises(DataError, match=r'picture "bomb\.png": .* too large or too narrow'):
            read(str(tmp_path), "bomb.png")


def test_a_broken_file_raises_nothing_but_data_errors(tmp_path: Path) -> None:
    whole = io.BytesIO()
    noise((32, 32)).save(whole, format="PNG")
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole.getvalue())
        for place in rng.integers(0, len(data), 6):
            data[place] = rng.integers(0, 256)
        (tmp_path / "a.png").write_bytes(data)
        with suppress(DataError):
            load_image(str(tmp_path), "a.png")
