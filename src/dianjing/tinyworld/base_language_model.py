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

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dianjing.constants import IGNORE_INDEX
from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
from dianjing.data.record import Record, Turn
from dianjing.data.template import get_template
from dianjing.tinyworld.grammar import CHINESE, Question
from dianjing.tinyworld.scene import allowed_pairs, sample_scene
from dianjing.tinyworld.wording import text_dialogue, told_dialogue

TEMPLATE = "internlm2_chat"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 1024
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


CYCLES = (Cycle(seed=1, peak=1.5e-3, steps=19_000), Cycle(seed=2, peak=7e-4, steps=21_000))
"""The second, gentler cycle is what relations needed: 0.84 of them right after the first."""


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
        num_image_tokens=1,
        max_tokens=10_000,
        on_long_record="error",
        image_token_id=image_token_id(tokenizer),
    )


def encode_dialogue(encoder: Encoder, turns: list[Question]) -> tuple[list[int], list[int], list[str]]:
    """Encode a dialogue into at most MAX_TOKENS ids and labels; also return the type of each turn kept."""
    for kept in range(len(turns), 0, -1):
        record = Record(
            id="",
            images=(),
            turns=tuple(Turn(question=turn.text, answer=turn.answer) for turn in turns[:kept]),
            types=(),
            source="",
            index=0,
        )
        example = encoder.encode(record)
        if len(example.input_ids) <= MAX_TOKENS:
            return example.input_ids, example.labels, [turn.type for turn in turns[:kept]]
    raise ValueError(f"one turn is longer than {MAX_TOKENS} tokens: {turns[0]}")


def make_dialogues(folder: str, seed: int, number: int, told_only: bool) -> tuple[Tensor, Tensor, list[list[str]]]:
    """Draw and encode dialogues: ids and labels (number, MAX_TOKENS) right-padded, int16; types of the turns."""
    encoder, rng, pairs = text_encoder(Path(folder)), random.Random(seed), allowed_pairs("any")
    ids = torch.zeros(number, MAX_TOKENS, dtype=torch.int16)
    labels = torch.full((number, MAX_TOKENS), IGNORE_INDEX, dtype=torch.int16)
    types = []
    for row in range(number):
        scene = sample_scene(rng, pairs)
        dialogue = told_dialogue(rng, scene, rng.randint(3, 8)) if told_only else text_dialogue(rng, scene)
        input_ids, targets, kept = encode_dialogue(encoder, dialogue)
        ids[row, : len(input_ids)] = torch.tensor(input_ids)
        labels[row, : len(targets)] = torch.tensor(targets)
        types.append(kept)
    return ids, labels, types


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


def _batches(ids: Tensor, labels: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    while True:
        for rows in torch.randperm(len(ids), generator=generator, device=ids.device).split(batch):
            if len(rows) == batch:
                yield ids[rows].long(), labels[rows].long()


def train_language_model(
    folder: Path, workers: Executor, *, cycle: Cycle, dialogues: int, batch: int = 256
) -> dict[str, float]:
    """Train for one cycle, from the weights in `folder` if there are any, and save them as bf16 safetensors.

    Returns:
        share of answers right, by question type and "all", the scene being told in words.
    """
    shards = 64
    jobs = [
        workers.submit(make_dialogues, str(folder), cycle.seed * 1000 + shard, dialogues // shards, False)
        for shard in range(shards)
    ]
    parts = [job.result() for job in jobs]
    ids, labels = (torch.cat([part[k] for part in parts]).to(DEVICE) for k in (0, 1))
    torch.manual_seed(cycle.seed)
    if (folder / "model.safetensors").exists():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    else:
        model = LlamaForCausalLM(_config(len(load_tokenizer(folder)))).to(DEVICE)
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
    stream = _batches(ids, labels, batch, cycle.seed)
    for step in range(cycle.steps):
        input_ids, targets = next(stream)
        with torch.autocast(DEVICE, torch.bfloat16):  # causal and right-padded: no mask is needed
            loss = step_model(input_ids=input_ids, labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 1000 == 0 or step == cycle.steps - 1:
            print(f"language model: step {step}/{cycle.steps} loss {loss.item():.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    return score_language_model(folder, seed=10**6)


@torch.no_grad()
def score_language_model(folder: Path, *, seed: int, number: int = 2000) -> dict[str, float]:
    """Return the share of answers that greedy decoding gets wholly right, by type and "all".

    An answer is right when each of its tokens is the most likely one given the right ones before it,
    which is when greedy decoding would write exactly this answer.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    ids, labels, types = make_dialogues(str(folder), seed, number, True)
    right, total = Counter(), Counter()
    for start in range(0, number, 200):
        rows = slice(start, start + 200)
        guess = model(input_ids=ids[rows].long().to(DEVICE), use_cache=False).logits.argmax(-1).cpu()
        for row_guess, row_labels, row_types in zip(guess, labels[rows], types[rows], strict=True):
            supervised = row_labels != IGNORE_INDEX
            starts = (supervised & ~supervised.roll(1)).nonzero().flatten().tolist()
            for begin, type_ in zip(starts, row_types, strict=True):
                end = begin + int((~supervised[begin:]).int().argmax())
                same = bool((row_guess[begin - 1 : end - 1] == row_labels[begin:end]).all())
                right[type_] += same
                total[type_] += 1
    scores = {type_: right[type_] / total[type_] for type_ in sorted(total)}
    return {**scores, "all": sum(right.values()) / sum(total.values())}
