"""Questions and pictures -> answers: the one inference path behind chat, compare, eval and sample answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerBase

from dianjing.config.schema import Recipe
from dianjing.constants import IMAGE_MARKER
from dianjing.data.encode import Encoder
from dianjing.errors import DataError
from dianjing.model.forward import arithmetic, embed, image_features
from dianjing.pictures.image import ImageProcessor
from dianjing.pictures.rule import PLAIN, PictureRule
from dianjing.pictures.threads import on_all_cores

MAX_NEW_TOKENS = 256
CPU_POSITIONS = 16384
"""Most positions (prompts, padding and answers) in one batch on a CPU, where larger batches are not faster."""
OF_FREE_MEMORY = 0.4
"""Share of a GPU's free memory that a batch may take by estimate; the rest is for attention and copies of the cache."""


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
    stops = stop_sequences(loaded)
    ids = generate_ids(loaded, conversations, max_new_tokens, sampling)
    return [_text(loaded, tokens, stops) for tokens in ids]


def generate_ids(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Return the token ids of each answer, with those that ended it."""
    prompts = [prepare(loaded, conversation) for conversation in conversations]
    stops = stop_sequences(loaded)
    written: list[list[int]] = [[] for _ in prompts]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    batches = [*_batches(lengths, max_new_tokens, _positions_that_fit(loaded.model))]
    while batches:
        rows = batches.pop(0)
        try:
            for row, token in _tokens(loaded, [prompts[i] for i in rows], max_new_tokens, sampling, stops):
                written[rows[row]].append(token)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            print(f"out of GPU memory with {len(rows)} questions at once; asking half of them", file=sys.stderr)
            half = len(rows) // 2
            batches = [rows[:half], rows[half:], *batches]
            written = [[] if i in rows else tokens for i, tokens in enumerate(written)]
            torch.cuda.empty_cache()
    return written


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
    for _, token in _tokens(loaded, [prompt], max_new_tokens, sampling, stops):
        tokens.append(token)
        text = _decode(loaded, tokens[: max(len(tokens) - held_back, 0)])
        # A character of several tokens is unreadable (U+FFFD) until its last one is there; a blank at the end
        # belongs to the answer only if something follows.
        ready = text.rstrip("\ufffd").strip()
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    if rest := _text(loaded, tokens, stops)[len(shown) :]:
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
    images: Sequence[Image]


def prepare(loaded: LoadedModel, conversation: Conversation) -> Prompt:
    """Return the input for a conversation: what training saw up to the answer.

    Raises:
        ValueError: the conversation has more or fewer pictures than markers.
        DataError: it is longer than the model can read.
    """
    history, question, images = conversation
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


def _positions_that_fit(model: PreTrainedModel) -> int:
    """Return how many positions a batch may have: on a GPU by its free memory."""
    if model.device.type != "cuda":
        return CPU_POSITIONS
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * heads * size
    passing = 8 * text.hidden_size + 3 * text.intermediate_size
    return max(CPU_POSITIONS, int(OF_FREE_MEMORY * free / ((cached + passing) * model.dtype.itemsize)))


def _batches(lengths: Sequence[int], max_new_tokens: int, positions: int) -> Iterator[list[int]]:
    """Yield groups of prompts of similar length, so that there is little padding."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * (lengths[i] + max_new_tokens) > positions:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _tokens(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    stops: Sequence[tuple[int, ...]],
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) as tokens are chosen; a row that has ended is taken out of the batch."""
    model = loaded.model
    decoder, head = language_parts(model)
    with answering(model):
        embeddings, attention_mask = left_padded(loaded, prompts)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config.get_text_config())
    generator = torch.Generator(embeddings.device).manual_seed(sampling.seed)
    rows = list(range(len(prompts)))
    tails: list[tuple[int, ...]] = [() for _ in rows]
    longest_stop = max(map(len, stops), default=1)
    for _ in range(max_new_tokens):
        with answering(model):
            hidden = decoder(
                inputs_embeds=embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            chosen = _choose(head(hidden[:, -1]).float(), sampling, generator)
        ids = chosen.tolist()
        yield from zip(rows, ids, strict=True)
        tails = [(*tail, token)[-longest_stop:] for tail, token in zip(tails, ids, strict=True)]
        going = [i for i, tail in enumerate(tails) if not any(tail[-len(stop) :] == stop for stop in stops)]
        if not going:
            return
        with answering(model):
            if len(going) < len(rows):
                kept = torch.tensor(going, device=chosen.device)
                cache.batch_select_indices(kept)
                chosen, attention_mask, position_ids = chosen[kept], attention_mask[kept], position_ids[kept]
                rows, tails = [rows[i] for i in going], [tails[i] for i in going]
            embeddings = model.get_input_embeddings()(chosen[:, None])
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], 1)
            position_ids = position_ids[:, -1:] + 1


def _choose(logits: Float[Tensor, "rows vocab"], sampling: Sampling, generator: torch.Generator) -> Tensor:
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


def language_parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Return the decoder without its head, and the head, of a LLaVA or of a text-only LLM."""
    llava = isinstance(model, LlavaForConditionalGeneration)
    decoder: Any = model.model.language_model if llava else model.get_decoder()
    head: Any = model.get_output_embeddings()
    return decoder, head


def left_padded(loaded: LoadedModel, prompts: Sequence[Prompt]) -> tuple[Float[Tensor, "rows longest hidden"], Tensor]:
    """Return the prompts' embeddings, pictures in place, and a (rows, longest) mask that is 0 on padding."""
    device = loaded.model.device
    flat = torch.tensor([token for prompt in prompts for token in prompt.input_ids], device=device)
    if isinstance(loaded.model, LlavaForConditionalGeneration):
        positions = (flat == loaded.encoder.image_token_id).nonzero()[:, 0]
        embedded = embed(loaded.model, flat, positions, _features(loaded, prompts))
    else:
        embedded = loaded.model.get_input_embeddings()(flat)
    lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts], device=device)
    longest = int(lengths.max())
    attention_mask = (torch.arange(longest, device=device) >= (longest - lengths)[:, None]).long()
    padded = embedded.new_zeros(len(prompts), longest, embedded.shape[-1])
    padded[attention_mask.bool()] = embedded
    return padded, attention_mask


def _features(loaded: LoadedModel, prompts: Sequence[Prompt]) -> Float[Tensor, "images patches hidden"]:
    """Return the features of all pictures of the batch; a picture asked about twice is looked at once."""
    processor, model = loaded.processor, loaded.model
    assert isinstance(model, LlavaForConditionalGeneration), "only a LLaVA sees"
    images = [image for prompt in prompts for image in prompt.images]
    distinct = {id(image): image for image in images}
    place = {key: number for number, key in enumerate(distinct)}
    pixels = torch.zeros(0, 3, processor.size, processor.size)
    if distinct:
        pixels = torch.stack(on_all_cores(processor, distinct.values()))
    return image_features(model, pixels.to(model.device))[[place[id(image)] for image in images]]


def _text(loaded: LoadedModel, tokens: Sequence[int], stops: Sequence[tuple[int, ...]]) -> str:
    for stop in sorted(stops, key=len, reverse=True):
        if tuple(tokens[-len(stop) :]) == stop:
            tokens = tokens[: -len(stop)]
            break
    return _decode(loaded, tokens).strip()


def _decode(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def answering(model: PreTrainedModel) -> Iterator[None]:
    """Compute without gradients or dropout, in the precision the model was built for; leave all as it was."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode(), arithmetic(cast(Any, model)):
            yield
    finally:
        if training:
            model.train()
