"""Run and GGUF side by side: every tensor, then logits as transformers and llama.cpp compute them from the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from dianjing.constants import IMAGE_MARKER
from dianjing.data.record import with_markers, without_markers
from dianjing.data.template import text_ids
from dianjing.errors import ExportError
from dianjing.export.chat_template import jinja
from dianjing.export.gguf.chat import MEDIA, gguf_chat_template
from dianjing.export.gguf.file import ROUNDING, read_types, rounding
from dianjing.export.gguf.llama import IMAGE, Reply, Request, ask_llama
from dianjing.export.gguf.read import Pair, pair_logits, read_pair
from dianjing.export.gguf.text import ROPE_FACTORS, TEXT_FILE, architecture, text_name, text_state
from dianjing.export.gguf.vision import VISION_FILE, preprocessing_notes, vision_tensors
from dianjing.export.merge import merged_state
from dianjing.export.receipt import ANSWER_TOKENS, Case, Proof, logit_difference, run_logits
from dianjing.infer.answering import answering
from dianjing.infer.generate import Conversation, LoadedModel, generate_ids, prepare
from dianjing.model.forward import image_features

READ_TOLERANCE = 1e-2
"""Of logits read back: the projector's GELU is llama.cpp's, by tanh."""
LLAMA_TOLERANCE = {"f32": 1e-2, "f16": 2e-2, "bf16": 5e-2}
"""Of llama.cpp's logits, which also rounds what flows through the layers to the type of the weights."""
BLOCK_TOLERANCE = 2e-1
"""The same for types of blocks: it rounds to eight bits on the way."""
SAME_FEATURES = 0.99
"""Correlation of llama.cpp's features with the tower's, of pictures prepared as in training."""


def prove_pair(
    loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], kind: str, verify: bool
) -> Proof:
    """Return how the files, read back by transformers and with `verify` by llama.cpp, answer compared with the run.

    Raises:
        ExportError: a tensor is not the run's, or llama.cpp computes other features than the tower.
    """
    config: Any = loaded.model.config
    state, pair = merged_state(loaded.model), read_pair(folder)
    notes = [_check_tensors(pair, state, config, folder), *preprocessing_notes(config, loaded.processor)]
    answers = generate_ids(loaded, conversations, ANSWER_TOKENS)
    asked = list(zip(conversations, answers, strict=True))
    run = [run_logits(loaded, *one).cpu() for one in asked]
    rounded = [_pair_logits(loaded, pair, *one) for one in asked]
    cases: list[Case] = []
    if verify:
        cases, more = _llama_cases(loaded, folder, asked, run, rounded, kind)
        notes += more
    _load_exactly(pair, state, config)
    exact = [_pair_logits(loaded, pair, *one) for one in asked]
    for one, ours, read, kept in zip(asked, run, rounded, exact, strict=True):
        cases.append(_case(loaded, one, ours, kept, read, READ_TOLERANCE))
    if ties := sum(case.same_answer is None for case in cases):
        notes.append(
            f"{ties} of {len(cases)} greedy answers differ at near ties: the other token's logit is below the run's "
            "by no more than the tolerance of logits"
        )
    by = ", the files as llama.cpp computes them" if verify else ""
    compared = f"the files as transformers reads them, their rounding undone{by}, against the run"
    return Proof(cases=cases, notes=tuple(notes), compared=compared)


def prompt_text(loaded: LoadedModel, conversation: Conversation) -> str:
    """Return the prompt that the file's chat template writes, MEDIA standing for a picture.

    llama-server can place pictures only in front of a question, each followed by a newline; for a question that has
    them elsewhere this is what a program must send that writes prompts by itself.
    """
    tokenizer, template = loaded.tokenizer, loaded.encoder.template
    questions = [question for question, _ in conversation.history] + [conversation.question]
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    if not all(question == with_markers(*_parts(question)) for question in questions):
        contents = [question.replace(IMAGE_MARKER, MEDIA) for question in questions]
        return _render(jinja(template, bos, eos), contents, conversation)
    contents = [MEDIA * count + text for text, count in map(_parts, questions)]
    return _render(gguf_chat_template(template, bos, eos), contents, conversation)


def _parts(question: str) -> tuple[str, int]:
    return without_markers(question) if IMAGE_MARKER in question else question, question.count(IMAGE_MARKER)


def _render(chat_template: str, contents: Sequence[str], conversation: Conversation) -> str:
    messages: list[dict[str, str]] = []
    for content, (_, answer) in zip(contents, conversation.history, strict=False):
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": contents[-1]})
    rendered, _ = render_jinja_template([messages], chat_template=chat_template, add_generation_prompt=True)
    return str(rendered[0])


def _check_tensors(pair: Pair, state: Mapping[str, Tensor], config: Any, folder: Path) -> str:
    """Return how far rounding has moved the tensors; refuse one that is not the run's.

    The text file's are compared under transformers' names and in its order of rows, which it has found by itself.
    """
    kind = architecture(config.text_config)
    read_text = pair.text.state_dict()
    text, vision = text_state(state), vision_tensors(state, config)
    text_types, vision_types = read_types(folder / TEXT_FILE), read_types(folder / VISION_FILE)
    compared = [(name, read_text[_causal_name(name)], text[name], text_types[text_name(name, kind)]) for name in text]
    compared += [(name, pair.vision_tensors[name], vision[name], vision_types[name]) for name in vision]
    left_over = {*text_types} - {ROPE_FACTORS} - {text_name(name, kind) for name in text} | {*vision_types} - {*vision}
    if left_over:
        raise ExportError(f"GGUF: tensors that are not the run's were written: {', '.join(sorted(left_over))}")
    farthest: dict[Any, tuple[float, str]] = {}
    for name, read, written, stored in compared:
        error = rounding(read, written.cpu())
        if not error <= ROUNDING[stored]:
            raise ExportError(
                f"GGUF: {name} was read back with an error of {error:.2g} of its size, but rounding to {stored.name} "
                f"explains {ROUNDING[stored]:.2g}; a number too large for that type? Try --quantize f32"
            )
        farthest[stored] = max(farthest.get(stored, (0.0, "")), (error, name))
    worst = ", ".join(f"{stored.name} {error:.2g}" for stored, (error, _) in farthest.items())
    return f"{len(compared)} tensors read back; largest relative error (root mean square) by type: {worst}"


def _causal_name(live: str) -> str:
    """model.language_model.norm.weight -> model.norm.weight"""
    return live.replace("model.language_model.", "model.", 1)


@torch.no_grad()
def _load_exactly(pair: Pair, state: Mapping[str, Tensor], config: Any) -> None:
    """Put the run's own weights in place of the read ones: what still differs is not rounding."""
    text = pair.text.state_dict()
    for name, tensor in text_state(state).items():
        text[_causal_name(name)].copy_(tensor)
    pair.vision_tensors.update({name: tensor.cpu() for name, tensor in vision_tensors(state, config).items()})


Answered = tuple[Conversation, list[int]]
"""A conversation and the run's greedy answer to it."""


def _pair_logits(
    loaded: LoadedModel, pair: Pair, conversation: Conversation, answer: list[int]
) -> Float[Tensor, "tokens vocab"]:
    pixels = [loaded.processor(image) for image in conversation.images]
    ids = prepare(loaded, conversation).input_ids + answer[:-1]
    return pair_logits(pair, ids, loaded.encoder.image_token_id, pixels)


def _case(loaded: LoadedModel, asked: Answered, run: Tensor, read: Tensor, rounded: Tensor, tolerance: float) -> Case:
    """Return a case: `read` and its answer are judged, `rounded` is only reported."""
    conversation, answer = asked
    return Case(
        question=conversation.question,
        image_sizes=[image.size for image in conversation.images],
        same_ids=_template_ids(loaded, conversation) == prepare(loaded, conversation).input_ids,
        pixel_difference=None,
        logit_difference=logit_difference(run, read),
        largest_logit=run.abs().max().item(),
        same_answer=_same_answer(run, read, answer, tolerance),
        tolerance=tolerance,
        rounding_difference=logit_difference(run, rounded),
        rounded_same_answer=_greedy(rounded, answer) == answer,
    )


def _greedy(logits: Float[Tensor, "tokens vocab"], answer: Sequence[int]) -> list[int]:
    """Return the likeliest token at each place of an answer, given what stands before it in the answer."""
    return logits[-len(answer) :].argmax(-1).tolist()


def _same_answer(
    ours: Float[Tensor, "tokens vocab"], theirs: Float[Tensor, "tokens vocab"], answer: Sequence[int], tolerance: float
) -> bool | None:
    """Return whether both choose the same tokens of an answer; None where they differ at near ties only.

    Two tokens closer than the arithmetic's tolerance may change places: not a fault, and not an equality either.
    """
    if _greedy(theirs, answer) == _greedy(ours, answer):
        return True
    ours, largest = ours[-len(answer) :], ours.abs().max().item()
    chosen = theirs[-len(answer) :].argmax(-1, keepdim=True)
    lost = ours.max(-1).values - ours.gather(-1, chosen)[:, 0]
    return None if lost.max().item() <= tolerance * max(1.0, largest) else False


def _template_ids(loaded: LoadedModel, conversation: Conversation) -> list[int]:
    """Return the ids of the prompt that the file's chat template writes, by the run's tokenizer."""
    first, *others = prompt_text(loaded, conversation).split(MEDIA)
    ids = text_ids(loaded.tokenizer, first)
    for text in others:
        ids += [loaded.encoder.image_token_id] * loaded.encoder.picture_tokens() + text_ids(loaded.tokenizer, text)
    return ids


def _llama_cases(
    loaded: LoadedModel,
    folder: Path,
    asked: Sequence[Answered],
    run: Sequence[Tensor],
    rounded: Sequence[Tensor],
    kind: str,
) -> tuple[list[Case], list[str]]:
    """Return how llama.cpp answers from the files, and what it makes of pictures that it prepares itself.

    Judged are pictures prepared as in training, against the same files as transformers reads them: the same
    weights, rounded alike.
    """
    processor = loaded.processor

    def requests(prepared: bool) -> list[Request]:
        return [
            Request(
                prompt=prompt_text(loaded, conversation),
                pictures=[
                    np.asarray(processor.to_picture(processor(image)) if prepared else image)
                    for image in conversation.images
                ],
                answer=answer,
            )
            for conversation, answer in asked
        ]

    replies = ask_llama(folder / TEXT_FILE, folder / VISION_FILE, [*requests(True), *requests(False)])
    exact, own = replies[: len(asked)], replies[len(asked) :]
    _check_features(loaded, asked, exact)
    cases = [
        _llama_case(loaded, one, ours, read, reply, kind)
        for one, ours, read, reply in zip(asked, run, rounded, exact, strict=True)
    ]
    return cases, [_measured(asked, run, own)]


def _llama_case(loaded: LoadedModel, asked: Answered, run: Tensor, rounded: Tensor, reply: Reply, kind: str) -> Case:
    conversation, answer = asked
    ids = [
        IMAGE if token == loaded.encoder.image_token_id else token for token in prepare(loaded, conversation).input_ids
    ]
    logits = torch.tensor(reply.logits)
    run, rounded = run[-len(answer) :], rounded[-len(answer) :]
    largest = rounded.abs().max().item()
    tolerance = LLAMA_TOLERANCE.get(kind, BLOCK_TOLERANCE)
    return Case(
        question=conversation.question,
        image_sizes=[image.size for image in conversation.images],
        same_ids=reply.prompt_ids == ids,
        pixel_difference=None,
        logit_difference=logit_difference(rounded, logits),
        largest_logit=largest,
        same_answer=_same_answer(rounded, logits, answer, tolerance),
        tolerance=tolerance,
        rounding_difference=logit_difference(run, logits),
        rounded_same_answer=_greedy(logits, answer) == answer,
    )


def _check_features(loaded: LoadedModel, asked: Sequence[Answered], replies: Sequence[Reply]) -> None:
    """Refuse to go on where llama.cpp sees something else in the same picture."""
    model, processor = loaded.model, loaded.processor
    for (conversation, _), reply in zip(asked, replies, strict=True):
        if not conversation.images:
            continue
        pixels = torch.stack([processor(image) for image in conversation.images])
        with answering(model):
            ours = image_features(cast(Any, model), pixels.to(model.device)).flatten(0, 1).float().cpu()
        same = (
            np.corrcoef(ours.numpy().ravel(), reply.features.ravel())[0, 1]
            if ours.numel() == reply.features.size
            else 0.0
        )
        if not same > SAME_FEATURES:
            tower = cast(Any, model.config).vision_config.model_type
            known = (
                "; llama.cpp is known to compute CLIP towers wrongly (ggml-org/llama.cpp#25814): export as hf, use a "
                "SigLIP tower, or a llama.cpp that holds the correction"
            )
            raise ExportError(
                f"GGUF: the installed llama.cpp sees something else in a picture than the run: its features correlate "
                f"{same:.2f} with the tower's" + (known if tower == "clip_vision_model" else "")
            )


def _measured(asked: Sequence[Answered], run: Sequence[Tensor], replies: Sequence[Reply]) -> str:
    """Return what llama.cpp's own way to prepare pictures changes."""
    same, difference, count = 0, 0.0, 0
    for (conversation, answer), ours, reply in zip(asked, run, replies, strict=True):
        if conversation.images:
            logits = torch.tensor(reply.logits)
            count += 1
            same += _greedy(logits, answer) == answer
            difference = max(difference, logit_difference(ours[-len(answer) :], logits))
    return (
        f"pictures as they are, prepared by llama.cpp: {same} of {count} answers equal the run's, logits within "
        f"{difference:.2g}"
    )
