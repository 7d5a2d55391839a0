"""Records one at a time, and the reviewed set: what is in the file is what is shown, and what is kept is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dianjing.data.record import load_records
from dianjing.errors import DataError
from dianjing.studio.export import export, reviewed_path
from dianjing.studio.records import RecordFile, images_of, messages_of, with_messages
from dianjing.studio.review import Review
from tests.tiny import TinyDataset, tiny_records

NEW = [{"from": "human", "value": "<image>\nNew?"}, {"from": "gpt", "value": "新"}]


def review_of(records: RecordFile, folder: Path) -> Review:
    return Review(folder / "data.review.jsonl", records.sha256, len(records))


def test_each_record_is_read_as_it_stands(tiny_dataset: TinyDataset) -> None:
    records = RecordFile(str(tiny_dataset.path))
    assert [raw.fields for raw in records] == tiny_records()
    assert not records.changed()
    records.close()


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"id": "a"}\n\n[]\n{"id": "b"\n{"id": "c"}', encoding="utf-8")
    records = RecordFile(str(path))
    found = [(raw.fields, raw.problem[:8]) for raw in records]
    assert found == [({"id": "a"}, ""), (None, "not a JS"), (None, "not JSON"), ({"id": "c"}, "")]
    assert records[2].text == '{"id": "b"'
    records.close()


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": "a"}\n')
    records = RecordFile(str(path))
    path.write_text('{"id": "abc"}\n')
    assert records.changed()
    path.unlink()
    assert records.changed()
    records.close()


@pytest.mark.parametrize(
    ("name", "content"), [("d.json", "[]"), ("d.jsonl", ""), ("d.txt", "[{}]"), ("none.json", None)]
)
def test_a_file_without_records_is_refused(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError):
        RecordFile(str(tmp_path / name))


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "a"}]}, [{"from": "human", "value": "a"}]),
        ({"messages": [{"role": "user", "content": "a"}]}, [{"from": "user", "value": "a"}]),
        ({"conversations": [{"from": "human"}]}, None),
        ({"conversations": "a"}, None),
        ({}, None),
    ],
)
def test_messages_are_found_or_not(fields: dict[str, Any], messages: Any) -> None:
    assert messages_of(fields) == messages


def test_only_names_are_pictures() -> None:
    assert images_of({"image": "a.png"}) == ["a.png"]
    assert images_of({"image": ["a.png", 3, "", None, "b.png"]}) == ["a.png", "b.png"]
    assert images_of({}) == images_of({"image": {"a": 1}}) == []
    assert len(images_of({"image": ["a.png"] * 1000})) == 16


def test_an_edit_replaces_the_conversation_and_nothing_else() -> None:
    fields = {"id": "a", "image": "a.png", "extra": {"x": 1}, "conversation": NEW, "types": ["colour"]}
    edited = [NEW[0], {"from": "gpt", "value": "other"}]
    assert with_messages(fields, edited) == {
        **{name: fields[name] for name in ("id", "image", "extra", "types")},
        "conversations": edited,
    }
    assert "types" not in with_messages(fields, edited * 2)


def test_the_reviewed_set_is_what_was_kept(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    source = tmp_path / "data.json"
    source.write_bytes(tiny_dataset.path.read_bytes())
    records = RecordFile(str(source))
    review = review_of(records, tmp_path)
    review.change(0, 0, "edit", NEW)
    review.change(1, 0, "reject")
    review.change(2, 0, "accept")
    out = reviewed_path(source)
    counts = export(records, review, out)
    expected = tiny_records()
    expected[0] = {**expected[0], "conversations": NEW}
    del expected[1]
    assert json.loads(out.read_text("utf-8")) == expected
    assert source.read_bytes() == tiny_dataset.path.read_bytes()
    assert counts == dict(
        written=len(expected),
        accepted=2,
        edited=1,
        undecided=len(expected) - 2,
        rejected=1,
        unreadable=0,
        with_errors=0,
    )
    assert len(load_records(str(out)).records) == len(expected)
    # Its own file is replaced; one that somebody changed is not.
    review.change(1, 1, "undo")
    assert export(records, review, out)["written"] == len(expected) + 1
    out.write_text("[]")
    with pytest.raises(DataError, match="move it away"):
        export(records, review, out)
    assert out.read_text() == "[]"
    review.close()
    records.close()


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text('{"id": "a"}\n{broken\n[1]\n')
    records = RecordFile(str(source))
    review = review_of(records, tmp_path)
    counts = export(records, review, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [{"id": "a"}]
    assert (counts["unreadable"], counts["with_errors"], counts["written"]) == (2, 1, 1)
    for index in range(3):
        review.change(index, 0, "reject")
    assert export(records, review, tmp_path / "out.json")["written"] == 0
    assert json.loads((tmp_path / "out.json").read_text()) == []
    review.close()
    records.close()


def test_the_reviewed_set_does_not_go_where_a_link_leads(tmp_path: Path) -> None:
    source, precious = tmp_path / "data.jsonl", tmp_path / "precious"
    source.write_text('{"id": "a"}\n')
    precious.write_text("mine")
    (tmp_path / ".out.json.tmp").symlink_to(precious)
    records = RecordFile(str(source))
    review = review_of(records, tmp_path)
    assert export(records, review, tmp_path / "out.json")["written"] == 1
    assert precious.read_text() == "mine"
    review.close()
    records.close()
