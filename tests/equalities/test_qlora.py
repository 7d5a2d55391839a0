"""A QLoRA run that goes on from a checkpoint ends with the bits of one that was never stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dianjing.run.checkpoint import newest
from dianjing.run.layout import checkpoints
from dianjing.train.loop import train
from tests.conftest import MakeRecipe
from tests.recipe_models import write_family

pytest.importorskip("bitsandbytes", reason="four-bit weights need bitsandbytes: pip install 'dianjing[qlora]'")


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an LLM whose rows are whole blocks of NF4."""
    return write_family(tmp_path_factory.mktemp("tiny_llm"), "internlm2")


def learned(run: Path) -> dict[str, bytes]:
    """Return what a run ended with: weights, the optimizer's memory and the place in the data."""
    return {path.name: path.read_bytes() for path in newest(run).iterdir() if path.name != "manifest.json"}


def test_a_resumed_run_is_a_straight_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    lora = {"tuning": "lora", "lora_dropout": 0.1}
    recipe = make_recipe(
        "finetune",
        language_model={**lora, "quantization": "nf4", "lora_head": True, "lora_share_qkv": True},
        vision_tower=lora,
        train={"global_batch_size": 3, "save_every": 1, "gradient_checkpointing": "on"},
    )
    # Sample answers on the way must leave the four bits as they are.
    answering = replace(recipe.train, sample_every=2, sample_path=str(recipe.data.path), sample_count=1)
    straight = train(replace(recipe, train=answering, output=str(tmp_path / "straight")), quiet=True)
    again = train(replace(recipe, output=str(tmp_path / "again")), quiet=True)
    assert learned(straight) == learned(again), "the control: two straight runs, one without answers"
    before_last, run = checkpoints(straight)[-2], tmp_path / "resumed"
    shutil.copytree(before_last, run / "checkpoints" / before_last.name)
    train(replace(recipe, output=str(run)), resume=True, quiet=True)
    assert learned(run) == learned(straight)
