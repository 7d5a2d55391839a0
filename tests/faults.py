"""A clean data set of the tiny world, and every kind of fault to plant in it, each in a record of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Fields = dict[str, Any]
MANY = 12
"""Records that a fault of many takes for itself."""


@dataclass
class DataSet:
    """Records and pictures that a fault may change before they are written."""

    folder: Path
    records: list[Fields]
    free: Iterator[int]
    """Numbers of records that no other fault has touched."""
    edits: list[Callable[[str], str]] = field(default_factory=list)
    """Changes of the JSON text."""
    bom: bytes = b""

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def path(self) -> Path:
        return self.folder / "data.json"

    def one(self) -> Fields:
        """Return a record that is still as it was."""
        return self.records[next(self.free)]

    def one_in_english(self) -> Fields:
        """Return the next one whose first question is in English."""
        return next(one for one in iter(self.one, None) if questions(one)[0]["value"].isascii())

    def picture(self, record: Fields) -> Path:
        return self.images / record["image"]

    def write(self) -> None:
        text = json.dumps(self.records, ensure_ascii=False, indent=1)
        for edit in self.edits:
            text = edit(text)
        self.path.write_bytes(self.bom + text.encode("utf-8", "surrogatepass"))


def copy_of(clean: Path, folder: Path) -> DataSet:
    """Return an own copy of the clean set."""
    shutil.copytree(clean, folder, dirs_exist_ok=True)
    records = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return DataSet(folder, records, iter(range(3, len(records))))


Plant = Callable[[DataSet], None]
FAULTS: dict[str, Plant] = {}
"""Code -> what plants it."""


def fault(plant: Plant) -> Plant:
    FAULTS[plant.__name__] = plant
    return plant


def questions(record: Fields) -> list[Fields]:
    return [one for one in record["conversations"] if one["from"] == "human"]


def answers(record: Fields) -> list[Fields]:
    return [one for one in record["conversations"] if one["from"] == "gpt"]


def two_turns(record: Fields) -> Fields:
    """Cut a record to its first two turns, so that what is said of one is said of it."""
    record["conversations"] = record["conversations"][:4]
    record["types"] = record["types"][:2]
    return record


@fault
def bom(data: DataSet) -> None:
    data.bom = b"\xef\xbb\xbf"


@fault
def json_comment(data: DataSet) -> None:
    name = data.one()["id"]
    data.edits.append(lambda text: text.replace(f'"id": "{name}",', f'"id": "{name}", // the first one'))


@fault
def json_trailing_comma(data: DataSet) -> None:
    data.edits.append(lambda text: text.rstrip().removesuffix("]") + ",\n]\n")


@fault
def json_syntax(data: DataSet) -> None:
    name = data.one()["id"]
    data.edits.append(lambda text: text.replace(f'"id": "{name}",', f'"id" "{name}",'))


@fault
def encoding(data: DataSet) -> None:
    data.one()["id"] = "lost \udcff byte"


@fault
def not_a_record(data: DataSet) -> None:
    data.records[next(data.free)] = "no record"  # type: ignore[call-overload]


@fault
def id_missing(data: DataSet) -> None:
    del data.one()["id"]


@fault
def id_not_string(data: DataSet) -> None:
    data.one()["id"] = 4711


@fault
def id_type(data: DataSet) -> None:
    data.one()["id"] = ["x"]


@fault
def id_duplicate(data: DataSet) -> None:
    data.one()["id"] = data.one()["id"]


@fault
def image_type(data: DataSet) -> None:
    data.one()["image"] = 7


@fault
def images_key(data: DataSet) -> None:
    record = data.one()
    record["images"] = [record.pop("image")]


@fault
def conversation_key(data: DataSet) -> None:
    record = data.one()
    record["conversation"] = record.pop("conversations")


@fault
def messages_key(data: DataSet) -> None:
    record = data.one()
    record["messages"] = record.pop("conversations")


@fault
def conversations_missing(data: DataSet) -> None:
    del data.one()["conversations"]


@fault
def conversations_type(data: DataSet) -> None:
    data.one()["conversations"] = "What is it? A bus."


@fault
def conversations_empty(data: DataSet) -> None:
    data.one()["conversations"] = []


@fault
def message_type(data: DataSet) -> None:
    data.one()["conversations"][2] = "What is it?"


@fault
def role_content(data: DataSet) -> None:
    record = data.one()
    record["conversations"] = [{"role": one["from"], "content": one["value"]} for one in record["conversations"]]


@fault
def role_alias(data: DataSet) -> None:
    for message in data.one()["conversations"]:
        message["from"] = {"human": "user", "gpt": "assistant"}[message["from"]]


@fault
def role_unknown(data: DataSet) -> None:
    data.one()["conversations"].insert(0, {"from": "system", "value": "Be kind."})


@fault
def value_type(data: DataSet) -> None:
    data.one()["conversations"][1]["value"] = ["red"]


@fault
def text_surrogate(data: DataSet) -> None:
    record = data.one()
    answers(record)[0]["value"] = "@HALF@"
    data.edits.append(lambda text: text.replace("@HALF@", "\\ud83d"))


@fault
def text_broken(data: DataSet) -> None:
    answers(data.one())[0]["value"] += " caf\ufffd"


@fault
def text_repeats(data: DataSet) -> None:
    answers(two_turns(data.one_in_english()))[0]["value"] = "It is a dog and " * 30


@fault
def no_answer(data: DataSet) -> None:
    record = data.one()
    record["conversations"] = record["conversations"][:1]


@fault
def answer_empty(data: DataSet) -> None:
    answers(data.one())[0]["value"] = " \n"


@fault
def answer_first(data: DataSet) -> None:
    data.one()["conversations"].insert(0, {"from": "gpt", "value": "Hello!"})


@fault
def answer_twice(data: DataSet) -> None:
    record = data.one()
    record["conversations"].append({"from": "gpt", "value": "And so on."})
    record["types"].append("more")


@fault
def question_unanswered(data: DataSet) -> None:
    data.one()["conversations"].append({"from": "human", "value": "And then?"})


@fault
def answer_echo(data: DataSet) -> None:
    record = data.one()
    answers(record)[-1]["value"] = "How many things are in this picture?"
    questions(record)[-1]["value"] = "how many things are in this picture"


@fault
def answer_refusal(data: DataSet) -> None:
    answers(data.one_in_english())[0]["value"] = "I'm sorry, but I can't help with that."


@fault
def marker_missing(data: DataSet) -> None:
    message = questions(data.one())[0]
    message["value"] = message["value"].replace("<image>\n", "")


@fault
def marker_count(data: DataSet) -> None:
    questions(data.one())[0]["value"] += " <image>"


@fault
def marker_in_answer(data: DataSet) -> None:
    answers(data.one())[0]["value"] += " <image>"


@fault
def type_unread(data: DataSet) -> None:
    data.one()["type"] = 3


@fault
def types_count(data: DataSet) -> None:
    data.one()["types"] = ["colour"]


@fault
def special_string(data: DataSet) -> None:
    answers(data.one())[0]["value"] += "<|im_end|>"


@fault
def record_duplicate(data: DataSet) -> None:
    first, second = data.one(), data.one()
    second.update({**first, "id": second["id"]})


@fault
def record_near_duplicate(data: DataSet) -> None:
    first, second = data.one(), data.one()
    second.update(json.loads(json.dumps({**first, "id": second["id"]})))
    answers(second)[0]["value"] += " !"


@fault
def answer_everywhere(data: DataSet) -> None:
    for _ in range(MANY):
        answers(data.one_in_english())[0]["value"] = "This is a very nice picture with many things to see in it."


@fault
def yes_no_skew(data: DataSet) -> None:
    record = data.one()
    for number in range(200):
        turn = [{"from": "human", "value": f"Is it {number}?"}, {"from": "gpt", "value": "Yes."}]
        record["conversations"] += turn
        record["types"].append("yes or no")


@fault
def language_switch(data: DataSet) -> None:
    record = two_turns(data.one())
    questions(record)[1]["value"] = "What can be seen on the left side?"
    answers(record)[1]["value"] = "左边有一个红色的圆和一个绿色的方块。"


@fault
def leak_record(data: DataSet) -> None:
    record = data.one()
    del record["image"], record["types"]
    record["conversations"] = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "An owl."}]
    path = data.folder / "held_out.json"
    held_out = [*json.loads(path.read_text(encoding="utf-8")), {**record, "id": "held"}]
    path.write_text(json.dumps(held_out), encoding="utf-8")


@fault
def truncated(data: DataSet) -> None:
    answers(data.one_in_english())[-1]["value"] = " ".join(f"number {number} is here" for number in range(1800))


@fault
def cut_too_deep(data: DataSet) -> None:
    questions(data.one())[0]["value"] += " ".join(f"number {number} is here" for number in range(1800))


def everything_under(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, to see that nothing of it was touched."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if os.path.isfile(path)}
