"""Questions and pictures -> answers: the one inference path behind chat, compare, eval and sample answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

from dianjing.config.schema import Recipe
from dianjing.constants import IMAGE_MARKER
from dianjing.data.encode import Encoder
from dianjing.errors import DataError
from dianjing.infer.answering import answering
from dianjing.infer.pictures import SeenPicture, look
from dianjing.infer.slots import Pack
from dianjing.infer.writing import Writing
from dianjing.layers.attention import PACKED
from dianjing.model.forward import embed
from dianjing.pictures.image import ImageProcessor
from dianjing.pictures.rule import PLAIN, PictureRule

MAX_NEW_TOKENS = 256
CPU_POSITIONS = 16384
"""Most positions (prompts and answers) that are worked on at once on a CPU, where more are not faster."""
OF_FREE_MEMORY = 0.4
"""Share of a GPU's free memory for keys and values."""
AT_ONCE = 256
"""Most answers written side by side."""
STEPS_ON_GPU, STEPS_ON_CPU = 16, 1
"""Tokens between two looks at which answers are complete."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to answer; `image_processor` is None for a model without eyes."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    image_processor: ImageProcessor | None
    recipe: Recipe | None = None
    """Of the run; None for a model folder that is not a run."""
    stop_ids: tuple[int, ...] = ()
    """More tokens that end an answer: those of an export's generation_config.json."""

    @property
    def picture_rule(self) -> PictureRule:
        """How the files of its pictures are read."""
        return self.image_processor.rule if self.image_processor else PLAIN

    @property
    def can_see(self) -> bool:
        """True if pictures are fed to the model."""
        return self.image_processor is not None

    @property
    def processor(self) -> ImageProcessor:
        """The image processor of a model that can see."""
        assert self.image_processor is not None, "a text-only model is not shown pictures"
        return self.image_processor


class Conversation(NamedTuple):
    """Earlier turns (question, answer), the question asked now, and all pictures in the order of their markers."""

    history: Sequence[tuple[str, str]]
    question: str
    images: Sequence[Image]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the default is greedy."""

    temperature: float = 0.0
    """0 = always the likeliest token."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0


GREEDY = Sampling()


def generate(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Return one answer for each conversation, in their order; batched, which changes nothing but the time.

    Pictures are not shown to a model without eyes: their markers are taken out of its questions.

    Raises:
        ValueError: a conversation has more or fewer pictures than markers.
    """
    return [text_of(loaded, ids) for ids in generate_ids(loaded, conversations, max_new_tokens, sampling)]


def generate_ids(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Return the token ids of each answer, with those that ended it."""
    return continue_prompts(loaded, [prepare(loaded, one) for one in conversations], max_new_tokens, sampling)


def continue_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
    finished: Callable[[int, list[int]], object] = lambda number, ids: None,
) -> list[list[int]]:
    """Return the token ids of each answer, with those that ended it; `finished` gets each as soon as it is complete."""
    prompts = _looked_at(loaded, prompts)
    stops = stop_sequences(loaded)
    answers: dict[int, list[int]] = {}
    for group in _groups([len(prompt.input_ids) for prompt in prompts], max_new_tokens):
        at_once = _slots_that_fit(loaded.model, len(prompts[group[0]].input_ids) + max_new_tokens)
        while waiting := [number for number in group if number not in answers]:
            at_once = min(at_once, len(waiting))
            writing = [prompts[number] for number in waiting]
            try:
                for row, ids in _answers(loaded, writing, max_new_tokens, sampling, stops, at_once):
                    answers[waiting[row]] = ids
                    finished(waiting[row], ids)
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                print(f"out of GPU memory with {at_once} questions at once; asking half of them", file=sys.stderr)
                at_once //= 2
                torch.cuda.empty_cache()
    return [answers[number] for number in range(len(prompts))]


def stream(
    loaded: LoadedModel,
    conversation: Conversation,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """Yield the pieces of one answer as they are written; joined they are what `generate` returns."""
    prompt = prepare(loaded, conversation)
    stops = stop_sequences(loaded)
    held_back = max(map(len, stops), default=0)
    tokens: list[int] = []
    shown = ""
    for _, token in _tokens(loaded, [prompt], max_new_tokens, sampling, stops, at_once=1, steps=1):
        if token is None:
            break
        tokens.append(token)
        text = _decode(loaded, tokens[: max(len(tokens) - held_back, 0)])
        # A character of several tokens is unreadable (U+FFFD) until its last one is there; a blank at the end
        # belongs to the answer only if something follows.
        ready = text.rstrip("\ufffd").strip()
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    if rest := text_of(loaded, tokens)[len(shown) :]:
        yield rest


def stop_sequences(loaded: LoadedModel) -> list[tuple[int, ...]]:
    """Return the token sequences that end an answer: the tokenizer's EOS and what the template ends a turn with."""
    template, tokenizer = loaded.encoder.template, loaded.tokenizer
    words = [*template.stop_words, *([template.suffix] if template.suffix else [])]
    ends = {tuple(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in words}
    eos: Any = tokenizer.eos_token_id
    return sorted(ends | {(stop,) for stop in loaded.stop_ids} | (set() if eos is None else {(eos,)}))


class Prompt(NamedTuple):
    """Input of the model: token ids, each picture as its image tokens, and the pictures."""

    input_ids: list[int]
    images: Sequence[Image | SeenPicture]


def prepare(loaded: LoadedModel, conversation: Conversation) -> Prompt:
    """Return the input for a conversation: what training saw up to the answer.

    Raises:
        ValueError: the conversation has more or fewer pictures than markers.
        DataError: it is longer than the model can read.
    """
    return prompt_of(loaded, *conversation)


def prompt_of(
    loaded: LoadedModel, history: Sequence[tuple[str, str]], question: str, images: Sequence[Image | SeenPicture]
) -> Prompt:
    """Return the input for a conversation as `prepare` does; its pictures may have been looked at."""
    if not loaded.can_see:
        history = [(_blind(asked), answer) for asked, answer in history]
        question, images = _blind(question), ()
    input_ids, markers = loaded.encoder.prompt(
        list(history), question, [(image.height, image.width) for image in images]
    )
    if markers != len(images):
        raise ValueError(f"the conversation has {markers} {IMAGE_MARKER} markers but {len(images)} pictures")
    limit = loaded.model.config.get_text_config().max_position_embeddings
    if len(input_ids) >= limit:
        raise DataError(
            f"the conversation takes {len(input_ids)} positions, pictures included, but {loaded.name} reads {limit}; "
            "ask less, show fewer pictures, or start a new conversation"
        )
    return Prompt(input_ids, images)


def _blind(question: str) -> str:
    return question.replace(IMAGE_MARKER, "").strip() if IMAGE_MARKER in question else question


def _looked_at(loaded: LoadedModel, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Return the prompts with their pictures looked at; one that is asked about twice is looked at once."""
    if not loaded.can_see:
        return prompts
    seen = iter(look(loaded.model, loaded.processor, [image for prompt in prompts for image in prompt.images]))
    return [prompt._replace(images=[next(seen) for _ in prompt.images]) for prompt in prompts]


def _slots_that_fit(model: PreTrainedModel, room: int) -> int:
    """Return how many answers of `room` positions can be written at once: on a GPU by its free memory."""
    if model.device.type != "cuda":
        return max(1, CPU_POSITIONS // room)
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * heads * size * model.dtype.itemsize
    return min(max(1, int(OF_FREE_MEMORY * free / (cached * room))), AT_ONCE)


def _groups(lengths: Sequence[int], max_new_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of prompts, longest first, cut where half the room of a slot would be left empty."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if group and 2 * (lengths[number] + max_new_tokens) <= lengths[group[0]] + max_new_tokens:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _answers(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    stops: Sequence[tuple[int, ...]],
    at_once: int,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (prompt, all ids of its answer) as answers are completed."""
    steps = STEPS_ON_GPU if loaded.model.device.type == "cuda" else STEPS_ON_CPU
    written: list[list[int]] = [[] for _ in prompts]
    for row, token in _tokens(loaded, prompts, max_new_tokens, sampling, stops, at_once, steps):
        if token is None:
            yield row, written[row]
        else:
            written[row].append(token)


def _tokens(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    stops: Sequence[tuple[int, ...]],
    at_once: int,
    steps: int,
) -> Iterator[tuple[int, int | None]]:
    """Yield (prompt, token) as tokens are chosen, (prompt, None) when an answer is complete.

    `at_once` answers are written side by side; tokens are read back from the device after every `steps` of them.
    """
    generator = torch.Generator(loaded.model.device).manual_seed(sampling.seed)
    writing = Writing(
        model=loaded.model,
        pack=lambda rows: pack(loaded, [prompts[row] for row in rows]),
        lengths=[len(prompt.input_ids) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        choose=partial(_choose, sampling=sampling, generator=generator),
        stops=stops,
        at_once=at_once,
    )
    return writing.run(steps)


def _choose(logits: Float[Tensor, "rows vocab"], sampling: Sampling, generator: torch.Generator) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


def pack(loaded: LoadedModel, prompts: Sequence[Prompt]) -> Pack:
    """Return the prompts' embeddings one behind the other, pictures in place."""
    model = loaded.model
    attention = model.config.get_text_config()._attn_implementation
    assert attention == PACKED, f"{attention} would let prompts of a pack see each other"
    flat = torch.tensor([token for prompt in prompts for token in prompt.input_ids], device=model.device)
    lengths = [len(prompt.input_ids) for prompt in prompts]
    images = [image for prompt in prompts for image in prompt.images]
    with answering(model):
        if not isinstance(model, LlavaForConditionalGeneration):
            return Pack(model.get_input_embeddings()(flat), lengths)
        positions = (flat == loaded.encoder.image_token_id).nonzero()[:, 0]
        seen = [picture.features for picture in look(model, loaded.processor, images)]
        none = torch.zeros(0, model.config.get_text_config().hidden_size, device=flat.device)
        return Pack(embed(model, flat, positions, torch.cat([none, *seen])[None]), lengths)


def text_of(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    """Return an answer's ids as text, without what ended it."""
    for stop in sorted(stop_sequences(loaded), key=len, reverse=True):
        if tuple(tokens[-len(stop) :]) == stop:
            tokens = tokens[: -len(stop)]
            break
    return _decode(loaded, tokens).strip()


def _decode(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
