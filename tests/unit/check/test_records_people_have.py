"""Records as other programs write them: the finding, if --fix is promised, and the record that it makes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dianjing.check.check import Result, Settings, check
from dianjing.check.fix import fix
from dianjing.data.record import load_records
from tests.tiny import write_images

ONE, TWO = "wide.png", "tall.jpg"


def said(question: Any, answer: Any = "A bus.", **more: Any) -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer, **more}]


@dataclass(kw_only=True)
class Case:
    """A record, what is found, and what --fix makes of it: its pictures and first question."""

    record: dict[str, Any]
    codes: str
    words: str = ""
    fixed: tuple[Any, str] | None = None


def marks(*spellings: str) -> dict[str, Case]:
    return {
        f"mark {mark}": Case(
            record={"image": ONE, "conversations": said(f"{mark}What?")},
            codes="marker_foreign",
            fixed=(ONE, "<image>What?"),
        )
        for mark in spellings
    }


CASES: dict[str, Case] = {
    "video": Case(
        record={"video": "a.mp4", "conversations": said("<video>\nWhat?")}, codes="media_other", words="frames"
    ),
    "video mark alone": Case(
        record={"conversations": said("<video>\nWhat?")}, codes="media_other", words="another medium (<video>)"
    ),
    "audio": Case(record={"audios": ["a.wav"], "conversations": said("<audio>What?")}, codes="media_other"),
    "Qwen-VL": Case(
        record={
            "conversations": [
                {"from": "user", "value": f"Picture 1: <img>{ONE}</img>\nWhat?"},
                {"from": "assistant", "value": "A bus."},
            ]
        },
        codes="picture_in_text role_alias",
        fixed=(ONE, "<image>\nWhat?"),
    ),
    **marks("<Image>", "<IMAGE>", "< image >", "<img>", "<image_placeholder>", "<|image|>", "<ImageHere>", "＜image＞"),
    **marks("[IMG]", "<|image_1|>", "<image_0>", "<|vision_start|><|image_pad|><|vision_end|>"),
    **marks("<start_of_image>", "<image_soft_token>", "<|image_pad|>", "<图片>"),
    "MMMU": Case(
        record={"image": [ONE, TWO], "conversations": said("<image 1> and <image 2>: which?")},
        codes="marker_foreign",
        fixed=([ONE, TWO], "<image> and <image>: which?"),
    ),
    "numbered the other way": Case(
        record={"image": [ONE, TWO], "conversations": said("<image 2> and <image 1>: which?")},
        codes="marker_foreign",
        fixed=([TWO, ONE], "<image> and <image>: which?"),
    ),
    "two pictures, no marker": Case(
        record={"image": [ONE, TWO], "conversations": said("Which?")}, codes="marker_missing"
    ),
    "markers in the answer": Case(
        record={"image": [ONE, TWO], "conversations": said("Draw.", "<image><image>")},
        codes="marker_missing",
        words="in one from gpt",
    ),
    "roles swapped": Case(
        record={"image": ONE, "conversations": [*reversed(said("A bus.", "<image>\nWhat?"))]},
        codes="no_answer",
        words="exchange human and gpt",
    ),
    "system column": Case(
        record={"image": ONE, "system": "Be brief.", "conversations": said("<image>\nWhat?")}, codes="system_dropped"
    ),
    "system message": Case(
        record={"conversations": [{"from": "system", "value": "Be brief."}, *said("What?")]},
        codes="role_unknown",
        fixed=(None, "What?"),
    ),
    "MiniCPM's table": Case(
        record={
            "image": {"<image_00>": ONE, "<image_01>": TWO},
            "conversations": [
                {"role": "user", "content": "<image_00> or <image_01>?"},
                {"role": "assistant", "content": "One."},
            ],
        },
        codes="image_table marker_foreign role_alias role_content",
        fixed=([ONE, TWO], "<image> or <image>?"),
    ),
    "one letter off": Case(
        record={"conversatons": said("What?")}, codes="conversations_missing", words='is "conversatons" meant?'
    ),
    "query and response": Case(
        record={"query": "<image>What?", "response": "A bus.", "images": [ONE]},
        codes="conversations_missing images_key",
        words="--convert",
    ),
    "XTuner's text form": Case(
        record={"conversation": [{"system": "", "input": "What?", "output": "A bus."}]},
        codes="conversation_key role_unknown",
        words="a whole turn (system, input, output)",
    ),
    "id of pandas": Case(
        record={"id": 12.0, "conversations": said("What?")}, codes="id_not_string", fixed=(None, "What?")
    ),
    "image empty": Case(
        record={"image": "", "conversations": said("What?")}, codes="image_empty", fixed=(None, "What?")
    ),
    "image empty but asked about": Case(
        record={"image": "", "conversations": said("<image>\nWhat?")}, codes="image_empty marker_count"
    ),
    "loss false": Case(record={"conversations": said("What?", loss=False)}, codes="nothing_learned"),
    "weight of a half": Case(record={"conversations": said("What?", weight=0.5)}, codes="turn_weight"),
    "path in the text": Case(
        record={"conversations": said(f"{ONE}\nWhat?")}, codes="picture_named", words=f"names {ONE}"
    ),
    "Markdown picture": Case(record={"conversations": said(f"![a bus]({ONE})\nWhat?")}, codes="picture_named"),
    "mark without a picture": Case(record={"conversations": said("<|image_1|>\nWhat?")}, codes="marker_as_text"),
    "MiniCPM's mark": Case(
        record={"image": ONE, "conversations": said("(<image>./</image>)\nWhat?")}, codes="marker_as_text"
    ),
    "line ends as two characters": Case(record={"conversations": said("What?", "Red.\\nBlue.")}, codes="text_escapes"),
    "entities": Case(record={"conversations": said("What?", "A &lt; B")}, codes="text_html"),
    "tags": Case(record={"conversations": said("What?", "Red<br>Blue")}, codes="text_html"),
    "thought": Case(record={"conversations": said("What?", "<think>Hm.</think>\nRed.")}, codes="text_thought"),
    "zero width": Case(record={"conversations": said("What?", "Re\u200bd.")}, codes="text_control"),
    "path of Windows": Case(
        record={"image": "D:\\data\\sub\\small.png", "conversations": said("<image>\nWhat?")},
        codes="picture_missing",
        words='was "sub/small.png" meant?',
    ),
    "path of another machine": Case(
        record={"image": f"/mnt/data/images/{ONE}", "conversations": said("<image>\nWhat?")},
        codes="path_absolute",
        words=f'was "{ONE}" meant?',
    ),
    "data URI": Case(
        record={"image": "data:image/png;base64,AAAA", "conversations": said("<image>\nWhat?")},
        codes="path_url",
        words="--convert OUT.json` stores it as a file",
    ),
    "name in another normal form": Case(
        record={"image": "cafe\u0301.png", "conversations": said("<image>\nWhat?")},
        codes="picture_missing",
        words="the same name in another Unicode form",
    ),
    "name unpacked in another code page": Case(
        record={"image": "图.png", "conversations": said("<image>\nWhat?")},
        codes="picture_missing",
        words="unpacked from a ZIP in the wrong code page, cp437",
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of pictures, some with names that a ZIP or another system changed."""
    folder = tmp_path_factory.mktemp("people")
    write_images(folder)
    picture = (folder / ONE).read_bytes()
    for name in ("caf\u00e9.png", "图.png".encode().decode("cp437")):
        (folder / name).write_bytes(picture)
    return folder


def checked(path: Path, images: Path) -> Result:
    return check(Settings(paths=(str(path),), images=str(images), workers=1), lambda *_: None)


@pytest.mark.parametrize("name", CASES)
def test_a_record_as_people_have_it(name: str, images: Path, tmp_path: Path) -> None:
    case = CASES[name]
    path, out = tmp_path / "data.json", tmp_path / "fixed.json"
    path.write_text(json.dumps([{"id": "a", **case.record}]), encoding="utf-8")
    result = checked(path, images)
    found = [one for code in result.findings.codes() for one in result.findings.of(code)]
    assert " ".join(sorted({one.code for one in found})) == case.codes
    assert case.words in " ".join(one.text for one in found)
    assert {one.fixed for one in found} == {case.fixed is not None}
    if case.fixed:
        fix(str(path), str(out), result.names)
        (value,) = json.loads(out.read_text("utf-8"))
        assert (value.get("image"), value["conversations"][0]["value"]) == case.fixed
        assert dict(checked(out, images).findings.counts) == {}


def test_fix_is_counted_where_it_does_not_mend_all(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    records = [
        {"id": "a", "image": ONE, "conversations": said("What?")},
        {"id": "b", "image": [ONE, TWO], "conversations": said("Which?")},
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    findings = checked(path, images).findings
    assert findings.fixes("marker_missing") == "--fix does for 1 of 2"


@pytest.mark.parametrize("unlearned", [{"loss": False}, {"loss": 0}, {"weight": 0}, {"weight": 0.0}])
def test_an_answer_that_is_only_shown(unlearned: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"conversations": [*said("What?", **unlearned), *said("And?", loss=True)]}]))
    (record,) = load_records(str(path)).records
    assert [turn.learned for turn in record.turns] == [False, True]
