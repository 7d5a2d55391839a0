"""Run and export compared -> parity.json, or no export at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from peft.tuners.lora import Linear as PeftLinear
from PIL import Image
from torch import Tensor, nn

from dianjing import __version__
from dianjing.data.record import with_markers
from dianjing.errors import ExportError
from dianjing.infer.answering import answering
from dianjing.infer.generate import Conversation, LoadedModel, generate_ids, pack, prepare
from dianjing.model.forward import language_parts

TOLERANCE = 1e-4
"""Largest difference of two fp32 logits, on the scale of the largest logit when that is above 1."""
PIXEL_TOLERANCE = 1e-5
ANSWER_TOKENS = 16
Logits = Float[Tensor, "tokens vocab"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One conversation, answered by the run and by the export; None = a thing this format has not."""

    question: str
    image_sizes: list[tuple[int, int]]
    """(width, height) before preprocessing."""
    same_ids: bool | None
    """The export's chat template and processor give the ids that training used."""
    pixel_difference: float | None
    logit_difference: float
    """Over every position of prompt and answer and the run's whole vocabulary."""
    largest_logit: float
    same_answer: bool | None
    """Token for token, greedy."""
    tolerance: float = TOLERANCE
    """Of logit_difference, on the scale of the largest logit when that is above 1."""
    rounding_difference: float | None = None
    """Cost of writing fewer bits, in logits: reported, not judged."""
    rounded_same_answer: bool | None = None
    """The answer survives that; reported, not judged."""

    @property
    def equal(self) -> bool:
        """True if the export may be trusted to answer as the run does."""
        close = self.logit_difference <= self.tolerance * max(1.0, self.largest_logit)
        pixels = self.pixel_difference is None or self.pixel_difference <= PIXEL_TOLERANCE
        return self.same_ids is not False and pixels and close and self.same_answer is not False


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Cases that were compared, with notes for a reader of the receipt."""

    cases: list[Case]
    notes: tuple[str, ...] = ()
    compared: str = "the folder, read back, against the run"
    """The two sides of the comparison, in words."""

    @property
    def max_logit_difference(self) -> float:
        """Largest of all cases."""
        return max(case.logit_difference for case in self.cases)

    @property
    def max_rounding_difference(self) -> float | None:
        """Largest of all cases; None when no bits were saved."""
        return max(
            (case.rounding_difference for case in self.cases if case.rounding_difference is not None), default=None
        )


def drawn_cases() -> list[Conversation]:
    """Return cases that need no data: a wide, a tall and a square picture, two pictures, and none."""
    wide, tall, square = (_gradient(*size) for size in ((97, 31), (40, 120), (64, 64)))
    question = "What is in the picture?"
    return [
        *(Conversation((), with_markers(question, 1), (image,)) for image in (wide, tall, square)),
        Conversation((), with_markers("What is different?", 2), (wide, tall)),
        Conversation((), "Who are you?", ()),
    ]


def compare(
    loaded: LoadedModel, other: LoadedModel, conversations: Sequence[Conversation], tolerance: float = TOLERANCE
) -> list[Case]:
    """Return how another model, read back by our own code, answers compared with the run."""
    cases = []
    answers, others = (generate_ids(one, conversations, ANSWER_TOKENS) for one in (loaded, other))
    for conversation, answer, other_answer in zip(conversations, answers, others, strict=True):
        ours, theirs = run_forms(loaded, conversation, answer), run_logits(other, conversation, answer)
        images = list(conversation.images)
        cases.append(
            Case(
                question=conversation.question,
                image_sizes=[image.size for image in images],
                same_ids=prepare(other, conversation).input_ids == prepare(loaded, conversation).input_ids,
                pixel_difference=pixel_difference(loaded, conversation, _pixels(other, conversation)),
                logit_difference=max(logit_difference(one, theirs) for one in ours),
                largest_logit=ours[0].abs().max().item(),
                same_answer=other_answer == answer,
                tolerance=tolerance,
            )
        )
    return cases


def write_receipt(loaded: LoadedModel, folder: Path, format: str, proof: Proof) -> Path:
    """Write parity.json next to the weights and return its path.

    Raises:
        ExportError: the export does not equal the run.
    """
    cases = proof.cases
    wrong = [case for case in cases if not case.equal]
    if wrong:
        raise ExportError(
            f"the export does not equal the run on {len(wrong)} of {len(cases)} conversations, so it is not "
            f"kept; the first: {_complaint(wrong[0])}"
        )
    receipt: dict[str, Any] = {
        "format": format,
        "source": loaded.name,
        "compared": proof.compared,
        "notes": list(proof.notes),
        "versions": {"dianjing": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "tolerance": max(case.tolerance for case in cases),
        "max_logit_difference": proof.max_logit_difference,
        "max_rounding_difference": proof.max_rounding_difference,
        "max_pixel_difference": max(case.pixel_difference or 0.0 for case in cases),
        "equal_prompts": sum(bool(case.same_ids) for case in cases),
        "equal_answers": sum(bool(case.same_answer) for case in cases),
        "conversations": len(cases),
        "cases": [asdict(case) for case in cases],
    }
    path = folder / "parity.json"
    path.write_text(json.dumps(receipt, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return path


def _complaint(case: Case) -> str:
    what = [
        "other prompt tokens" if case.same_ids is False else "",
        f"pixels differ by {case.pixel_difference:.2g}" if (case.pixel_difference or 0.0) > PIXEL_TOLERANCE else "",
        f"logits differ by {case.logit_difference:.2g} (largest logit {case.largest_logit:.3g})",
        "another greedy answer" if case.same_answer is False else "",
    ]
    return f"{case.question!r}: " + ", ".join(part for part in what if part)


def logit_difference(ours: Logits, theirs: Logits) -> float:
    """Return the largest difference over our vocabulary; infinite for another number of tokens."""
    if ours.shape[0] != theirs.shape[0] or ours.shape[1] > theirs.shape[1]:
        return float("inf")
    return (ours - theirs[:, : ours.shape[1]].to(ours.device)).abs().max().item()


def pixel_difference(loaded: LoadedModel, conversation: Conversation, pixels: Tensor | None) -> float:
    """Return how far another program's pixel values are from those the run is fed."""
    ours = _pixels(loaded, conversation)
    if ours is None or pixels is None:
        return 0.0 if ours is None and pixels is None else float("inf")
    return (ours - pixels.cpu()).abs().max().item() if ours.shape == pixels.shape else float("inf")


def run_logits(loaded: LoadedModel, conversation: Conversation, answer: Sequence[int]) -> Logits:
    """Return the run's logits over prompt and answer, its adapters computed apart from the weights they stand on."""
    with _adapters_apart(loaded.model):
        return _logits(loaded, conversation, answer)


def run_forms(loaded: LoadedModel, conversation: Conversation, answer: Sequence[int]) -> list[Logits]:
    """Return the run's logits with its adapters apart, and as it computes them itself.

    In fp32 it multiplies with the sum of weight and adapter, which is also what a merged export holds: that alone
    would compare a sum with itself.
    """
    itself = [_logits(loaded, conversation, answer)] if _adapted(loaded.model) else []
    return [run_logits(loaded, conversation, answer), *itself]


def _logits(loaded: LoadedModel, conversation: Conversation, answer: Sequence[int]) -> Logits:
    decoder, head = language_parts(loaded.model)
    with answering(loaded.model):
        embeddings = pack(loaded, [prepare(loaded, conversation)]).embeddings[None]
        tail = loaded.model.get_input_embeddings()(torch.tensor([answer[:-1]], device=embeddings.device).long())
        hidden = decoder(inputs_embeds=torch.cat([embeddings, tail], 1), use_cache=False).last_hidden_state
        return head(hidden[0]).float()


@contextmanager
def _adapters_apart(model: nn.Module) -> Iterator[None]:
    """Let every adapted layer compute as peft does: the weight's product, plus the adapter's."""
    adapted = _adapted(model)
    for module in adapted:
        module.forward = MethodType(PeftLinear.forward, module)
    try:
        yield
    finally:
        for module in adapted:
            del module.forward


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


def _pixels(loaded: LoadedModel, conversation: Conversation) -> Float[Tensor, "images 3 height width"] | None:
    if not conversation.images or loaded.image_processor is None:
        return None
    return torch.stack([loaded.image_processor(image) for image in conversation.images])


def _gradient(width: int, height: int) -> Image.Image:
    """Return a picture in which every place looks different, so that a wrong crop or pad shows."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [columns * 255 // width, rows * 255 // height, (rows * 7 + columns * 3) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))
