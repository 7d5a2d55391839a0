from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dianjing.check.check import Settings, check
from dianjing.check.convert import convert
from dianjing.check.layouts import CAPTION_QUESTION
from dianjing.data.record import load_records
from dianjing.errors import DataError
from dianjing.pictures.picture import load_image
from tests.tiny import write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    (tmp_path / "new").mkdir()
    return tmp_path


def picture(folder: Path) -> bytes:
    return (folder / "images/wide.png").read_bytes()


def uri(folder: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(folder)).decode()


def openai(folder: Path) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": uri(folder)}}]
    asked, answer = {"role": "user", "content": parts}, {"role": "assistant", "content": "A bus."}
    more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]
    named = {"role": "user", "content": [{"type": "image", "image": "tall.jpg"}, {"type": "text", "text": "And?"}]}
    return [
        {"id": "a", "messages": [{"role": "system", "content": "Be kind."}, asked, answer, *more]},
        {"messages": [named, answer]},
        {"messages": [{"role": "user", "content": "Hello!"}, answer]},
        {"messages": [{"role": "user", "content": "<image> <image>"}, answer], "images": ["wide.png"]},
        {"messages": [{"role": "tool", "content": "1"}, answer]},
    ]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_openai_messages(folder: Path) -> None:
    source = write(folder / "chat.json", openai(folder))
    out = folder / "new/out.json"
    converted = convert(str(source), str(out), str(folder / "images"))
    assert (converted.layout, converted.records, converted.pictures) == ("OpenAI messages", 3, 2)
    assert len(converted.left_out) == 2
    assert "record 3" in converted.left_out[0]
    assert 'is from "tool"' in converted.left_out[1]
    assert sum(converted.notices.values()) == 1
    records = load_records(str(out)).records
    assert [record.id for record in records] == ["a", "1", "2"]
    assert [(turn.question, turn.answer) for turn in records[0].turns] == [
        ("<image>\nWhat?", "A bus."),
        ("Sure?", "Yes."),
    ]
    stored = load_image(str(out.parent), records[0].images[0])
    assert stored.tobytes() == load_image(str(folder / "images"), "wide.png").tobytes()
    assert check(Settings(paths=(str(out),), workers=1), lambda *_: None).findings.number("error") == 0


def test_sharegpt(folder: Path) -> None:
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A bus."}]
    record = {"conversations": said, "images": ["wide.png", "tall.jpg"]}
    converted = convert(str(write(folder / "s.json", [record])), str(folder / "new/o.json"), str(folder / "images"))
    (found,) = load_records(str(folder / "new/o.json")).records
    assert converted.layout == "ShareGPT"
    assert found.turns[0].question == "<image>\n<image>\nWhat?"
    assert len(set(found.images)) == 2
    assert list(converted.notices) == ["records whose pictures were put in front of the first question"]


@pytest.mark.parametrize(
    ("columns", "question", "answer"),
    [
        ({"caption": ["A bus."]}, f"<image>\n{CAPTION_QUESTION}", "A bus."),
        ({"texts": [[{"user": "What?", "assistant": "A bus."}]]}, "<image>\nWhat?", "A bus."),
        (
            {"messages": [[{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A bus."}]]},
            "<image>\nWhat?",
            "A bus.",
        ),
    ],
)
def test_parquet(folder: Path, columns: dict[str, Any], question: str, answer: str) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow (the extra `parquet`) is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": picture(folder), "path": "../../wide.png"}]
    parquet.write_table(arrow.table({"image": images, **columns}), folder / "train.parquet")
    converted = convert(str(folder / "train.parquet"), str(folder / "new/o.json"), "")
    assert converted.left_out == []
    (found,) = load_records(str(folder / "new/o.json")).records
    assert (found.turns[0].question, found.turns[0].answer) == (question, answer)
    assert (folder / "new" / found.images[0]).read_bytes() == picture(folder)


def test_bytes_that_are_no_picture_are_not_kept(folder: Path) -> None:
    record = openai(folder)[0]
    record["messages"][1]["content"][1]["image_url"]["url"] = "data:image/png;base64,AAAA"
    converted = convert(str(write(folder / "c.json", [record])), str(folder / "new/o.json"), "")
    assert "cannot be opened as" in converted.left_out[0]
    assert list((folder / "new/o_images").iterdir()) == []


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}], "LLaVA JSON already"),
        ([{"prompt": "x"}], "questions without answers"),
        ([{"x": "x"}], "layout is not known"),
        ([], "no record"),
    ],
)
def test_what_is_not_converted(folder: Path, records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert(str(write(folder / "c.json", records)), str(folder / "new/o.json"), "")
    assert list((folder / "new").iterdir()) == []


def test_the_data_file_itself_is_never_written(folder: Path) -> None:
    source = write(folder / "c.json", openai(folder))
    before = source.read_bytes()
    with pytest.raises(DataError, match="the data file itself"):
        convert(str(source), str(source), "")
    assert source.read_bytes() == before


def test_phones_write_jpegs_of_two_pictures(folder: Path) -> None:
    with Image.open(folder / "images/tall.jpg") as image:
        image.save(folder / "images/phone.jpg", "MPO", save_all=True, append_images=[image.copy()])
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A bus."}]
    source = write(folder / "m.json", [{"messages": messages, "images": ["phone.jpg"]}])
    assert convert(str(source), str(folder / "new/o.json"), str(folder / "images")).left_out == []
    (record,) = load_records(str(folder / "new/o.json")).records
    assert record.images[0].endswith(".jpg")
