"""The page's addresses: who may ask, what is never opened, what two tabs are told."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dianjing.errors import DataError
from dianjing.serve.page import PageGuard
from dianjing.studio.app import MAX_BYTES, Answer
from dianjing.studio.models import Models
from dianjing.studio.runs import Runs
from dianjing.studio.session import ReviewSession
from dianjing.studio.studio import UPLOADS, Studio
from tests.tiny import TinyDataset, tiny_records
from tests.unit.studio.conftest import HOSTILE, TOKEN, Served

FIRST_HOSTILE = len(tiny_records())
TALK = [{"from": "human", "value": "<image>\nNew?"}, {"from": "gpt", "value": "<script>alert(1)</script>"}]
opened: list[str] = []
"""Paths that the process has opened; a hook of Python's tells, and cannot be taken off again."""


@pytest.fixture(scope="module", autouse=True)
def _watch() -> None:
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)


def change(served: Served, index: int, op: str, version: int, **more: Any) -> Any:
    return served.ask(f"/records/{index}/change", {"op": op, "version": version, **more})


def done(served: Served) -> Any:
    """Return the state once the whole set is checked."""
    assert served.studio.session
    served.studio.session.check._thread.join()
    return served.ask("/state").value


@pytest.mark.parametrize(
    ("headers", "prefix", "status"),
    [
        ({"host": "evil.example"}, f"/{TOKEN}", 403),
        ({"host": "127.0.0.1.evil.example:80"}, f"/{TOKEN}", 403),
        ({"host": ""}, f"/{TOKEN}", 403),
        ({"origin": "http://evil.example"}, f"/{TOKEN}", 403),
        ({"origin": "null"}, f"/{TOKEN}", 403),
        ({"origin": "http://127.0.0.1:1"}, f"/{TOKEN}", 403),
        ({}, "", 404),
        ({}, "/guess", 404),
        ({}, "/" + TOKEN[:-1], 404),
    ],
    ids=str,
)
def test_nobody_else_gets_in(served: Served, headers: dict[str, str], prefix: str, status: int) -> None:
    for path, body in (("/state", None), ("/records/0/change", {"op": "reject", "version": 0})):
        answer = served.ask(path, body, headers=headers, prefix=prefix)
        assert answer.status == status
        assert set(answer.value) == {"error"}
    assert served.ask("/state").value["counts"]["rejected"] == 0


def test_the_page_itself_gets_in(served: Served) -> None:
    for host in ("127.0.0.1", "localhost"):
        headers = {"host": f"{host}:{served.port}", "origin": f"http://{host}:{served.port}"}
        assert served.ask("/state", headers=headers).status == 200
    assert served.ask("/").status == 200


def test_nothing_is_loaded_from_elsewhere_and_no_text_is_run(served: Served) -> None:
    answer = served.ask("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    package = Path(sys.modules["dianjing.studio.app"].__file__ or "").parent
    for file in [package / "page.html.j2", *(package / "static").iterdir()]:
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, file
        assert "innerHTML" not in text, file


def test_hostile_pictures_are_refused_counted_and_not_read(served: Served) -> None:
    state = done(served)
    assert state["pictures_refused"] == len(HOSTILE)
    del opened[:]
    for number, name in enumerate(HOSTILE):
        index = FIRST_HOSTILE + number
        record = served.ask(f"/records/{index}").value
        assert record["images"] == [name]
        assert [finding["code"][:5] for finding in record["findings"]] == ["path_"]
        answer = served.ask(f"/records/{index}/pictures/0")
        assert answer.status == 422
        assert name[:20] in answer.value["error"] or "\0" in name
        assert served.ask(f"/records/{index}/proposal", {"prompt": "caption_en"}).status == 422
        assert served.ask("/chat", {"model": "x", "question": "?", "history": [], "record": index}).status == 422
    assert not [path for path in opened if "passwd" in path or "secret" in path or "link" in path]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../../records.py",
        "/static/%2e%2e/records.py",
        "/static/..%2f..%2frecords.py",
        "/static//etc/passwd",
        "/../../../../etc/passwd",
        "/records/0/pictures/..%2f..%2fsecret.png",
        "/pictures/..%2f..%2fetc%2fpasswd",
        "/records/-1",
        "/records/99999999999999999999",
        "/records/0/pictures/16",
        "/run?name=..%2f..",
        "/run?name=%2fetc",
        "/run/picture?name=..%2f&record=1",
        "/records/0/seen?recipe=%2fetc%2fpasswd",
        "/records/0/seen?recipe=..%2f..%2fx.toml",
    ],
)
def test_no_address_leads_out_of_the_folder(served: Served, path: str) -> None:
    answer = served.ask(path)
    assert answer.status in (404, 422)
    assert b"root:" not in answer.content


ODD = [
    r'{"id": "a", "image": "\ud800.png", "conversations": [{"from": "human", "value": "\udfff"}]}',
    '{"id": NaN, "x": Infinity, "conversations": [{"from": "human", "value": 3}]}',
    '{"id": {"a": 1}, "image": {"b": 2}, "conversations": {"from": "human"}}',
    '{"id": "deep", "x": ' + "[" * 400 + "]" * 400 + "}",
    '{"image": [["a"], 3, "", "wide.png"], "messages": [{"role": "tool", "content": "x"}]}',
    "[1, 2]",
    '"text"',
    "{broken",
    '{"id": "\u202egnp.exe", "conversations": [{"from": "<b>", "value": "</script><script>alert(1)</script>"}]}',
    '{"conversations": []}',
]


def test_odd_records_are_shown_and_written(tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    data = tmp_path / "odd.jsonl"
    data.write_text("\n".join(ODD), encoding="utf-8")
    session = ReviewSession(data, str(tiny_dataset.images))
    try:
        for index in range(len(ODD)):
            shown = session.record(index)
            assert json.loads(bytes(Answer(shown).body)) == shown
            assert shown["findings"]
            assert shown["messages"] is not None or shown["raw"]
        counts = session.export()["counts"]
    finally:
        session.close()
    assert (counts["written"], counts["unreadable"]) == (7, 3)
    assert len(json.loads((tmp_path / "odd.reviewed.json").read_text("utf-8"))) == 7


def test_pictures_are_written_anew(served: Served) -> None:
    answer = served.ask("/records/0/pictures/0")
    assert answer.headers["content-type"] == "image/png"
    shown = Image.open(io.BytesIO(answer.content))
    name = served.ask("/records/0").value["images"][0]
    with Image.open(served.folder / "images" / name) as image:
        assert shown.size == image.size


def test_pictures_of_ones_own_stay_in_memory_and_few(served: Served) -> None:
    before = sorted(served.folder.rglob("*"))
    names = []
    for red in range(UPLOADS + 1):
        file = io.BytesIO()
        Image.new("RGB", (30, 20), (red, 0, 0)).save(file, "PNG")
        names.append(served.ask("/pictures", file.getvalue(), headers={"content-type": "image/png"}).value["name"])
    assert served.ask(f"/pictures/{names[0]}").status == 422
    for red, name in list(enumerate(names))[1:]:
        with Image.open(io.BytesIO(served.ask(f"/pictures/{name}").content)) as shown:
            assert shown.getpixel((0, 0)) == (red, 0, 0)
    assert sorted(served.folder.rglob("*")) == before


def test_a_change_is_kept_and_undone(served: Served) -> None:
    record = change(served, 0, "edit", 0, conversations=TALK).value
    assert (record["status"], record["edited"], record["version"]) == ("accepted", True, 1)
    assert record["messages"] == TALK
    assert served.ask("/records/0").value == record
    back = change(served, 0, "undo", 1).value
    assert (back["status"], back["edited"], back["version"]) == ("undecided", False, 2)
    assert back["messages"] == tiny_records()[0]["conversations"]
    assert change(served, 0, "undo", 2).status == 422


def test_an_edit_is_checked_at_once(served: Served) -> None:
    broken = [{"from": "human", "value": "no marker"}, {"from": "gpt", "value": "I'm sorry, but I can't help."}]
    codes = {one["code"] for one in change(served, 0, "edit", 0, conversations=broken).value["findings"]}
    assert "marker_missing" in codes


def test_of_two_tabs_the_second_is_told(served: Served) -> None:
    assert change(served, 0, "accept", 0).status == 200
    late = change(served, 0, "edit", 0, conversations=TALK)
    assert late.status == 409
    assert late.value["record"]["status"] == "accepted"
    assert served.ask("/records/0").value["edited"] is False
    assert change(served, 0, "edit", late.value["record"]["version"], conversations=TALK).status == 200


def test_the_filters_lead_from_record_to_record(served: Served) -> None:
    done(served)
    change(served, 1, "reject", 0)
    change(served, 3, "reject", 0)
    change(served, 2, "accept", 0)
    total = FIRST_HOSTILE + len(HOSTILE)

    def ask(query: str) -> tuple[int | None, int | None, int]:
        value = served.ask(f"/next?{query}").value
        return value["index"], value["position"], value["total"]

    assert ask("from=0&filter=rejected") == (1, 0, 2)
    assert ask("from=2&filter=rejected") == (3, 1, 2)
    assert ask("from=4&filter=rejected") == (None, None, 2)
    assert ask("from=2&step=-1&filter=rejected") == (1, 0, 2)
    assert ask("from=1&filter=undecided") == (4, 1, total - 3)
    assert ask("from=-1&step=-1&filter=all") == (None, None, total)
    assert ask(f"from={total + 5}&step=-1&filter=all") == (total - 1, total - 1, total)
    assert ask("from=0&filter=findings")[2] >= len(HOSTILE)
    assert served.ask("/next?from=x").status == 422


def test_a_data_file_that_changes_under_the_page_takes_no_decisions(served: Served) -> None:
    data = served.folder / "data.json"
    data.write_text("[]")
    answer = change(served, 0, "accept", 0)
    assert answer.status == 422
    assert "changed on disk" in answer.value["error"]
    assert served.ask("/export", {}).status == 422


def test_the_reviewed_set_is_written_beside_the_data(served: Served) -> None:
    before = (served.folder / "data.json").read_bytes()
    change(served, 0, "reject", 0)
    answer = served.ask("/export", {}).value
    written = json.loads(Path(answer["file"]).read_text("utf-8"))
    assert len(written) == answer["counts"]["written"] == FIRST_HOSTILE + len(HOSTILE) - 1
    assert answer["counts"]["rejected"] == 1
    assert (served.folder / "data.json").read_bytes() == before


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/records/0/change", b"{", {}),
        ("/records/0/change", b"[]", {}),
        ("/records/0/change", {"op": "burn", "version": 0}, {}),
        ("/records/0/change", {"op": "accept", "version": True}, {}),
        ("/records/0/change", {"op": "accept"}, {}),
        ("/records/0/change", {"op": "edit", "version": 0, "conversations": "x"}, {}),
        ("/records/0/change", {"op": "accept", "version": 0}, {"content-type": "text/plain"}),
        ("/records/0/change", b" " * (MAX_BYTES + 1), {}),
        ("/chat", {"model": "tinyworld", "question": "?", "history": []}, {}),
        ("/chat", {"model": "x", "question": " ", "history": []}, {}),
        ("/chat", {"model": "x", "question": "?", "history": [["a"]]}, {}),
        ("/pictures", b"\x89PNG no picture", {"content-type": "image/png"}),
        ("/pictures", b"GIF89a", {"content-type": "text/html"}),
        ("/runs/start", {"recipe": "../x.toml", "resume": False}, {}),
        ("/runs/stop", {"name": "x"}, {}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    served: Served, path: str, body: Any, headers: dict[str, str]
) -> None:
    answer = served.ask(path, body, headers=headers)
    assert answer.status == 422
    assert answer.value["error"]
    assert served.ask("/state").value["counts"]["accepted"] == 0


def test_a_recipe_may_be_a_shipped_one(tmp_path: Path) -> None:
    studio = Studio(folder=tmp_path, runs=Runs(tmp_path, ""), models=Models(), recipe="tinyworld_pretrain")
    assert Path(studio.recipe_path("tinyworld_pretrain")).name == "tinyworld_pretrain.toml"
    for name in ("", "tinyworld_finetune"):
        with pytest.raises(DataError):
            studio.recipe_path(name)


def test_what_the_end_cuts_off_is_told() -> None:
    sent: list[Any] = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": f"/{TOKEN}/state", "headers": [(b"host", b"127.0.0.1:1")]}
    asyncio.run(PageGuard(app=slow, port=1, token=TOKEN)(scope, receive, send))
    assert (sent[0]["status"], json.loads(sent[1]["body"])) == (503, {"error": "the studio was ended"})


@pytest.mark.parametrize(
    ("accepted", "query", "language"),
    [("zh-CN,zh;q=0.9", "", "zh"), ("fr, zh", "", "zh"), ("en", "", "en"), ("", "", "en"), ("en", "?lang=zh", "zh")],
)
def test_the_page_speaks_the_readers_language(served: Served, accepted: str, query: str, language: str) -> None:
    page = served.ask(f"/{query}", headers={"accept-language": accepted}).content.decode()
    assert f'<html lang="{language}">' in page
    assert ("审阅" in page) == (language == "zh")
