"""Questions -> the loss of their reference answers; nothing is generated, so the wording of answers does not matter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dianjing.constants import IGNORE_INDEX, IMAGE_MARKER
from dianjing.data.encode import Example
from dianjing.data.record import Record, Turn, without_markers
from dianjing.errors import DataError
from dianjing.infer.answers import WINDOW, load_pictures
from dianjing.infer.generate import (
    CPU_POSITIONS,
    LoadedModel,
    Prompt,
    answering,
    language_parts,
    left_padded,
)
from dianjing.infer.questions import Question

ROWS_AT_A_TIME = 1024
"""Rows whose logits are in memory at the same time."""


def reference_losses(
    loaded: LoadedModel,
    questions: Sequence[Question],
    image_root: str,
    advance: Callable[[int], object] = lambda count: None,
) -> list[float]:
    """Return the mean cross-entropy of each reference answer, in nats a token, with the token that ends it.

    Pictures are not shown to a model without eyes.

    Raises:
        DataError: a question and its reference are longer than the model can read.
    """
    losses: list[float] = []
    for start in range(0, len(questions), WINDOW):
        window = questions[start : start + WINDOW]
        pictures = load_pictures(window, image_root, loaded.picture_rule) if loaded.can_see else {}
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
    """Yield the numbers of examples of similar length, at most CPU_POSITIONS together, padding included."""
    batch: list[int] = []
    for row in sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids)):
        if batch and (len(batch) + 1) * len(examples[row].input_ids) > CPU_POSITIONS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _losses(loaded: LoadedModel, prompts: Sequence[Prompt], labels: Sequence[Sequence[int]]) -> list[float]:
    decoder, head = language_parts(loaded.model)
    with answering(loaded.model):
        embeddings, attention_mask = left_padded(loaded, prompts)
        hidden = decoder(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        longest = hidden.shape[1]
        padded = [[IGNORE_INDEX] * (longest - len(row)) + [IGNORE_INDEX, *row[1:]] for row in labels]
        targets = torch.tensor(padded, device=hidden.device)[:, 1:]  # of the row before each
        supervised = targets != IGNORE_INDEX
        rows, wanted = hidden[:, :-1][supervised], targets[supervised]
        parts = zip(rows.split(ROWS_AT_A_TIME), wanted.split(ROWS_AT_A_TIME), strict=True)
        each = torch.cat([cross_entropy(head(part).float(), target, reduction="none") for part, target in parts])
    counts = cast(list[int], supervised.sum(1).tolist())
    return [_mean(part) for part in each.double().split(counts)]


def _mean(values: Tensor) -> float:
    return float(values.mean())
