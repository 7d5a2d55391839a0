"""Answers with the right picture, another and none; a run that was stopped goes on; a blind model is named."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dianjing.benchmark import run as module
from dianjing.benchmark.run import Asked, questions_of_items, require_distinct, score_benchmark, write_results
from dianjing.benchmark.table import BENCHMARKS
from dianjing.errors import DataError
from dianjing.eval.summary import RIGHT
from dianjing.infer.questions import Question
from dianjing.pictures.rule import PLAIN
from tests import benchmark_files as made

Says = Callable[[Question], str]


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """A file of one's own: the right letter is that of the picture."""
    rows = [
        {
            "question": f"Which of them, {i}?",
            **dict(zip("ABCD", made.COLOURS, strict=True)),
            "answer": "ABCD"[i % 4],
            "image": base64.b64encode(made.picture(i)).decode(),
            "category": ("one", "two")[i % 2],
        }
        for i in range(80)
    ]
    file = tmp_path / "own.json"
    file.write_text(json.dumps(rows))
    items = BENCHMARKS["choices"].read(file)
    questions = questions_of_items(items, tmp_path / "pictures")
    return Asked(
        benchmark=BENCHMARKS["choices"],
        items=items,
        questions=questions,
        image_root=str(tmp_path / "pictures"),
        journal=tmp_path / "answers.jsonl",
        header={"journal": "benchmark", "model": "mine"},
    )


def model(monkeypatch: pytest.MonkeyPatch, says: Says, *, can_see: bool = True, stop_after: int = 1000) -> list[str]:
    """Let `says` answer, and return the texts that it was asked."""
    seen: list[str] = []

    def answer_questions(
        loaded: Any, questions: Sequence[Question], root: str, max_new_tokens: int, answered: Any, files: Any
    ) -> list[str]:
        for question in questions:
            if len(seen) == stop_after:
                raise KeyboardInterrupt
            seen.append(question.text)
            assert question.text.count("<image>") == len(question.images)
            answered(question, says(question))
        return [says(question) for question in questions]

    monkeypatch.setattr(module, "answer_questions", answer_questions)
    return seen


def loaded(*, can_see: bool = True) -> Any:
    return SimpleNamespace(can_see=can_see, picture_rule=PLAIN)


def looking(asked: Asked) -> Says:
    letter = {one.images[0]: str(item.row["answer"]) for one, item in zip(asked.questions, asked.items, strict=True)}
    return lambda question: letter[question.images[0]] if question.images else "A"


def test_a_model_that_looks(asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model(monkeypatch, looking(asked))
    scores, answers = score_benchmark(loaded(), asked)
    assert [judged.figures["accuracy"] for judged in scores.judged.values()] == [
        1.0,
        pytest.approx(0.25, abs=0.15),
        0.25,
    ]
    assert scores.sight is not None
    assert scores.sight.low > 0.5
    assert not scores.blind
    assert scores.types == ["one", "two"]
    names = {path.name for path in write_results(tmp_path, asked, scores, answers)}
    assert names == {"scores.json", "predictions.jsonl"}
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["figures"]["right picture"] == {"accuracy": 1.0}


def test_a_benchmark_that_a_blind_model_passes_is_named(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {item.text: str(item.row["answer"]) for item in asked.items}
    model(monkeypatch, lambda question: right[question.text.replace("<image>\n", "")])
    assert score_benchmark(loaded(), replace(asked, journal=None))[0].blind


def test_a_benchmark_where_nothing_is_right_is_not_said_to_be_passed(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(monkeypatch, lambda question: "I cannot tell.")
    scores = score_benchmark(loaded(), replace(asked, journal=None))[0]
    assert scores.figure(RIGHT) == (0.0, 0.0, 0.0)
    assert not scores.blind


def test_a_model_without_eyes_is_asked_once(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = model(monkeypatch, lambda question: "A")
    scores, _ = score_benchmark(loaded(can_see=False), asked)
    assert len(seen) == 80
    assert scores.sight is None
    assert len(scores.judged) == 1


def test_it_goes_on_where_it_was_stopped(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = replace(asked, journal=None)
    model(monkeypatch, looking(asked))
    whole, _ = score_benchmark(loaded(), straight)
    first = model(monkeypatch, looking(asked), stop_after=100)
    with pytest.raises(KeyboardInterrupt):
        score_benchmark(loaded(), asked)
    rest = model(monkeypatch, looking(asked))
    counted: list[int] = []
    scores, _ = score_benchmark(loaded(), asked, counted.append)
    assert scores == whole
    assert (len(first), len(rest), sum(counted)) == (100, 140, 240)
    again = model(monkeypatch, looking(asked))
    assert score_benchmark(loaded(), asked)[0] == whole
    assert not again


def test_answers_of_another_model_are_not_taken(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    model(monkeypatch, looking(asked))
    score_benchmark(loaded(), asked)
    with pytest.raises(DataError, match="of another kind"):
        score_benchmark(loaded(), replace(asked, header={"journal": "benchmark", "model": "other"}))


def test_a_test_set_without_answers_is_asked_and_not_scored(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [replace(item, row={**item.row, "answer": ""}) for item in asked.items]
    model(monkeypatch, looking(asked))
    scores, answers = score_benchmark(loaded(), replace(asked, items=items))
    assert not scores.judged
    assert len(answers) == 80


def test_numbers_that_stand_twice_are_refused(asked: Asked) -> None:
    with pytest.raises(DataError, match="two questions have the number '1'"):
        require_distinct([*asked.items, asked.items[0]], "own.json")
