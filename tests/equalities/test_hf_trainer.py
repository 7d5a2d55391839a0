"""The loop learns what transformers' own Trainer learns from the same records, padded, with upstream's own loss."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from dianjing.config.schema import Recipe
from dianjing.constants import IGNORE_INDEX
from dianjing.data.dataset import Dataset, open_dataset
from dianjing.model.build import build
from dianjing.model.stage import apply_stage
from dianjing.model.weights import trainable_state
from dianjing.run.checkpoint import newest
from dianjing.run.journal import read_journal
from dianjing.train.loop import train
from dianjing.train.optim import learning_rate_factor, make_optimizer

STEPS = 6
BATCH = 4
PADDING = 2
"""Any token but the one that marks a picture: upstream counts those."""
TRAIN = {"global_batch_size": BATCH, "epochs": 99, "max_steps": STEPS, "warmup_ratio": 0.4, "save_every": 2}


class Oracle(Trainer):
    """A Trainer that takes the records as they come, and saves the names that it will load."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # With the default, the names of the hub, which a resumed Trainer drops in silence.
        self.model.save_pretrained(output_dir, save_original_format=False)  # pyright: ignore


def padded(dataset: Dataset, indices: list[int], image_token_id: int) -> dict[str, Tensor]:
    """Return the records as a rectangle, padded on the right, as upstream's forward wants them."""
    examples = [dataset.example(index) for index in indices]
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    input_ids = pad_sequence(ids, batch_first=True, padding_value=PADDING)
    return {
        "input_ids": input_ids.masked_fill(input_ids == dataset.encoder.image_token_id, image_token_id),
        "attention_mask": mask,
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "pixel_values": dataset.batch(indices).pixel_values,
    }


def upstream(recipe: Recipe, folder: Path) -> Oracle:
    built = build(recipe)
    apply_stage(built.model, recipe)
    model: LlavaForConditionalGeneration = built.model
    model.set_attn_implementation("sdpa")
    dataset = open_dataset(recipe.data, built.encoder, built.image_processor)
    # Upstream embeds the marked places too, so the mark must be of the vocabulary: <unk>, which no record has.
    mark = built.tokenizer.unk_token_id
    assert isinstance(mark, int)
    model.config.image_token_id = mark
    model.config.use_cache = model.config.text_config.use_cache = False
    optimizer = make_optimizer(model, recipe)
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"]
    ratio = recipe.train.warmup_ratio
    return Oracle(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH,
            num_train_epochs=STEPS * BATCH / dataset.num_records,
            max_grad_norm=recipe.train.clip_norm,
            logging_steps=1,
            save_strategy="steps",
            save_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=range(dataset.num_records),  # pyright: ignore[reportArgumentType]
        data_collator=lambda indices: padded(dataset, indices, mark),
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(step, STEPS, ratio))),
    )


@pytest.fixture(params=["pretrain", "finetune"])
def recipe(request: pytest.FixtureRequest, make_recipe: Any) -> Recipe:
    lora = {"tuning": "lora"} if request.param == "finetune" else {}
    return make_recipe(
        request.param,
        language_model={**lora, "learning_rate": 3e-4},
        vision_tower=lora,
        data={"order": "sequential"},
        train=TRAIN,
    )


def test_the_loop_equals_the_trainer(recipe: Recipe, tmp_path: Path) -> None:
    trainer = upstream(recipe, tmp_path / "upstream")
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    run = train(replace(recipe, output=str(tmp_path / "run")), quiet=True)
    for row, expected in zip(read_journal(run), logged, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=2e-4)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert_same(load_file(newest(run) / "trainable.safetensors"), trainable_state(trainer.model))


def assert_same(learned: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert learned.keys() == expected.keys()
    for name, weight in expected.items():
        # Softmax takes a key's bias out again: its gradient is rounding, which AdamW makes as large as any other.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(learned[name], weight, atol=2e-5, rtol=1e-3)


def test_the_trainer_resumed_equals_the_loop_resumed(make_recipe: Any, tmp_path: Path) -> None:
    """Trained in full, where the stock Trainer goes on from the weights that the process began with."""
    full = {"tuning": "full"}
    recipe = make_recipe("finetune", language_model=full, vision_tower=full, data={"order": "sequential"}, train=TRAIN)
    upstream(recipe, tmp_path / "upstream").train()
    shutil.rmtree(tmp_path / "upstream" / "checkpoint-6")
    resumed = upstream(recipe, tmp_path / "upstream")
    resumed.train(resume_from_checkpoint=str(tmp_path / "upstream" / "checkpoint-4"))
    run = train(recipe, quiet=True)
    shutil.rmtree(newest(run))
    train(recipe, resume=True, quiet=True)
    assert_same(load_file(newest(run) / "trainable.safetensors"), trainable_state(resumed.model))
