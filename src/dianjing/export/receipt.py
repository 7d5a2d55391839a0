"""Run and export side by side -> parity.json, or no export at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from dianjing.constants import IMAGE_MARKER
from dianjing.data.record import with_markers, without_markers
from dianjing.errors import ExportError
from dianjing.use.generate import (
    Conversation,
    Seer,
    answering,
    generate_ids,
    language_parts,
    left_padded,
    prepare,
)

TOLERANCE = 1e-4
"""Largest difference of two fp32 logits, on the scale of the largest logit when that is above 1."""
ANSWER_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One conversation, answered by the run and by the export."""

    question: str
    image_sizes: list[tuple[int, int]]
    """(width, height) before preprocessing."""
    same_ids: bool
    """The export's chat template and processor give the ids that training used."""
    pixel_difference: float
    logit_difference: float
    """Over every position of prompt and answer and the run's whole vocabulary."""
    largest_logit: float
    same_answer: bool
    """Token for token, greedy."""

    @property
    def equal(self) -> bool:
        """Whether the export may be trusted to answer as the run does."""
        close = self.logit_difference <= TOLERANCE * max(1.0, self.largest_logit)
        return self.same_ids and self.pixel_difference <= 1e-5 and close and self.same_answer


def drawn_cases() -> list[Conversation]:
    """Return cases that need no data: a wide, a tall and a square picture, two pictures, and none."""
    wide, tall, square = (_gradient(*size) for size in ((97, 31), (40, 120), (64, 64)))
    question = "What is in the picture?"
    return [
        *(Conversation((), with_markers(question, 1), (image,)) for image in (wide, tall, square)),
        Conversation((), with_markers("What is different?", 2), (wide, tall)),
        Conversation((), "Who are you?", ()),
    ]


def compare(seer: Seer, folder: Path, conversations: Sequence[Conversation]) -> list[Case]:
    """Return how the model in `folder`, read as a stranger would read it, answers beside the run."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model = model.to(seer.model.device).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    answers = generate_ids(seer, conversations, ANSWER_TOKENS)
    cases = []
    for conversation, answer in zip(conversations, answers, strict=True):
        prompt = prepare(seer, conversation)
        text = processor.apply_chat_template(_messages(conversation), add_generation_prompt=True)
        images = list(conversation.images) or None
        inputs = processor(text=text, images=images, return_tensors="pt").to(model.device)
        ids = inputs["input_ids"][0].tolist()
        ours, theirs = _run_logits(seer, conversation, answer), _export_logits(model, inputs, answer)
        same_length = ours.shape[0] == theirs.shape[0]
        gap = (ours - theirs[:, : ours.shape[1]]).abs().max().item() if same_length else float("inf")
        cases.append(
            Case(
                question=conversation.question,
                image_sizes=[image.size for image in conversation.images],
                same_ids=ids == prompt.input_ids,
                pixel_difference=_pixel_difference(seer, conversation, inputs.get("pixel_values")),
                logit_difference=gap,
                largest_logit=ours.abs().max().item(),
                same_answer=_export_answer(model, inputs) == answer,
            )
        )
    return cases


def write_receipt(seer: Seer, folder: Path, cases: Sequence[Case]) -> Path:
    """Write parity.json beside the weights and return its path.

    Raises:
        ExportError: the export does not equal the run.
    """
    wrong = [case for case in cases if not case.equal]
    if wrong:
        raise ExportError(
            f"the export does not equal the run on {len(wrong)} of {len(cases)} conversations, so it is not "
            f"kept; the first: {_complaint(wrong[0])}"
        )
    receipt: dict[str, Any] = {
        "source": seer.name,
        "read_with": {"transformers": transformers.__version__, "torch": torch.__version__},
        "tolerance": TOLERANCE,
        "max_logit_difference": max(case.logit_difference for case in cases),
        "max_pixel_difference": max(case.pixel_difference for case in cases),
        "equal_prompts": sum(case.same_ids for case in cases),
        "equal_answers": sum(case.same_answer for case in cases),
        "conversations": len(cases),
        "cases": [asdict(case) for case in cases],
    }
    path = folder / "parity.json"
    path.write_text(json.dumps(receipt, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return path


def _complaint(case: Case) -> str:
    what = [
        "other prompt tokens" if not case.same_ids else "",
        f"pixels differ by {case.pixel_difference:.2g}" if case.pixel_difference > 1e-5 else "",
        f"logits differ by {case.logit_difference:.2g} (largest logit {case.largest_logit:.3g})",
        "another greedy answer" if not case.same_answer else "",
    ]
    return f"{case.question!r}: " + ", ".join(part for part in what if part)


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for question, answer in conversation.history:
        messages += [_message(question), {"role": "assistant", "content": answer}]
    return [*messages, _message(conversation.question)]


def _message(question: str) -> dict[str, Any]:
    """Return the user's message; pictures as content parts where that says the same as the text."""
    count, text = question.count(IMAGE_MARKER), without_markers(question)
    if not count or question != with_markers(text, count):
        return {"role": "user", "content": question}
    parts: list[dict[str, Any]] = [*[{"type": "image"}] * count, *([{"type": "text", "text": text}] if text else [])]
    return {"role": "user", "content": parts}


def _run_logits(seer: Seer, conversation: Conversation, answer: list[int]) -> Float[Tensor, "tokens vocab"]:
    decoder, head = language_parts(seer.model)
    with answering(seer.model):
        embeddings, _ = left_padded(seer, [prepare(seer, conversation)])
        tail = seer.model.get_input_embeddings()(torch.tensor([answer[:-1]], device=embeddings.device).long())
        hidden = decoder(inputs_embeds=torch.cat([embeddings, tail], 1), use_cache=False).last_hidden_state
        return head(hidden[0]).float()


@torch.inference_mode()
def _export_logits(model: Any, inputs: Any, answer: list[int]) -> Float[Tensor, "tokens vocab"]:
    tail = torch.tensor([answer[:-1]], device=model.device).long()
    ids = torch.cat([inputs["input_ids"], tail], 1)
    return model(input_ids=ids, pixel_values=inputs.get("pixel_values"), use_cache=False).logits[0].float()


@torch.inference_mode()
def _export_answer(model: Any, inputs: Any) -> list[int]:
    written = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return written[0, inputs["input_ids"].shape[1] :].tolist()


def _pixel_difference(seer: Seer, conversation: Conversation, pixels: Tensor | None) -> float:
    if not conversation.images or pixels is None:
        return 0.0 if not conversation.images and pixels is None else float("inf")
    assert seer.image_processor is not None, "an export has eyes"
    ours = torch.stack([seer.image_processor(image) for image in conversation.images])
    return (ours - pixels.cpu()).abs().max().item() if ours.shape == pixels.shape else float("inf")


def _gradient(width: int, height: int) -> Image.Image:
    """Return a picture in which every place looks different, so that a wrong crop or pad shows."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [columns * 255 // width, rows * 255 // height, (rows * 7 + columns * 3) % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))
