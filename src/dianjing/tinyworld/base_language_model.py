"""Train the tiny world's base chat LLM from scratch, on text alone (needs a GPU; minutes)."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dianjing.constants import IGNORE_INDEX, IMAGE_MARKER
from dianjing.data.encode import Encoder, Example, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.record import Record, Turn
from dianjing.data.template import get_template
from dianjing.tinyworld.grammar import CHINESE, Question
from dianjing.tinyworld.scene import PLACES, Scene, allowed_pairs, sample_scene
from dianjing.tinyworld.wording import gather, text_dialogue, told_dialogue

TEMPLATE = "internlm2_chat"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 1024
WORDS_IN_PHRASE = 6
"""Most tokens of a gathered phrase."""
MAX_TOKENS = 256
"""Longest text dialogue; longer ones lose their last turns."""

COMMON_WORDS = (
    "the of and to in is that it he was for on are as with his they at be this have from or one had by word but not "
    "what all were we when your can said there use an each which she do how their if will up other about out many then "
    "them these so some her would make like him into time has look two more write go see number no way could people my "
    "than first water been call who oil its now find long down day did get come made may part image picture shows "
    "likely using used person man woman wearing background appears looking light room white environment professional "
    "something between through because different important another question answer describe purpose equipment around "
    "could should their people being place great right still every found study also while during general during clear"
)
"""Everyday English, so that the vocabulary holds more than the grammar's own words."""


_HAN = re.compile("([\u4e00-\u9fff])")
"""Chinese is written without spaces; split by character, so that merges never run across words."""


@dataclass(frozen=True)
class Cycle:
    """One warm-up and decay of the learning rate, on dialogues of its own."""

    seed: int
    peak: float
    steps: int
    gathered: float = 0.0
    """Share of the dialogues whose description is gathered: each phrase at one position, its words added up."""


CYCLES = (
    Cycle(seed=1, peak=1.5e-3, steps=19_000),
    Cycle(seed=2, peak=7e-4, steps=21_000),
    Cycle(seed=3, peak=5e-4, steps=7_000, gathered=0.5),
)
"""The purpose of each: the second, gentler one for relations (0.84 of them right after the first); the third so
that a model of five million parameters reads several words at one position, as larger models do of themselves."""


def train_tokenizer(folder: Path, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the world's dialogues and save it as a Hugging Face fast tokenizer."""
    rng, pairs = random.Random(seed), allowed_pairs("any")
    lines = [COMMON_WORDS] * 20
    lines += [word for words in (CHINESE.colours, CHINESE.shapes, CHINESE.places) for word in words] * 1000
    for _ in range(20_000):
        for turn in text_dialogue(rng, sample_scene(rng, pairs)):
            lines += [part for text in (turn.text, turn.answer) for part in _HAN.split(text)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **marks,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return load_tokenizer(folder)


def text_encoder(folder: Path) -> Encoder:
    """Return the product's own encoder over the tiny tokenizer, for text-only records."""
    tokenizer = load_tokenizer(folder)
    return Encoder(
        tokenizer=tokenizer,
        template=get_template(TEMPLATE),
        picture_tokens=FixedCount(1),
        max_tokens=10_000,
        on_long_record="error",
        image_token_id=image_token_id(tokenizer),
    )


@dataclass(frozen=True)
class Dialogues:
    """Encoded dialogues, right-padded."""

    ids: Tensor
    """int16 (dialogues, MAX_TOKENS); a gathered phrase is one id, the first after the vocabulary."""
    labels: Tensor
    """int16 (dialogues, MAX_TOKENS)."""
    phrases: Tensor
    """int16 (dialogues, PLACES, WORDS_IN_PHRASE): the ids added up at the gathered positions, in order; -1 = none."""
    types: list[list[str]]
    """Question type of each turn."""


def _gathered_dialogue(rng: random.Random, scene: Scene) -> tuple[list[Question], list[str]]:
    phrases = gather(rng, scene)
    return told_dialogue(rng, scene, rng.randint(3, 8), IMAGE_MARKER * len(phrases)), phrases


def make_dialogues(folder: str, seed: int, number: int, gathered: float, told_only: bool) -> Dialogues:
    """Draw and encode dialogues; those longer than MAX_TOKENS lose their last turns.

    The encoder's picture marker stands for a gathered phrase here: one position whose embedding is not a token's.
    """
    encoder, rng, pairs = text_encoder(Path(folder)), random.Random(seed), allowed_pairs("any")
    ids = torch.zeros(number, MAX_TOKENS, dtype=torch.int16)
    labels = torch.full((number, MAX_TOKENS), IGNORE_INDEX, dtype=torch.int16)
    phrases = torch.full((number, PLACES, WORDS_IN_PHRASE), -1, dtype=torch.int16)
    types = []
    for row in range(number):
        scene, said = sample_scene(rng, pairs), []
        if rng.random() < gathered:
            dialogue, said = _gathered_dialogue(rng, scene)
        elif told_only:
            dialogue = told_dialogue(rng, scene, rng.randint(3, 8))
        else:
            dialogue = text_dialogue(rng, scene)
        example, kept = _encode_dialogue(encoder, dialogue, len(said))
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
        for place, phrase in enumerate(said):
            words = encoder.tokenizer(phrase, add_special_tokens=False).input_ids
            phrases[row, place, : len(words)] = torch.tensor(words)
        types.append([turn.type for turn in dialogue[:kept]])
    return Dialogues(ids, labels, phrases, types)


def _encode_dialogue(encoder: Encoder, turns: list[Question], markers: int) -> tuple[Example, int]:
    """Encode as many turns as fit MAX_TOKENS; also return how many those are."""
    for kept in range(len(turns), 0, -1):
        record = Record(
            id="",
            images=("",) * markers,
            turns=tuple(Turn(question=turn.text, answer=turn.answer) for turn in turns[:kept]),
            types=(),
            source="",
            index=0,
        )
        example = encoder.encode(record)
        if len(example.input_ids) <= MAX_TOKENS:
            return example, kept
    raise ValueError(f"one turn is longer than {MAX_TOKENS} tokens: {turns[0]}")


def embed(model: LlamaForCausalLM, ids: Tensor, phrases: Tensor) -> Tensor:
    """Return the embeddings of dialogues, (batch, tokens, hidden); a gathered phrase is the sum of its words'."""
    table = cast(nn.Embedding, model.get_input_embeddings())
    words = table(ids.clamp(max=table.num_embeddings - 1))
    sums = (table(phrases.clamp(min=0)) * (phrases >= 0).unsqueeze(-1)).sum(2)  # (batch, places, hidden)
    gathered = (ids >= table.num_embeddings).unsqueeze(-1)
    order = (gathered.long().cumsum(1) - 1).clamp(min=0).expand(-1, -1, words.shape[-1])
    return torch.where(gathered, sums.gather(1, order), words)


def _config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=SPECIALS.index("<s>"),
        eos_token_id=SPECIALS.index("<|im_end|>"),
        pad_token_id=SPECIALS.index("</s>"),
        attention_dropout=0.0,
    )


def _batches(parts: list[Dialogues], batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids, labels and phrases of random batches, for ever."""
    ids, labels, phrases = (
        torch.cat([getattr(part, name) for part in parts]).to(DEVICE) for name in ("ids", "labels", "phrases")
    )
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    while True:
        for rows in torch.randperm(len(ids), generator=generator, device=DEVICE).split(batch):
            if len(rows) == batch:
                yield ids[rows].long(), labels[rows].long(), phrases[rows].long()


def train_language_model(
    folder: Path, workers: Executor, *, cycle: Cycle, dialogues: int, batch: int = 256
) -> dict[str, float]:
    """Train for one cycle, from the weights in `folder` if there are any, and save them as bf16 safetensors.

    Returns:
        share of answers right, by question type and "all", the scene told in words; and "gathered".
    """
    shards = 64
    jobs = [
        workers.submit(
            make_dialogues, str(folder), cycle.seed * 1000 + shard, dialogues // shards, cycle.gathered, False
        )
        for shard in range(shards)
    ]
    stream = _batches([job.result() for job in jobs], batch, cycle.seed)
    torch.manual_seed(cycle.seed)
    model: Any  # transformers' .to() is typed as if it could not be called
    if (folder / "model.safetensors").exists():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(_config(len(load_tokenizer(folder))))
    model.to(DEVICE)
    step_model = torch.compile(model)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=cycle.peak,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cycle.peak, total_steps=cycle.steps, pct_start=0.05)
    for step in range(cycle.steps):
        ids, labels, phrases = next(stream)
        with torch.autocast(DEVICE, torch.bfloat16):  # causal and right-padded: no mask is needed
            loss = step_model(inputs_embeds=embed(model, ids, phrases), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 1000 == 0 or step == cycle.steps - 1:
            print(f"language model: step {step}/{cycle.steps} loss {loss.item():.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    gathered = {"gathered": score_language_model(folder, gathered=1.0)["all"]} if cycle.gathered else {}
    return {**score_language_model(folder), **gathered}


@torch.no_grad()
def score_language_model(
    folder: Path, *, gathered: float = 0.0, seed: int = 10**6, number: int = 2000
) -> dict[str, float]:
    """Return the share of answers that greedy decoding gets wholly right, by type and "all".

    An answer is right when each of its tokens is the most likely one given the right ones before it,
    which is when greedy decoding would write exactly this answer.
    """
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(DEVICE).eval()
    described = make_dialogues(str(folder), seed, number, gathered, True)
    right, total = Counter(), Counter()
    for start in range(0, number, 200):
        rows = slice(start, start + 200)
        embeddings = embed(model, described.ids[rows].long().to(DEVICE), described.phrases[rows].long().to(DEVICE))
        guess = model(inputs_embeds=embeddings, use_cache=False).logits.argmax(-1).cpu()
        for row_guess, row_labels, row_types in zip(guess, described.labels[rows], described.types[rows], strict=True):
            supervised = row_labels != IGNORE_INDEX
            starts = (supervised & ~supervised.roll(1)).nonzero().flatten().tolist()
            for begin, type_ in zip(starts, row_types, strict=True):
                end = begin + int((~supervised[begin:]).int().argmax())
                same = bool((row_guess[begin - 1 : end - 1] == row_labels[begin:end]).all())
                right[type_] += same
                total[type_] += 1
    scores = {type_: right[type_] / total[type_] for type_ in sorted(total)}
    return {**scores, "all": sum(right.values()) / sum(total.values())}
