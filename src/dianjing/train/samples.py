"""The model's own answers on held-out pictures while it trains: samples.jsonl and samples.html."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dianjing.config.schema import Recipe
from dianjing.data.record import load_records, without_markers
from dianjing.eval.compare import Column, page
from dianjing.infer.answers import answer_questions, check_pictures, load_pictures
from dianjing.infer.generate import LoadedModel
from dianjing.infer.questions import Question, questions_of
from dianjing.model.build import Built
from dianjing.model.compile import uncompiled
from dianjing.run.journal import SAMPLE, rows_to_keep, write_rows
from dianjing.run.layout import SAMPLES, SAMPLES_PAGE

COLUMNS = 4
"""Times shown on the page: the first and the latest."""
MAX_NEW_TOKENS = 128


class Samples:
    """A few held-out questions, asked at intervals; none if the recipe has none.

    Raises:
        DataError: the held-out records or their pictures cannot be used.
    """

    def __init__(
        self, recipe: Recipe, built: Built, run: Path, first_step: int, notify: Callable[[str], object]
    ) -> None:
        self._every = recipe.train.sample_every
        self._run = run
        self._model = built.model
        self._questions: list[Question] = []
        if not self._every:
            return
        self._root = recipe.data.images or str(Path(recipe.train.sample_path).parent)
        self._questions = sample_questions(recipe.train.sample_path, recipe.train.sample_count)
        check_pictures(self._questions, self._root, built.image_processor.rule)
        self._loaded_model = LoadedModel(
            name=str(run),
            model=built.model,
            tokenizer=built.tokenizer,
            encoder=built.encoder,
            image_processor=built.image_processor,
        )
        self._rows = rows_to_keep(run / SAMPLES, SAMPLE, first_step, notify) if first_step else list[dict[str, Any]]()

    def due(self, step: int, last: bool) -> bool:
        """Return whether the questions are asked after a step."""
        return bool(self._every) and (last or step % self._every == 0)

    def answer(self, step: int) -> None:
        """Ask the questions and write the answers down."""
        if not self._every:
            return
        self._model.eval()
        with uncompiled(self._model):
            answers = answer_questions(self._loaded_model, self._questions, self._root, MAX_NEW_TOKENS)
        self._model.train()
        self._rows += [
            {
                "step": step,
                "id": question.id,
                "question": without_markers(question.text),
                "reference": question.reference,
                "answer": answer,
            }
            for question, answer in zip(self._questions, answers, strict=True)
        ]
        write_rows(self._run / SAMPLES, self._rows)
        self._write_page()

    def _write_page(self) -> None:
        answers = Counter(row["step"] for row in self._rows)
        steps = [step for step, count in answers.items() if count == len(self._questions)]
        columns = [self._column(step) for step in [steps[0], *steps[1:][1 - COLUMNS :]]]
        pictures = load_pictures(self._questions, self._root, self._loaded_model.picture_rule)
        text = page(f"{self._run.name}: sample answers", self._questions, columns, pictures)
        (self._run / SAMPLES_PAGE).write_text(text, encoding="utf-8")

    def _column(self, step: int) -> Column:
        answers = [row["answer"] for row in self._rows if row["step"] == step]
        return Column.of_answers(f"step {step}", self._questions, answers)


def sample_questions(path: str, count: int) -> list[Question]:
    """Return the first questions of `count` records spread over the file."""
    records = load_records(path).records
    return [questions_of(record)[0] for record in records[:: max(1, len(records) // count)][:count]]
