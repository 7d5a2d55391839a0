"""Answers a second at InternLM2-1.8B + CLIP-L/336 shapes: as `eval` asks, and by transformers' generate, in one run.

    python benchmarks/ask_speed.py [--questions 512] [--tokens 64] [--batches 64 128 256] [--tiny]

Weights are random; each question has a JPEG picture of its own, 640 x 480. Ours reads pictures from disk, generate has
them prepared in memory. Prints one JSON line a row, and which share of the answers is the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from train_inputs import make_inputs, recipe_of

from dianjing.infer.answering import answering
from dianjing.infer.answers import answer_questions
from dianjing.infer.generate import Conversation, LoadedModel, Prompt, generate_ids, pack, prepare
from dianjing.infer.pictures import PictureFiles
from dianjing.infer.questions import Question
from dianjing.model.build import build
from dianjing.model.compile import fuse_layers
from dianjing.model.forward import language_parts
from dianjing.pictures.picture import load_image

ASKED = ("What is this?", "How many things are there in the picture, and where?", "Describe the picture in a sentence.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens an answer")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256], help="of transformers' generate")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script on a CPU")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(chosen, Path(name))


def run(chosen: argparse.Namespace, work: Path) -> None:
    make_inputs(work, tiny=chosen.tiny)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = recipe_of(work, 1)
    built = build(recipe, device)
    model: Any = built.model
    model.to(device).requires_grad_(False)
    if device.type == "cuda":
        fuse_layers(model)
    loaded = LoadedModel(
        name="random",
        model=model,
        tokenizer=built.tokenizer,
        encoder=built.encoder,
        image_processor=built.image_processor,
        recipe=recipe,
    )
    names = sorted(path.name for path in (work / "images").iterdir())
    questions = [
        Question(
            id=str(i),
            turn=0,
            type="",
            text=f"<image>\n{ASKED[i % len(ASKED)]}",
            images=(names[i % len(names)],),
            reference="",
        )
        for i in range(chosen.questions)
    ]
    root = str(work / "images")

    def from_disk() -> list[str]:
        return answer_questions(loaded, questions, root, chosen.tokens)

    warm = questions[: min(32, len(questions))]
    answer_questions(loaded, warm, root, 4)
    _, seconds = timed(from_disk)
    report("dianjing, pictures from disk", seconds, chosen)
    changed = [replace(one, images=questions[i - 1].images) for i, one in enumerate(questions)]
    blank = [replace(one, text=one.text.replace("<image>\n", ""), images=()) for one in questions]

    def three_ways() -> None:
        files = PictureFiles(loaded)
        for asked in (questions, changed, blank):
            answer_questions(loaded, asked, root, chosen.tokens, files=files)

    _, seconds = timed(three_ways)
    report("dianjing, right picture, another one and none", seconds, chosen, times=3)
    pictures = {name: load_image(root, name) for name in {question.images[0] for question in questions}}
    asked = [Conversation((), question.text, [pictures[question.images[0]]]) for question in questions]
    ours, seconds = timed(lambda: generate_ids(loaded, asked, chosen.tokens))
    report("dianjing, pictures decoded", seconds, chosen)

    prompts = [prepare(loaded, conversation) for conversation in asked]
    pixels = torch.stack([loaded.processor(one.images[0]) for one in asked])
    for batch in chosen.batches:
        try:
            theirs, seconds = timed(lambda batch=batch: by_generate(loaded, prompts, pixels, chosen.tokens, batch))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(f"transformers' generate, batch {batch}: out of memory", flush=True)
            continue
        same = [a == b for a, b in zip(ours, theirs, strict=True)]
        apart = [widest_gap(loaded, prompts[i], ours[i], theirs[i]) for i in range(len(same)) if not same[i]][:64]
        report(
            f"transformers' generate, batch {batch}",
            seconds,
            chosen,
            same_answers=sum(same) / len(same),
            widest_gap_where_answers_part=max(apart, default=0.0),
        )


def widest_gap(loaded: LoadedModel, prompt: Prompt, ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Return how far apart the logits of two answers' first different tokens are, as a share of the logits' spread."""
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    decoder, head = language_parts(loaded.model)
    whole = Prompt([*prompt.input_ids, *ours[:at]], prompt.images)
    with answering(loaded.model):
        hidden = decoder(**pack(loaded, [whole]).arguments, use_cache=False).last_hidden_state[0, -1]
        logits = head(hidden).float()
    return float((logits[ours[at]] - logits[theirs[at]]).abs() / logits.std())


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def report(row: str, seconds: float, chosen: argparse.Namespace, times: int = 1, **more: float) -> None:
    found = {
        "row": row,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "answers_per_second": round(times * chosen.questions / seconds, 2),
        "seconds": round(seconds, 2),
        "new_tokens": chosen.tokens,
        **{name: round(value, 4) for name, value in more.items()},
    }
    print(json.dumps(found), flush=True)


def by_generate(
    loaded: LoadedModel, prompts: Sequence[Prompt], pixels: torch.Tensor, tokens: int, batch: int
) -> list[list[int]]:
    """Return greedy answers by transformers' own generate, in batches of prompts padded on the left, shortest first."""
    model: Any = loaded.model
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        longest = max(len(prompts[row].input_ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            own = torch.tensor(prompts[row].input_ids)
            ids[place, longest - len(own) :] = own
            mask[place, longest - len(own) :] = 1
        with answering(model):
            said = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                pixel_values=pixels[rows].to(model.device, model.dtype),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        answers.update(zip(rows, said[:, longest:].tolist(), strict=True))
    return [answers[row] for row in range(len(prompts))]


if __name__ == "__main__":
    main()
