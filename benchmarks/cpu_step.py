"""How fast a training step is on the tiny world: Dianjing against the padded way of plain transformers.

    python benchmarks/cpu_step.py [--rounds 7] [--steps 4] [--threads 2]

Both train the same model (same weights, same LoRA, same AdamW) on the same records in the same batches and order;
pictures are read by the same code and their time counts on both sides. The padded side is transformers'
LlavaForConditionalGeneration as it comes: rows padded on the right to the longest of the batch, attention_mask,
labels, its own loss, peft's own layers. Rounds alternate between the two, so that a busy machine slows both.
The losses of the first two steps must agree, or no figure is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import disable_progress_bar

from dianjing.config.load import load_recipe
from dianjing.config.schema import Recipe
from dianjing.constants import IGNORE_INDEX, IMAGE_MARKER
from dianjing.data.collate import Batch
from dianjing.data.dataset import Dataset, open_dataset, step_batches
from dianjing.data.order import epoch_order, step_indices
from dianjing.layers.lora import LoraLinear
from dianjing.model.build import Built, build
from dianjing.model.stage import apply_stage
from dianjing.tinyworld.grammar import LANGUAGES, ask_several
from dianjing.tinyworld.render import render
from dianjing.tinyworld.scene import sample_distinct
from dianjing.tinyworld.wording import FORMS, describe
from dianjing.train.memory import WithinMemory
from dianjing.train.optim import learning_rate_factor, make_optimizer, set_learning_rates
from dianjing.train.shards import start_engine
from dianjing.train.silent_failures import SilentFailures
from dianjing.train.step import Parts, take_step

RECIPE = "tinyworld_finetune"
BATCH_SIZE = 16
"""Records a step; LLaVA-1.5 and XTuner finetune with 16 on each GPU."""
RECORDS = 512
TEXT_ONLY_EVERY = 8
LONGEST_DIALOGUE = 8
LOSS_TOLERANCE = 1e-4
AT_STEP, TOTAL_STEPS = 100, 1000
"""Which step of a run the learning rate is taken from; it stays there."""


def write_records(folder: Path, seed: int = 3) -> Path:
    """Draw RECORDS scenes with 1 to 8 questions each; every eighth is told in words and has no picture."""
    rng = random.Random(seed)
    records = []
    for index, scene in enumerate(sample_distinct(rng, RECORDS, "train")):
        turns = ask_several(rng, scene, LANGUAGES[index % 2], rng.randint(1, LONGEST_DIALOGUE))
        record: dict[str, object] = {"id": f"{index:04d}"}
        opening = f"{IMAGE_MARKER}\n"
        if index % TEXT_ONLY_EVERY == 0:
            opening = describe(rng, scene, LANGUAGES[index % 2], rng.choice(FORMS)) + "\n"
        else:
            record["image"] = f"{index:04d}.png"
            render(scene, rng.getrandbits(32)).save(folder / f"{index:04d}.png")
        values = [(("human", turn.text), ("gpt", turn.answer)) for turn in turns]
        messages = [{"from": role, "value": value} for pair in values for role, value in pair]
        messages[0]["value"] = opening + messages[0]["value"]
        records.append({**record, "conversations": messages})
    path = folder / "records.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


Step = Callable[[list[int]], float]
"""Takes one optimizer step on these records; returns the mean loss over supervised tokens."""


def packed(recipe: Recipe, built: Built, dataset: Dataset) -> Step:
    """Return Dianjing's step: the one that `dianjing train` takes, data path included."""
    model, accelerator = built.model.train(), Accelerator(mixed_precision="no")
    parts = Parts(
        recipe=recipe,
        accelerator=accelerator,
        model=model,
        engine=start_engine(recipe, accelerator, model),
        dataset=dataset,
        silent_failures=SilentFailures(),
        within_memory=WithinMemory(model, recipe, accelerator, checkpointing=False, warn=print),
    )

    def step(indices: list[int]) -> float:
        (batches,) = step_batches(dataset, [indices], workers=0)
        return take_step(parts, AT_STEP, TOTAL_STEPS, batches, data_wait=0.0).loss

    return step


def padded(recipe: Recipe, built: Built, dataset: Dataset) -> Step:
    """Return plain transformers' step on the same records: a rectangle padded on the right, its own loss."""
    model, optimizer = built.model.train(), make_optimizer(built.model, recipe)
    set_learning_rates(optimizer, learning_rate_factor(AT_STEP - 1, TOTAL_STEPS, recipe.train.warmup_ratio))
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = PeftLinear  # as peft computes it
    # Upstream embeds the placeholder too, so it needs an id of the vocabulary: <unk>, which no text here has.
    model.config.image_token_id = built.tokenizer.unk_token_id
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def step(indices: list[int]) -> float:
        batch = dataset.batch(indices)
        input_ids, labels = rows(batch)
        mask = pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True)
        ids = pad_sequence(input_ids, batch_first=True, padding_value=built.tokenizer.pad_token_id)
        ids.view(-1)[mask.view(-1).nonzero().flatten()[batch.image_positions]] = model.config.image_token_id
        loss = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=batch.pixel_values if len(batch.pixel_values) else None,
            labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def rows(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return input_ids and labels of each record of a batch."""
    labels = torch.full_like(batch.input_ids, IGNORE_INDEX)
    labels[batch.target_rows + 1] = batch.targets
    sizes = batch.cu_seqlens.diff().tolist()
    return list(batch.input_ids.split(sizes)), list(labels.split(sizes))


def make_sides(recipe: Recipe) -> tuple[dict[str, Step], Dataset]:
    """Build the model twice from the same seed, once for each way, and open the data."""
    models = [build(recipe), build(recipe)]
    for built in models:
        apply_stage(built.model, recipe)
    dataset = open_dataset(recipe.data, models[0].encoder, models[0].image_processor)
    sides = {"dianjing": packed(recipe, models[0], dataset), "padded": padded(recipe, models[1], dataset)}
    return sides, dataset


def measure(sides: dict[str, Step], plan: list[list[int]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return samples per second of each side, one figure a round; both take the same steps, in turns."""
    for indices in plan[:2]:  # the second loss shows that the first update was the same
        ours, theirs = (step(indices) for step in sides.values())
        if abs(ours - theirs) > LOSS_TOLERANCE * theirs:
            raise SystemExit(f"the two ways do not compute the same: losses {ours:.6f} and {theirs:.6f}")
        print(f"same loss: {ours:.6f} and {theirs:.6f}")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        chosen = [plan[(2 + turn * steps + k) % len(plan)] for k in range(steps)]
        for name, step in sides.items():
            began = time.perf_counter()
            for indices in chosen:
                step(indices)
            if turn:  # the first round warms up
                rates[name].append(sum(map(len, chosen)) / (time.perf_counter() - began))
    return rates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each side in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = write_records(Path(folder))
        overrides: dict[str, object] = {
            "data.path": str(path),
            "data.images": folder,
            "projector.init_from": "",
            "output": folder,
        }
        overrides |= {"train.global_batch_size": BATCH_SIZE, "train.precision": "fp32"}
        recipe = load_recipe(RECIPE, overrides)
        sides, dataset = make_sides(recipe)
        lengths = sorted(dataset.lengths)
        print(f"{len(lengths)} records, {lengths[0]} to {lengths[-1]} positions, median {statistics.median(lengths)}")
        print(f"batch {BATCH_SIZE}, {options.threads} threads, torch {torch.__version__}")
        order = epoch_order(dataset.num_records, recipe.seed, 0, recipe.data.order)
        plan = [step_indices(order, step, BATCH_SIZE, 0, 1) for step in range(len(order) // BATCH_SIZE)]
        rates = measure(sides, plan, options.rounds, options.steps)
    for name, figures in rates.items():
        middle, low, high = statistics.median(figures), min(figures), max(figures)
        print(f"{name:9} {middle:7.1f} samples/s  (rounds {low:.1f} to {high:.1f})")
    ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    print(f"ratio     {ratio:7.2f}")


if __name__ == "__main__":
    main()
