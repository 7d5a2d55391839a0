"""A broken benchmark file: one sentence with the row and a way out."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dianjing.benchmark.table import BENCHMARKS
from dianjing.errors import DataError
from tests import benchmark_files as made

Rows = list[dict[str, Any]]


def without_question(rows: Rows) -> None:
    for row in rows:
        del row["question"]


def not_base64(rows: Rows) -> None:
    rows[3]["image"] = "!" * 40


def half_a_picture(rows: Rows) -> None:
    rows[3]["image"] = base64.b64encode(made.picture(3)[:40]).decode()


def no_such_picture(rows: Rows) -> None:
    rows[3]["image"] = "77"


def wrong_letter(rows: Rows) -> None:
    rows[3]["answer"] = "F"


def one_option(rows: Rows) -> None:
    rows[3] |= {"B": "nan", "C": "nan", "D": ""}


BROKEN = {
    without_question: "row 0 .* lacks question",
    not_base64: "row 4: its picture is not a whole picture in base64; download",
    half_a_picture: "row 4: its picture is not a whole picture",
    no_such_picture: "row 4: its picture is that of index 77, which has none",
    wrong_letter: "row 4: \"answer\" is 'F', but the options are A, B, C, D",
    one_option: "row 4: fewer than two options",
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
def test_a_broken_table(spoil: Callable[[Rows], None], tmp_path: Path) -> None:
    rows = made.mmbench_rows(turned=False)
    spoil(rows)
    with pytest.raises(DataError, match=BROKEN[spoil]) as error:
        BENCHMARKS["mmbench"].read(made.write_tsv(tmp_path / "dev.tsv", rows))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [1, 30, 130])
def test_a_table_whose_end_is_cut_off(cut: int, tmp_path: Path) -> None:
    """Within a cell, where the number of columns is still right, or between cells."""
    file = made.write_tsv(tmp_path / "dev.tsv", made.mmbench_rows(turned=False))
    file.write_bytes(file.read_bytes()[: -cut - 1])
    with pytest.raises(DataError, match="row 24") as error:
        BENCHMARKS["mmbench"].read(file)
    assert "again" in str(error.value)


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "coco_pope_random.json"
    file.write_text(json.dumps({"image": "a", "text": "b", "label": "yes"}) + '\n{"image": "a"')
    with pytest.raises(DataError, match="row 2 is not JSON"):
        BENCHMARKS["pope"].read(file)
    file.write_text(json.dumps({"image": "a", "text": "b", "label": "perhaps"}))
    with pytest.raises(DataError, match="yes or no is needed"):
        BENCHMARKS["pope"].read(file)
    with pytest.raises(DataError, match="no CATEGORY"):
        BENCHMARKS["mme"].read(tmp_path)
    for name in ("vqav2", "textvqa", "vizwiz", "gqa", "scienceqa", "seed", "refcoco"):
        other = tmp_path / "other.json"
        other.write_text("[1]" if name != "gqa" else "3")
        with pytest.raises(DataError):
            BENCHMARKS[name].read(other)
        with pytest.raises(DataError, match="No such file"):
            BENCHMARKS[name].read(tmp_path / "missing.json")
