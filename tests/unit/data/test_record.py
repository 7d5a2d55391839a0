from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dianjing.data.record import Place, Record, Turn, load_records, parse_record, place_marker
from dianjing.errors import DataError

PLACE = Place("data.json", 17, 0)


def human(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def parse(*messages: Any, **fields: Any) -> tuple[Record, dict[str, int]]:
    record, noticed = parse_record({"id": "a", **fields, "conversations": list(messages)}, PLACE)
    return record, dict(noticed)


def turns(*messages: Any, **fields: Any) -> list[tuple[str, str]]:
    return [(turn.question, turn.answer) for turn in parse(*messages, **fields)[0].turns]


def test_a_plain_record() -> None:
    record, noticed = parse(human("<image>\nWhat?"), gpt("A bus."), image="a.png", extra=1)
    assert record == Record(
        id="a",
        images=("a.png",),
        turns=(Turn(question="<image>\nWhat?", answer="A bus."),),
        types=(),
        source="data.json",
        index=17,
    )
    assert noticed == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is this?\n<image>", "<image>\nWhat is this?"),
        ("Look at <image> and tell", "<image>\nLook at  and tell"),
        ("<image>What?", "<image>\nWhat?"),
        ("  <image>  \n What? \n", "<image>\nWhat?"),
        ("<image>", "<image>"),
        ("\n<image>\n", "<image>"),
        (" no picture \n", " no picture \n"),
        ("", ""),
        (" Is <image> like\n<image>? ", "Is <image> like\n<image>?"),
    ],
)
def test_where_the_picture_stands(text: str, expected: str) -> None:
    assert place_marker(text) == expected
    assert place_marker(expected) == expected


def test_messages_become_turns() -> None:
    both = human("One. "), human(" <image> Two. "), gpt(" First <image> "), human("Three"), gpt("Second")
    assert turns(*both, image="a.png") == [("One. <image>\nTwo.", " First <image> "), ("Three", "Second")]


def test_what_is_dropped_or_odd_is_noticed() -> None:
    record, noticed = parse(gpt("Hi"), gpt("Ho"), human("Q"), gpt("A"), gpt("B"), human("left"), human("over"))
    assert record.turns == (Turn(question="Q", answer="A"), Turn(question="", answer="B"))
    assert noticed == {
        "answers before the first question dropped": 2,
        "answers after an answer, to an empty question": 1,
        "unanswered last questions dropped": 1,
    }


def test_conversation_is_read_with_a_notice() -> None:
    record, noticed = parse_record({"conversation": [human("Q"), gpt("A")]}, PLACE)
    assert record.turns == (Turn(question="Q", answer="A"),)
    assert dict(noticed) == {'records with "conversation" for "conversations"': 1}


@pytest.mark.parametrize(("fields", "expected"), [({"id": 7}, "7"), ({"id": "x"}, "x"), ({"id": None}, "17")])
def test_id(fields: dict[str, Any], expected: str) -> None:
    assert parse(human("Q"), gpt("A"), **fields)[0].id == expected


@pytest.mark.parametrize("images", [{}, {"image": None}, {"image": []}])
def test_text_only(images: dict[str, Any]) -> None:
    assert parse(human("Q"), gpt("A"), **images)[0].images == ()


def test_several_images() -> None:
    record, _ = parse(human("<image> and <image>?"), gpt("A"), human("<image>?"), gpt("B"), image=["a", "b", "c"])
    assert record.images == ("a", "b", "c")
    assert [turn.question for turn in record.turns] == ["<image> and <image>?", "<image>\n?"]


@pytest.mark.parametrize(
    ("fields", "types", "noticed"),
    [
        ({"type": "x"}, ("x", "x"), 0),
        ({"type": ["x", "y"]}, ("x", "y"), 0),
        ({"type": ["x", "y"], "types": ["x", "y"]}, ("x", "y"), 0),
        ({"type": "x", "answer_type": "word"}, ("x", "x"), 0),
        ({"type": "", "types": None}, (), 0),
        ({"type": "z", "types": ["x", "y"]}, ("x", "y"), 1),
        ({"type": ["x"]}, (), 1),
        ({"type": 3}, (), 1),
        ({"type": ["x", 3]}, (), 1),
        ({"question_type": "x"}, (), 1),
        ({"Type": "x"}, (), 1),
        ({"category": "conv"}, (), 1),
        ({"prototype": "x"}, (), 0),
    ],
)
def test_a_type_is_read_or_noticed(fields: dict[str, Any], types: tuple[str, ...], noticed: int) -> None:
    record, notices = parse(human("Q"), gpt("A"), human("Q"), gpt("A"), **fields)
    assert record.types == types
    assert sum(count for notice, count in notices.items() if "question types" in notice) == noticed


def test_types() -> None:
    assert parse(human("Q"), gpt("A"), human("Q"), gpt("A"), types=["x", "y"])[0].types == ("x", "y")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"conversations": [human("<image> <image>"), gpt("A")], "image": "a"}, "2 <image> markers but 1 image; add the"),
    ({"conversations": [human("<image>"), gpt("A")]}, "1 <image> marker but 0 images; add the image or remove"),
    ({"conversations": [human("<image>"), gpt("A")], "images": ["a"]}, 'the key is "image", not "images"'),
    ({"conversations": [human("<image>"), gpt("A")], "image": ["a", "b"]}, "1 <image> marker but 2 images; add a"),
    ({"conversations": [human("Q"), gpt("A")], "image": "a"}, "1 image but no <image> marker"),
    ({"conversations": [human("Q"), gpt("A"), human("<image>")], "image": "a"}, "1 image but no <image> marker"),
    ({"conversations": []}, "conversations is empty"),
    ({"conversations": [human("Q")]}, "no human message has an answer"),
    ({"conversations": [gpt("A")]}, "no human message has an answer"),
    ({"conversations": [{"from": "system", "value": "S"}, human("Q"), gpt("A")]}, 'is from "system"; only "human"'),
    ({"conversations": [{"value": "S"}, gpt("A")]}, r'conversations\[0\] has no "from"'),
    ({"conversations": [{"from": ["human"], "value": "S"}, gpt("A")]}, 'has no "from"'),
    ({"conversations": [human("Q"), gpt(" \n")]}, "the answer of turn 0 is empty"),
    ({"conversations": [human(None), gpt("A")]}, r"conversations\[0\]\.value is null; write a string"),
    ({"conversations": [human(["Q"]), gpt("A")]}, r"value is a list"),
    ({"conversations": [human("\ud800"), gpt("A")]}, "half a character"),
    ({"conversations": ["Q", "A"]}, r"conversations\[0\] is a string"),
    ({"conversations": "Q"}, "conversations is a string"),
    ({"conversations": None}, "conversations is null"),
    ({"messages": []}, r'there is no "conversations" among its keys \(id, messages\)'),
    ({"conversations": [human("Q"), gpt("A")], "image": 3}, "image is a number"),
    ({"conversations": [human("Q"), gpt("A")], "image": ""}, "image is an empty string"),
    ({"conversations": [human("Q"), gpt("A")], "image": ["a", None]}, "image is null"),
    ({"conversations": [human("Q"), gpt("A")], "image": {"path": "a"}}, "image is an object"),
    ({"conversations": [human("Q"), gpt("A")], "types": ["x", "y"]}, "types must be a list of 1 strings"),
    ({"conversations": [human("Q"), gpt("A")], "types": "x"}, "types must be a list of 1 strings"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_bad_record_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        parse_record({"id": "000000033471", **fields}, PLACE)
    assert str(error.value).startswith('data.json: record 17 ("000000033471"): ')


@pytest.mark.parametrize(
    ("value", "message"), [([], "a list, not a record"), (None, "null"), (3, "a number"), (True, "true or false")]
)
def test_what_is_no_record(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.json: record 17: {message}"):
        parse_record(value, PLACE)


@pytest.mark.parametrize("value", [1.5, True, ["a"]])
def test_a_strange_id_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r'record 17 \("17"\): id is .*; write a string or a whole number'):
        parse(human("Q"), gpt("A"), id=value)


GOOD = {"conversations": [human("Q"), gpt("A")]}
EMPTY: dict[str, Any] = {"conversations": []}


def write(path: Path, content: str | list[Any]) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_json_and_jsonl_hold_the_same(tmp_path: Path) -> None:
    values = [{"id": "图", **GOOD}, {**GOOD}]
    listed = load_records(write(tmp_path / "a.json", values))
    lines = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    lined = load_records(write(tmp_path / "a.jsonl", f"\ufeff{lines}\n"))
    assert [(record.id, record.turns) for record in lined.records] == [
        (record.id, record.turns) for record in listed.records
    ]
    assert [record.index for record in lined.records] == [0, 1]
    assert lined.records[1].where == f'{tmp_path}/a.jsonl: line 3 ("1")'
    assert listed.records[1].where == f'{tmp_path}/a.json: record 1 ("1")'


def test_files_are_joined_in_order(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{name}.json", [{"id": name, **GOOD}]) for name in "ba"]
    assert [record.id for record in load_records(names).records] == ["b", "a"]


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [EMPTY if i % 2 else GOOD for i in range(60)])
    with pytest.raises(DataError) as error:
        load_records(path)
    lines = str(error.value).split("\n")
    assert lines[0] == "30 records cannot be used:"
    assert [line.split(": ")[1] for line in lines[1:21]] == [f'record {i} ("{i}")' for i in range(1, 41, 2)]
    assert lines[21:] == ["  and 10 more", 'Put them right, or leave them out with data.on_bad_record = "skip".']


def test_bad_records_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [GOOD, EMPTY, {"conversation": GOOD["conversations"]}])
    found = load_records(path, on_bad_record="skip")
    assert [record.index for record in found.records] == [0, 2]
    assert len(found.skipped) == 1
    assert 'record 1 ("1"): conversations is empty' in found.skipped[0]
    assert dict(found.notices) == {'records with "conversation" for "conversations"': 1}


def test_a_bad_line_is_one_bad_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f"{json.dumps(GOOD)}\n{{'id': 1}}\n{json.dumps(GOOD)}\n")
    found = load_records(path, on_bad_record="skip")
    assert len(found.records) == 2
    assert found.skipped[0].startswith(f"{path}: not JSON at line 2, column 2: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"id": 1},\n {"id" 2}]', "not JSON at line 2, column 8: Expecting ':'"),
        ("a.json", "", "not JSON at line 1, column 1"),
        ("a.json", "[" * 100_000, "not JSON that can be read"),
        ("a.json", '{"conversations": []}', "it holds an object, not a list"),
        ("a.json", "[]", "no record in it"),
        ("a.jsonl", "\n\n", "no record in it"),
        ("a.parquet", "", r"must end in \.json \(a list\) or \.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_records(write(tmp_path / name, content), on_bad_record="skip")
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_file_and_a_file_of_bytes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        load_records(str(tmp_path / "none.json"))
    (tmp_path / "a.json").write_bytes(b"\xff\xfe[\0]\0")
    with pytest.raises(
        DataError, match=r"the file is UTF-16, not UTF-8; `dianjing check .*/a.json --fix OUT.json` writes it in UTF-8"
    ):
        load_records(str(tmp_path / "a.json"))
