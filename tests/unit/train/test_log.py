from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from dianjing.run.journal import read_journal
from dianjing.train.curve import draw_curve, ticks
from dianjing.train.log import Log, StepResult


def result(step: int, loss: float, tokens: int = 10) -> StepResult:
    return StepResult(
        step=step,
        epoch=step / 4,
        loss=loss,
        learning_rate=1e-3 / step,
        grad_norm=0.5,
        records=2,
        supervised_tokens=tokens,
        seconds=0.5,
        data_wait=0.1,
    )


def take(run: Path, first: int, last: int, every: int = 2, **settings: Any) -> None:
    run.mkdir(exist_ok=True)
    log = Log(run, **{"quiet": True, "write": True, **settings})
    with log.steps(first, 7, every) as steps:
        for step in range(first + 1, last + 1):
            steps.step(result(step, float(step), tokens=10 * step))
        steps.curve()


def test_a_line_covers_the_steps_since_the_last_one(tmp_path: Path) -> None:
    take(tmp_path, 0, 7)
    rows = read_journal(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    times = [(datetime.fromisoformat(row.pop("time")), row.pop("seconds")) for row in rows]
    assert times == sorted(times)
    assert abs((datetime.now(UTC) - times[0][0]).total_seconds()) < 60
    assert rows[1] == {
        "step": 4,
        "epoch": 1.0,
        "loss": pytest.approx((3 * 30 + 4 * 40) / 70),
        "learning_rate": 2.5e-4,
        "grad_norm": 0.5,
        "samples_per_second": 4.0,
        "supervised_tokens_per_second": 70.0,
        "data_wait": pytest.approx(0.2),
    }


def test_seconds_go_on_after_a_resume(tmp_path: Path) -> None:
    take(tmp_path, 0, 4)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"seconds": 1000.0} for line in lines]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    take(tmp_path, 4, 7)
    assert [row["seconds"] // 100 for row in read_journal(tmp_path)] == [10, 10, 10, 10]


def test_the_curve_goes_through_every_line(tmp_path: Path) -> None:
    take(tmp_path, 0, 7)
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    lines = [line.attrib["points"].split() for line in root.iter(f"{svg}polyline")]
    loss, rate = ([[float(number) for number in point.split(",")] for point in line] for line in lines)
    rows = read_journal(tmp_path)
    assert [x for x, _ in loss] == [x for x, _ in rate] == pytest.approx(even([row["step"] for row in rows], loss, 0))
    assert [y for _, y in loss] == pytest.approx(even([row["loss"] for row in rows], loss, 1), abs=0.2)
    assert [y for _, y in rate] == pytest.approx(even([row["learning_rate"] for row in rows], rate, 1), abs=0.2)
    assert loss[0][1] > loss[-1][1]  # this loss rises, and y counts from the top
    assert "loss per supervised token" in [text.text for text in root.iter(f"{svg}text")]


def even(values: list[float], points: list[list[float]], axis: int) -> list[float]:
    """Return where the values lie if the first and last lie where they are drawn."""
    start, end = points[0][axis], points[-1][axis]
    return [start + (value - values[0]) / (values[-1] - values[0]) * (end - start) for value in values]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.31, 2.9], [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]),
        ([1e-5, 5e-3], [0.0, 0.001, 0.002, 0.003, 0.004, 0.005]),
        ([1, 300], [0, 50, 100, 150, 200, 250, 300]),
        ([5.0], [5.0, 6.0]),
        ([0.0, float("nan")], [0.0, 0.2]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(values: list[float], expected: list[float]) -> None:
    assert ticks(values) == pytest.approx(expected)


def test_a_value_that_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": [3.0, 2.0, float("nan"), 1.0][step], "learning_rate": 0.0} for step in range(4)]
    draw_curve(rows, tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_text(encoding="utf-8").count("<polyline") == 3


def test_a_resumed_run_goes_on_with_the_same_lines(tmp_path: Path) -> None:
    take(tmp_path / "straight", 0, 7)
    take(tmp_path / "killed", 0, 6)
    with (tmp_path / "killed" / "train.jsonl").open("a") as journal:
        journal.write('{"step": 7, "lo')
    take(tmp_path / "killed", 4, 7)
    killed, straight = (
        [{name: value for name, value in row.items() if name not in ("time", "seconds")} for row in read_journal(run)]
        for run in (tmp_path / "killed", tmp_path / "straight")
    )
    assert killed == straight


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'dianjing[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    take(tmp_path, 0, 7)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in read_journal(tmp_path)
    ]


def test_without_tensorboard_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dianjing.train.log.importlib.util.find_spec", lambda name: None)
    take(tmp_path, 0, 7)
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "loss.svg"}


def test_a_rank_that_is_not_the_main_one_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    take(tmp_path, 0, 7, write=False)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_there_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    take(tmp_path, 0, 7, quiet=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"step {row['step']}/7  loss {row['loss']:.4f}  rate {row['learning_rate']:.2e}  4.0 samples/s"
        for row in map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())
    ]


def test_peak_memory_is_at_least_what_is_held(tmp_path: Path) -> None:
    held = torch.ones(2**26)  # 256 MiB
    log = Log(tmp_path, quiet=False, write=False)
    log.console = Console(file=io.StringIO(), width=80)
    log.peak_memory(torch.device("cpu"))
    text = log.console.file.getvalue()  # type: ignore[attr-defined]
    found = re.fullmatch(
        r"peak memory: ([\d.]+) (MiB|GiB) \(the whole process: libraries, weights, activations\)\n", text
    )
    assert found, text
    assert float(found[1]) * (1024 if found[2] == "GiB" else 1) > held.nbytes / 2**20


def test_every_range_of_values_has_marks() -> None:
    """Spans from just under a power of ten to just over it, at places near to zero and far from it."""
    for power in range(-9, 6):
        for digit in range(10, 101):
            for low in (0.0, -3.0, 1234.5):
                high = low + digit * 10.0**power
                marks = ticks([low, high])
                assert 2 <= len(marks) <= 12
                assert marks[0] <= low + 1e-9 * abs(low)
                assert marks[-1] >= high - 1e-9 * abs(high)
