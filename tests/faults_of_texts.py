"""Faults of records that other programs wrote: their marks, their media, their texts; imported, they join FAULTS."""

from __future__ import annotations

from tests.faults import DataSet, answers, fault, questions
from tests.faults_of_pictures import FAULTS

__all__ = ["FAULTS"]


@fault
def image_empty(data: DataSet) -> None:
    record = data.one()
    record["image"] = ""
    questions(record)[0]["value"] = questions(record)[0]["value"].replace("<image>\n", "")


@fault
def image_table(data: DataSet) -> None:
    record = data.one()
    record["image"] = {"<image_00>": record["image"]}


@fault
def media_other(data: DataSet) -> None:
    data.one()["video"] = "a.mp4"


@fault
def picture_in_text(data: DataSet) -> None:
    record = data.one()
    asked = questions(record)[0]
    asked["value"] = asked["value"].replace("<image>", f"Picture 1: <img>{record.pop('image')}</img>")


@fault
def picture_named(data: DataSet) -> None:
    record = data.one()
    asked = questions(record)[0]
    asked["value"] = asked["value"].replace("<image>", record.pop("image"))


@fault
def marker_foreign(data: DataSet) -> None:
    asked = questions(data.one())[0]
    asked["value"] = asked["value"].replace("<image>", "<image_placeholder>")


@fault
def marker_as_text(data: DataSet) -> None:
    questions(data.one())[0]["value"] += " <ImageHere>"


@fault
def system_dropped(data: DataSet) -> None:
    data.one()["system"] = "Be brief."


@fault
def turn_weight(data: DataSet) -> None:
    answers(data.one())[0]["weight"] = 0.5


@fault
def nothing_learned(data: DataSet) -> None:
    for answer in answers(data.one()):
        answer["loss"] = False


@fault
def text_escapes(data: DataSet) -> None:
    answers(data.one())[0]["value"] += "\\nYes."


@fault
def text_html(data: DataSet) -> None:
    answers(data.one())[0]["value"] += " &amp; more"


@fault
def text_control(data: DataSet) -> None:
    answers(data.one())[0]["value"] += "\u200b"


@fault
def text_thought(data: DataSet) -> None:
    answers(data.one())[0]["value"] = "<think>Hm.</think>" + answers(data.one())[0]["value"]
