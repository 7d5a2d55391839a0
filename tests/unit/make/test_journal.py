"""The journal: what was written is known again, a torn end is no loss, and two runs do not share one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dianjing.errors import DataError
from dianjing.make.journal import FORMAT, Journal

OK = {"prompt": "p", "reply": "A cat.", "usage": {"prompt_tokens": 10, "completion_tokens": 3}, "cost": 0.5}
INVALID = {"prompt": "p", "reply": "{", "reason": "not JSON", "usage": None, "cost": None}


def reread(path: Path) -> Journal:
    journal = Journal(path)
    journal.read()
    return journal


def test_what_was_written_is_known_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "data.journal.jsonl"
    with Journal(path) as journal:
        for key in "abcde":
            journal.sent(key, {"image": f"{key}.png"})
        journal.received("a", "ok", OK)
        journal.received("b", "invalid", INVALID)
        journal.received("c", "refused", {"prompt": "p", "reply": "No.", "reason": "the model refuses"})
        journal.received("d", "failed", {"prompt": "p", "reason": "timeout: none in 1 s"})
    again = reread(path)
    assert again.entries == journal.entries
    assert again.totals == journal.totals
    assert {key: entry.settled for key, entry in again.entries.items()} == dict(
        a=True, b=False, c=True, d=False, e=False
    )
    assert again.totals.calls == 5
    # d timed out, e was under way.
    assert again.totals.unanswered == 2
    assert again.totals.cost == 0.5
    assert again.totals.usage["p"].most_prompt_tokens == 10


def test_a_second_invalid_reply_settles(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        for settled in (False, True):
            journal.sent("a", {})
            journal.received("a", "invalid", INVALID)
            assert journal.entry("a").settled is settled
        assert journal.entry("a").invalid == [("{", "not JSON")] * 2


def test_a_failure_after_an_answer_does_not_forget_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.received("a", "invalid", INVALID)
        journal.received("a", "failed", {"prompt": "p", "reason": "HTTP 500: oops"})
    assert reread(tmp_path / "j").entry("a").invalid == [("{", "not JSON")]


@given(st.integers(0, 400))
def test_cut_anywhere_it_opens_and_keeps_whole_lines(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    with Journal(path) as journal:
        for key in "ab":
            journal.sent(key, {"image": "图.png"})
            journal.received(key, "ok", OK)
    content = path.read_bytes()
    path.write_bytes(content[:length])
    lines = content[:length].count(b"\n") + (content[length : length + 1] == b"\n")
    with Journal(path) as journal:
        assert sum(entry.status == "ok" for entry in journal.entries.values()) == max(0, lines - 1) // 2
        journal.sent("c", {})
    written = path.read_bytes().splitlines()
    assert json.loads(written[0]) == FORMAT
    assert json.loads(written[-1])["key"] == "c"
    assert len(written) == max(1, lines) + 1


def test_two_runs_do_not_share_one(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(DataError, match="another run"), Journal(tmp_path / "j"):
        pass
    with Journal(tmp_path / "j") as journal:
        journal.sent("a", {})


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"status": "ok"}x', "\x00", '{"status": "ok", "key": "a", "usage": 3}'], ids=repr
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.sent("a", {})
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 3 is not a line of this journal"):
        reread(path)


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    for content, message in (('{"id": 1}\n', "line 1"), ("notes", "not a journal")):
        (tmp_path / "j").write_text(content)
        with pytest.raises(DataError, match=message), Journal(tmp_path / "j"):
            pass
        assert (tmp_path / "j").read_text() == content


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "j", os.write
    with Journal(path) as journal:
        journal.sent("a", {})
        monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:10]))
        with pytest.raises(OSError, match="No space left") as error:
            journal.sent("b", {})
        assert error.value.filename == str(path)
        monkeypatch.undo()
        journal.sent("c", {})
    assert list(reread(path).entries) == ["a", "c"]
