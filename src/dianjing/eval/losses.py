"""Questions -> the loss of their reference answers; nothing is generated, so the wording of answers does not matter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy

from dianjing.constants import IGNORE_INDEX, IMAGE_MARKER
from dianjing.data.encode import Example
from dianjing.data.record import Record, Turn, without_markers
from dianjing.errors import DataError
from dianjing.infer.answering import answering
from dianjing.infer.answers import with_pictures
from dianjing.infer.generate import CPU_POSITIONS, LoadedModel, Prompt, pack
from dianjing.infer.pictures import PictureFiles
from dianjing.infer.questions import Question
from dianjing.model.forward import language_parts

ROWS_AT_A_TIME = 1024
"""Rows whose logits are in memory at the same time."""


def reference_losses(
    loaded: LoadedModel,
    questions: Sequence[Question],
    image_root: str,
    advance: Callable[[int], object] = lambda count: None,
    files: PictureFiles | None = None,
) -> list[float]:
    """Return the mean cross-entropy of each reference answer, in nats a token, with the token that ends it.

    Pictures are not shown to a model without eyes; `files` keeps them from one call to the next.

    Raises:
        DataError: a question and its reference are longer than the model can read.
    """
    losses: list[float] = []
    for window, pictures in with_pictures(loaded, questions, image_root, files):
        shown = [[pictures[name] for name in question.images if pictures] for question in window]
        examples = [
            _example(loaded, question, [(image.height, image.width) for image in images])
            for question, images in zip(window, shown, strict=True)
        ]
        found = [0.0] * len(window)
        for rows in _batches(examples):
            prompts = [Prompt(examples[row].input_ids, shown[row]) for row in rows]
            for row, loss in zip(rows, _losses(loaded, prompts, [examples[row].labels for row in rows]), strict=True):
                found[row] = loss
        losses += found
        advance(len(window))
    return losses


def _example(loaded: LoadedModel, question: Question, sizes: Sequence[tuple[int, int]]) -> Example:
    """Return question and reference as training reads them, however long they are."""
    text, images = question.text, question.images
    if not loaded.can_see:
        text, images = without_markers(text) if IMAGE_MARKER in text else text, ()
    turn = Turn(question=text, answer=question.reference)
    record = Record(id=question.id, images=images, turns=(turn,), types=(), source="question", index=question.turn)
    example = replace(loaded.encoder, max_tokens=sys.maxsize).encode(record, sizes)
    limit = loaded.model.config.get_text_config().max_position_embeddings
    if len(example.input_ids) > limit:
        raise DataError(
            f'record "{question.id}": question {question.turn} and its reference take {len(example.input_ids)} '
            f"positions, pictures included, but {loaded.name} reads {limit}; shorten it or leave it out"
        )
    return example


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Yield the numbers of examples, at most CPU_POSITIONS together."""
    batch: list[int] = []
    positions = 0
    for row, example in enumerate(examples):
        if batch and positions + len(example.input_ids) > CPU_POSITIONS:
            yield batch
            batch, positions = [], 0
        batch.append(row)
        positions += len(example.input_ids)
    if batch:
        yield batch


def _losses(loaded: LoadedModel, prompts: Sequence[Prompt], labels: Sequence[Sequence[int]]) -> list[float]:
    decoder, head = language_parts(loaded.model)
    with answering(loaded.model):
        together = pack(loaded, prompts)
        hidden = decoder(**together.arguments, use_cache=False).last_hidden_state[0]
        # Each row foretells the next one; the first of a record is foretold by none.
        targets = torch.tensor([label for row in labels for label in (IGNORE_INDEX, *row[1:])], device=hidden.device)[
            1:
        ]
        supervised = targets != IGNORE_INDEX
        rows, wanted = hidden[:-1][supervised], targets[supervised]
        parts = zip(rows.split(ROWS_AT_A_TIME), wanted.split(ROWS_AT_A_TIME), strict=True)
        each = torch.cat([cross_entropy(head(part).float(), target, reduction="none") for part, target in parts])
    counts = [sum(label != IGNORE_INDEX for label in row[1:]) for row in labels]
    return [float(part.mean()) for part in each.double().split(counts)]
