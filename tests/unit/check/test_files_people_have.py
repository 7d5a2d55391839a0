"""Data files as other programs write them: what check says, and what --fix and --convert make of them."""

from __future__ import annotations

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dianjing.check.check import Settings, check
from dianjing.check.convert import convert
from dianjing.check.fix import fix
from dianjing.data.record import load_records
from dianjing.errors import DataError
from tests.tiny import write_images

SAID = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
ONE: dict[str, Any] = {"id": "a", "image": "wide.png", "conversations": SAID}
CHINESE = [{"from": "human", "value": "图片上是什么颜色的车？"}, {"from": "gpt", "value": "是红色的公共汽车。"}]
GBK = json.dumps([{"id": "a", "conversations": CHINESE}], ensure_ascii=False).encode("gb18030")
TWO: dict[str, Any] = {"id": "b", "conversations": [{**SAID[0], "value": "Who?"}, {**SAID[1], "value": "I."}]}
LINES = b"".join(json.dumps(one).encode() + b"\n" for one in (ONE, TWO))
LISTED = json.dumps([ONE, TWO], indent=1).encode()

FILES: dict[str, tuple[str, bytes, str, bool, str]] = {
    "empty.json": ("data.json", b"", "file_empty", False, "no record"),
    "empty.jsonl": ("data.jsonl", b"", "file_empty", False, "no record"),
    "wrapped": ("data.json", json.dumps({"v": 1, "data": [ONE]}).encode(), "json_wrapped", True, 'under "data"'),
    "list in lines": ("data.jsonl", LISTED, "json_list_in_lines", True, "name it .json"),
    "lines in a list file": ("data.json", LINES, "json_not_a_list", True, "does not begin with ["),
    "one record": ("data.json", json.dumps(ONE).encode(), "json_not_a_list", True, ""),
    "COCO": (
        "data.json",
        b'{"images": [{"id": 1}], "annotations": [{"id": 1}]}',
        "json_layout",
        False,
        "images, annota",
    ),
    "GBK": ("data.json", GBK, "encoding_known", True, "GB18030 (GBK)"),
    "UTF-16": ("data.json", LISTED.decode().encode("utf-16"), "encoding_known", True, "UTF-16"),
    "Latin-1": ("data.json", b'[{"id": "caf\xe9"}]', "encoding", False, "is not UTF-8"),
    "web page": ("data.json", b"<!DOCTYPE html><html></html>", "not_json", False, "a web page"),
    "gzip": ("data.json", gzip.compress(LISTED), "not_json", False, "compressed with gzip"),
    "zip": ("data.json", b"PK\3\4xx", "not_json", False, "a ZIP archive"),
    "git-lfs pointer": (
        "data.json",
        b"version https://git-lfs.github.com/\n",
        "not_json",
        False,
        "git lfs pull",
    ),
    "failed download": ("data.json", b"Entry not found", "not_json", False, "failed download"),
    "parquet": ("data.json", b"PAR1xxxx", "not_json", False, "parquet; `dianjing check"),
    "pickle": ("data.json", b"\x80\x04\x95", "not_json", False, "never read"),
    "zeros": ("data.json", bytes(64), "not_json", False, "zero bytes"),
    "cut short": ("data.json", LISTED[:-30], "json_unread", False, "does not end"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_as_people_have_it(case: str, tmp_path: Path) -> None:
    name, content, code, fixed, words = FILES[case]
    write_images(tmp_path)
    path, out = tmp_path / name, tmp_path / "fixed.json"
    path.write_bytes(content)
    result = check(Settings(paths=(str(path),), workers=1), lambda *_: None)
    found = result.findings.of(code)
    assert found, dict(result.findings.counts)
    assert words in found[0].text
    assert {one.fixed for one in found} == {fixed}
    with pytest.raises(DataError, match=r"data\.json"):
        load_records(str(path))
    if fixed:
        fix(str(path), str(out), {})
        again = check(Settings(paths=(str(out),), workers=1), lambda *_: None)
        assert (dict(again.findings.counts), again.records) == (
            {},
            1 if case in ("wrapped", "GBK", "one record") else 2,
        )
    elif code in ("not_json", "json_unread", "json_layout"):
        with pytest.raises(DataError, match="correct this by hand"):
            fix(str(path), str(out), {})
    assert not list(tmp_path.glob("*.writing"))


def as_csv(delimiter: str) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, delimiter=delimiter)
    table.writerows([["image", "question", "answer"], ["wide.png", "What, now?", "A bus."]])
    return text.getvalue().encode()


def as_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def as_json(*rows: Any) -> bytes:
    return json.dumps(list(rows)).encode()


WHAT, DESCRIBE = "<image>\nWhat?", "<image>\nDescribe the picture."
QA: dict[str, Any] = {"question": "What?", "answer": "A bus."}
TURNS: dict[str, tuple[str, bytes, str]] = {
    "gz": ("d.jsonl.gz", gzip.compress(LINES), WHAT),
    "bz2": ("d.json.bz2", bz2.compress(LISTED), WHAT),
    "xz": ("d.json.xz", lzma.compress(LISTED), WHAT),
    "csv": ("d.csv", as_csv(","), "<image>\nWhat, now?"),
    "tsv": ("d.tsv", as_csv("\t"), "<image>\nWhat, now?"),
    "question and answer": ("d.json", as_json({"image_name": "wide.png", **QA}), WHAT),
    "several answers": (
        "d.json",
        as_json({"image": "wide.png", "question": "What?", "answers": ["Red.", "A bus.", "A bus."]}),
        WHAT,
    ),
    "VQA": (
        "d.json",
        as_json({"image": "wide.png", "question": "What?", "multiple_choice_answer": "A bus."}),
        WHAT,
    ),
    "query and response": (
        "d.jsonl",
        json.dumps({"query": "<image>What?", "response": "A bus.", "images": ["wide.png"]}).encode(),
        WHAT,
    ),
    "alpaca": ("d.json", as_json({"instruction": "What?", "input": "", "output": "A bus.", "image": "wide.png"}), WHAT),
    "caption": ("d.json", as_json({"image": "wide.png", "caption": "A bus."}), DESCRIBE),
    "text form of XTuner": (
        "d.json",
        as_json({"image": "wide.png", "conversation": [{"system": "S", "input": "What?", "output": "A bus."}]}),
        WHAT,
    ),
    "MiniCPM": (
        "d.json",
        as_json(
            {
                "image": {"<image_00>": "wide.png"},
                "conversations": [
                    {"role": "user", "content": "<image_00>\nWhat?"},
                    {"role": "assistant", "content": "A bus."},
                ],
            }
        ),
        WHAT,
    ),
    "Qwen-VL": (
        "d.json",
        as_json(
            {
                "conversations": [
                    {"from": "user", "value": "Picture 1: <img>wide.png</img>\nWhat?"},
                    {"from": "assistant", "value": "A bus."},
                ]
            }
        ),
        WHAT,
    ),
    "COCO captions": (
        "d.json",
        json.dumps(
            {
                "info": {},
                "images": [{"id": 7, "file_name": "wide.png"}],
                "annotations": [{"id": 1, "image_id": 7, "caption": "A bus."}],
            }
        ).encode(),
        DESCRIBE,
    ),
    "wrapped": ("d.json", json.dumps({"n": 1, "data": [{"image": "wide.png", **QA}]}).encode(), WHAT),
    "conversations as text": ("d.json", as_json({"images": ["wide.png"], "conversations": json.dumps(SAID)}), WHAT),
    "image folder": ("metadata.jsonl", b'{"file_name": "wide.png", "text": "A bus."}', DESCRIBE),
}


@pytest.mark.parametrize("case", TURNS)
def test_a_layout_that_is_converted(case: str, tmp_path: Path) -> None:
    name, content, question = TURNS[case]
    write_images(tmp_path)
    (tmp_path / name).write_bytes(content)
    converted = convert(str(tmp_path / name), str(tmp_path / "out.json"), "")
    assert converted.left_out == []
    record = load_records(str(tmp_path / "out.json")).records[0]
    assert (record.turns[0].question, record.turns[0].answer) == (question, "A bus.")
    assert (tmp_path / record.images[0]).read_bytes() == (tmp_path / "wide.png").read_bytes()


def test_a_webdataset_shard(tmp_path: Path) -> None:
    write_images(tmp_path)
    picture = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "d.tar").write_bytes(as_tar({"x/0.txt": b"A bus.", "x/0.png": picture, "x/1.png": picture}))
    converted = convert(str(tmp_path / "d.tar"), str(tmp_path / "out.json"), "")
    assert (converted.layout, converted.records) == ("pictures with caption", 1)
    assert "neither messages nor a caption" in converted.left_out[0]
    (record,) = load_records(str(tmp_path / "out.json")).records
    assert (record.id, record.turns[0].question, record.turns[0].answer) == ("0", DESCRIBE, "A bus.")
    assert (tmp_path / record.images[0]).read_bytes() == picture


@pytest.mark.parametrize(
    ("suffix", "write"),
    [("arrow", "file"), ("arrow", "stream"), ("parquet", "parquet"), ("parquet.zst", "zstd"), ("folder", "shards")],
)
def test_tables_of_arrow(suffix: str, write: str, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow (the extra `parquet`) is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_images(tmp_path)
    encoded = base64.b64encode((tmp_path / "wide.png").read_bytes()).decode()
    table = arrow.table({"image": [encoded], "question": ["What?"], "answer": ["A bus."]})
    path = tmp_path / f"d.{suffix}"
    if write in ("file", "stream"):
        opener: Callable[..., Any] = arrow.ipc.new_file if write == "file" else arrow.ipc.new_stream
        with opener(str(path), table.schema) as writer:
            writer.write_table(table)
    elif write == "shards":
        path.mkdir()
        for number in range(2):
            parquet.write_table(table, path / f"train-{number}.parquet")
    else:
        parquet.write_table(table, tmp_path / "d.parquet")
    if write == "zstd":
        with arrow.output_stream(str(path), compression="zstd") as stream:
            stream.write((tmp_path / "d.parquet").read_bytes())
    converted = convert(str(path), str(tmp_path / "out.json"), "")
    assert (converted.left_out, converted.records) == ([], 2 if write == "shards" else 1)
    record = load_records(str(tmp_path / "out.json")).records[0]
    assert (record.turns[0].question, record.turns[0].answer) == (WHAT, "A bus.")


def test_every_caption_is_a_record(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "d.json").write_bytes(as_json({"id": "x", "image": "wide.png", "caption": ["A bus.", "A red bus."]}))
    convert(str(tmp_path / "d.json"), str(tmp_path / "out.json"), "")
    records = load_records(str(tmp_path / "out.json")).records
    assert [(one.id, one.turns[0].answer) for one in records] == [("x-0", "A bus."), ("x-1", "A red bus.")]


def test_what_convert_keeps_and_counts(tmp_path: Path) -> None:
    write_images(tmp_path)
    row = {
        "images": ["wide.png"],
        "system": "Be brief.",
        "type": "colour",
        "source": "web",
        "messages": [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "A car.", "loss": False},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "A bus.", "weight": 1},
        ],
    }
    (tmp_path / "d.json").write_bytes(as_json(row))
    converted = convert(str(tmp_path / "d.json"), str(tmp_path / "out.json"), "")
    assert dict(converted.notices) == {
        "system texts left out: LLaVA JSON has none": 1,
        'records whose "source" was left out': 1,
    }
    (record,) = load_records(str(tmp_path / "out.json")).records
    assert [turn.learned for turn in record.turns] == [False, True]
    assert record.types == ("colour", "colour")


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "DPO": ("d.json", as_json({"prompt": "x", "chosen": "a", "rejected": "b"}), "answers to choose from"),
    "Label Studio": ("d.json", as_json({"id": 1, "data": {"image": "a"}, "annotations": []}), "export JSON-MIN"),
    "VIA": ("d.json", b'{"a": {"filename": "a.png", "regions": []}, "b": {"regions": []}}', "drawn with VIA"),
    "COCO boxes": ("d.json", b'{"images": [{"id": 1}], "annotations": [{"bbox": []}]}', "boxes and classes"),
    "no answers": ("d.json", as_json({"question": "What?", "image_id": 3}), "questions without answers"),
    "a picture": ("d.json", b"\x89PNG\r\n\x1a\n", "the file is a picture"),
    "cut gz": ("d.json.gz", gzip.compress(LISTED)[:-20], "cannot be unpacked"),
    "cut parquet": ("d.parquet", b"PAR1abc", "cut short or broken|read with pyarrow"),
    "Excel": ("d.xlsx", b"PK\3\4xxxx", "save the table as CSV"),
    "unknown": ("d.txt", b"hello", "not of a kind that is read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_converted(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert(str(tmp_path / name), str(tmp_path / "out.json"), "")
    assert not list(tmp_path.glob("out*"))


def test_a_folder_of_splits_names_them(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"name one of them: .*/train"):
        convert(str(tmp_path), str(tmp_path / "out.json"), "")


def test_a_folder_without_records(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"a folder without a file of records; is a folder in it meant \(data\)\?"):
        convert(str(tmp_path), str(tmp_path / "out.json"), "")
