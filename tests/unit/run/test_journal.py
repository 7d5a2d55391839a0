"""Damaged lines of train.jsonl cost themselves alone, wherever they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dianjing.errors import CheckpointError
from dianjing.run.journal import METRICS, Journal, read_journal, read_rows


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "learning_rate": 1e-3}


def lines(*steps: int) -> list[str]:
    return [json.dumps(row(step)) + "\n" for step in steps]


FAULTS = ['{"step": 2, "lo\n', "\n", "[]\n", "3\n", '{"step": 2}\n', '{"step": "2", "loss": 1, "learning_rate": 1}\n']
FAULTS += ['{"step": 2, "loss": true, "learning_rate": 1}\n', "[" * 100_000 + "\n", "\0\0\0\n", "{}\n"]


@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_anywhere_is_left_out_and_named(tmp_path: Path, fault: str, place: int) -> None:
    text = lines(1, 3)
    text.insert(place, fault)
    (tmp_path / "train.jsonl").write_text("".join(text))
    assert read_journal(tmp_path) == [row(1), row(3)]
    told: list[str] = []
    journal = Journal(tmp_path, 3, told.append)
    journal.append(row(4))
    journal.close()
    assert told == [f"{tmp_path / 'train.jsonl'}: damaged, and left out from here on: line {place + 1}"]
    assert (tmp_path / "train.jsonl").read_text() == "".join(lines(1, 3, 4))


def test_what_is_not_utf_8_and_a_torn_end(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe\n" + lines(1)[0].encode() + lines(2)[0].encode()[:-1])
    assert read_rows(tmp_path / "train.jsonl", METRICS) == ([row(1)], [1, 3])


def test_two_lines_written_into_each_other(tmp_path: Path) -> None:
    first, second = lines(2, 2)
    (tmp_path / "train.jsonl").write_text(lines(1)[0] + first[:9] + second + first[9:] + lines(3)[0])
    assert [row["step"] for row in read_journal(tmp_path)] == [1, 3]


def test_many_damaged_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("x\n" * 9)
    told: list[str] = []
    Journal(tmp_path, 9, told.append).close()
    assert told[0].endswith("line 1, 2, 3, 4, 5 and 4 more")


def test_later_lines_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(lines(1, 2, 3, 4)))
    Journal(tmp_path, 2, pytest.fail).close()
    assert (tmp_path / "train.jsonl").read_text() == "".join(lines(1, 2))


def test_a_journal_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    journal = Journal(tmp_path, 0, pytest.fail)
    journal.close()
    journal._file = open("/dev/full", "a")  # noqa: SIM115 (the journal closes it)
    with pytest.raises(CheckpointError, match=r"train.jsonl: cannot be written: No space left on device; make room"):
        journal.append(row(1))
    journal.close()


def test_a_run_without_a_journal_has_no_rows(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []
