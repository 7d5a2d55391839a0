"""Finding pictures, refusing what must not be opened, and telling near-duplicates."""

from __future__ import annotations

import base64
import io
import itertools
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from PIL.JpegImagePlugin import JpegImageFile

from dianjing.errors import DataError
from dianjing.make.pictures import NEAR, data_uri, dhash, find_pictures, look, named, near_duplicates, sent_size
from tests.chaos.pictures import write_pictures
from tests.loaded_models import picture


def test_a_folder_and_a_list_name_the_same_pictures(tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "images", 5)
    (tmp_path / "images" / "notes.txt").write_text("no picture")
    root, found, others = find_pictures(tmp_path / "images")
    assert (root, found, others) == (str(tmp_path / "images"), names, {".txt": 1})
    listed = tmp_path / "images" / "list.txt"
    listed.write_text("\n".join([*reversed(names), "", names[0]]))
    assert find_pictures(listed) == (str(tmp_path / "images"), names, {})
    assert [one.name for one in look(listed).kept] == names


def test_what_must_not_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    images = tmp_path / "images"
    names = write_pictures(images, 3)
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (images / "linked.png").symlink_to(tmp_path / "outside.png")
    (images / "linked_folder").symlink_to(tmp_path)
    (images / "broken.jpg").write_bytes(b"no picture")
    Image.new("1", (20_000, 20_000)).save(images / "bomb.png")
    os.mkfifo(images / "pipe.png")
    (images / os.fsdecode(b"\xff.png")).write_bytes((images / names[0]).read_bytes())
    found = look(images)
    assert [one.name for one in found.kept] == names
    assert set(found.refused) == {"linked.png", "broken.jpg", "bomb.png", "pipe.png", "?.png"}
    assert "leads out" in found.refused["linked.png"]
    assert "too large" in found.refused["bomb.png"]
    listed = tmp_path / "images" / "list.txt"
    listed.write_text("../outside.png\n/etc/passwd\nhttp://x/a.png\nmissing.png\n")
    assert len(look(listed).refused) == 4


def test_same_content_is_kept_once(tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 2)
    (tmp_path / "zwin.png").write_bytes((tmp_path / names[0]).read_bytes())
    found = look(tmp_path)
    assert [one.name for one in found.kept] == names
    assert found.duplicates == {"zwin.png": names[0]}


def test_nothing_there_is_said(tmp_path: Path) -> None:
    for images in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match=str(images)):
            find_pictures(images)
    (tmp_path / "list").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match="not a folder, a picture or"):
        find_pictures(tmp_path / "list")


def test_dhash_survives_small_changes_and_tells_pictures_apart() -> None:
    image = picture(12, 9, 3).resize((240, 180), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=60)
    changed = [Image.open(buffer), image.resize((120, 90)), image.filter(ImageFilter.GaussianBlur(1))]
    assert [(dhash(image) ^ dhash(one)).bit_count() <= NEAR for one in changed] == [True] * 3
    assert (dhash(image) ^ dhash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))).bit_count() > NEAR
    assert dhash(Image.linear_gradient("L").rotate(90)) in (0, (1 << 64) - 1)


def by_definition(hashes: list[int]) -> set[frozenset[int]]:
    """Return the groups as the closure of "at most NEAR bits apart", all pairs compared."""
    groups = [{i} for i in range(len(hashes))]
    for a, b in itertools.combinations(range(len(hashes)), 2):
        if (hashes[a] ^ hashes[b]).bit_count() <= NEAR:
            first, second = (next(group for group in groups if i in group) for i in (a, b))
            if first is not second:
                groups.remove(second)
                first |= second
    return {frozenset(group) for group in groups if len(group) > 1}


@given(st.integers(), st.integers(0, 6))
def test_near_duplicates_are_those_of_the_definition(seed: int, flips: int) -> None:
    rng = random.Random(seed)
    hashes = [rng.getrandbits(64) for _ in range(4)]
    for _ in range(12):
        value = rng.choice(hashes)
        for bit in rng.sample(range(64), rng.randint(0, flips)):
            value ^= 1 << bit
        hashes.append(value)
    assert {frozenset(group) for group in near_duplicates(hashes)} == by_definition(hashes)


def test_a_picture_is_sent_small_and_never_enlarged(tmp_path: Path) -> None:
    picture(300, 200).save(tmp_path / "a.png")
    for edge, size in ((150, (150, 100)), (1024, (300, 200))):
        uri = data_uri(str(tmp_path), "a.png", edge)
        head, _, content = uri.partition(",")
        sent = Image.open(io.BytesIO(base64.b64decode(content)))
        kind = "JPEG" if edge == 150 else "PNG"
        assert (head, sent.format, sent.size) == (f"data:image/{kind.lower()};base64", kind, size)
        assert sent_size((300, 200), edge) == size
    assert sent_size((16000, 1), 100) == (100, 1)


def test_a_picture_that_need_not_shrink_is_sent_as_it_is(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 48), (255, 0, 0))
    image.paste((0, 0, 255), (31, 0, 33, 48))
    image.save(tmp_path / "a.png")
    sent = Image.open(io.BytesIO(base64.b64decode(data_uri(str(tmp_path), "a.png", 1024).partition(",")[2])))
    assert sent.tobytes() == image.tobytes()


def test_a_large_picture_keeps_its_colour_in_full(tmp_path: Path) -> None:
    pixels = random.Random(0).randbytes(3 * 400 * 400)
    Image.frombytes("RGB", (400, 400), pixels).save(tmp_path / "a.png")
    data = base64.b64decode(data_uri(str(tmp_path), "a.png", 1024).partition(",")[2])
    sent = Image.open(io.BytesIO(data))
    assert isinstance(sent, JpegImageFile)
    assert [one[1:3] for one in sent.layer] == [(1, 1)] * 3  # sampling of the three channels


def test_what_is_left_alone_is_named_by_its_ending(tmp_path: Path) -> None:
    images = tmp_path / "images"
    names = write_pictures(images, 2)
    (images / "__MACOSX").mkdir()
    for name in ("a.MOV", "b.mov", "notes.txt", "IM0001", "._001.png", "__MACOSX/001.png"):
        (images / name).write_bytes(b"x")
    found = look(images)
    assert [one.name for one in found.kept] == names
    assert not found.refused
    assert found.other_files == {".mov": 2, ".txt": 1, "without an ending": 1, "of macOS (._)": 1}
    assert named(found.other_files).startswith("2 .mov, ")
