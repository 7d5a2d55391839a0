"""Decisions: replayed they are the same, a change on an old version is refused, and nothing is ever overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dianjing.errors import DataError
from dianjing.studio.review import OPS, Op, Review, Stale, Unusable, checked

RECORDS = 4
SHA = "0" * 64
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "图"}]


def opened(path: Path, sha256: str = SHA) -> Review:
    return Review(path, sha256, RECORDS)


def state(review: Review) -> list[Any]:
    each = [(review.decision(i), review.version(i), review.can_undo(i)) for i in range(RECORDS)]
    return [*each, review.counts(), review.members("accepted"), review.members("rejected")]


def attempt(review: Review, record: int, op: Op, text: str) -> None:
    try:
        review.change(record, review.version(record), op, [{"from": "human", "value": text}] if op == "edit" else None)
    except Unusable:
        assert op == "undo"


operations = st.lists(st.tuples(st.integers(0, RECORDS - 1), st.sampled_from(OPS), st.text(max_size=5)), max_size=30)


@settings(deadline=None, max_examples=40)  # every line is flushed to disk
@given(operations)
def test_any_changes_replayed_are_the_same_state(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, Op, str]]
) -> None:
    path = tmp_path_factory.mktemp("review") / "data.review.jsonl"
    review = opened(path)
    for record, op, text in changes:
        if op == "edit" and any("\ud800" <= character <= "\udfff" for character in text):
            continue
        attempt(review, record, op, text)
    expected = state(review)
    review.close()
    again = opened(path)
    assert state(again) == expected
    again.close()


@settings(deadline=None, max_examples=40)  # every line is flushed to disk
@given(operations)
def test_undoing_everything_leads_back_to_the_file(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, Op, str]]
) -> None:
    review = opened(tmp_path_factory.mktemp("review") / "data.review.jsonl")
    for record, op, text in changes:
        attempt(review, record, op, text.encode(errors="replace").decode())
    for record in range(RECORDS):
        while review.can_undo(record):
            review.change(record, review.version(record), "undo")
    assert review.counts() == {"accepted": 0, "rejected": 0, "undecided": RECORDS}
    assert all(review.decision(i).conversations is None for i in range(RECORDS))
    review.close()


def test_each_undo_takes_back_one_change(tmp_path: Path) -> None:
    review = opened(tmp_path / "j")
    for version, op in enumerate(("reject", "edit", "reject")):
        review.change(0, version, op, TALK)
    seen = []
    for version in (3, 4, 5):
        review.change(0, version, "undo")
        decision = review.decision(0)
        seen.append((decision.status, decision.conversations))
    assert seen == [("accepted", TALK), ("rejected", None), ("undecided", None)]
    assert review.version(0) == 6
    with pytest.raises(Unusable, match="nothing to undo"):
        review.change(0, 6, "undo")
    review.close()


def test_a_change_on_an_old_version_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    review = opened(tmp_path / "j")
    review.change(1, 0, "accept")
    before = (tmp_path / "j").read_bytes()
    for version in (0, 2, -1):
        with pytest.raises(Stale):
            review.change(1, version, "reject")
    assert (tmp_path / "j").read_bytes() == before
    assert review.decision(1).status == "accepted"
    review.close()


def test_a_rejected_edit_keeps_its_text(tmp_path: Path) -> None:
    review = opened(tmp_path / "j")
    review.change(0, 0, "edit", TALK)
    review.change(0, 1, "reject")
    assert (review.decision(0).status, review.decision(0).conversations) == ("rejected", TALK)
    review.close()


def test_the_journal_only_grows(tmp_path: Path) -> None:
    review = opened(tmp_path / "j")
    before = b""
    for version, op in enumerate(("accept", "undo", "edit", "undo", "reject")):
        review.change(2, version, op, TALK)
        content = (tmp_path / "j").read_bytes()
        assert content.startswith(before)
        assert len(content) > len(before)
        before = content
    review.close()


def test_two_studios_do_not_share_a_journal(tmp_path: Path) -> None:
    review = opened(tmp_path / "j")
    with pytest.raises(DataError, match="another run is writing it"):
        opened(tmp_path / "j")
    review.close()


def test_decisions_about_another_file_are_not_taken(tmp_path: Path) -> None:
    opened(tmp_path / "j").close()
    with pytest.raises(DataError, match="another data file, or of this one before it was changed"):
        opened(tmp_path / "j", "1" * 64)


@pytest.mark.parametrize(
    "line",
    [
        {"op": "accept", "record": 0, "version": 2},
        {"op": "accept", "record": RECORDS, "version": 1},
        {"op": "undo", "record": 0, "version": 1},
        {"op": "burn", "record": 0, "version": 1},
        {"op": "edit", "record": 0, "version": 1},
    ],
    ids=str,
)
def test_a_line_that_does_not_follow_is_named(tmp_path: Path, line: dict[str, Any]) -> None:
    opened(tmp_path / "j").close()
    with (tmp_path / "j").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="line 3 is not a line of this journal"):
        opened(tmp_path / "j")


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    review = opened(tmp_path / "j")
    review.change(0, 0, "accept")
    review.change(1, 0, "reject")
    review.close()
    content = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(content[:-5])
    review = opened(tmp_path / "j")
    assert review.counts() == {"accepted": 1, "rejected": 0, "undecided": RECORDS - 1}
    review.close()


@pytest.mark.parametrize(
    "value",
    [None, [], "text", [1], [{"from": "human"}], [{"from": "system", "value": "x"}], [{"from": "gpt", "value": 3}]],
    ids=str,
)
def test_what_is_no_conversation_is_not_saved(value: object) -> None:
    with pytest.raises(Unusable):
        checked(value)


def test_half_a_character_is_not_saved() -> None:
    with pytest.raises(Unusable, match="half a character"):
        checked([{"from": "human", "value": "\ud800"}])
