"""The probe set: what it measures, that it changes nothing, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dianjing.config.load import load_recipe, save_recipe
from dianjing.data.dataset import open_dataset
from dianjing.errors import ConfigError, DataError
from dianjing.model.build import build
from dianjing.model.forward import forward_loss
from dianjing.run.checkpoint import best, newest, read_state
from dianjing.run.journal import read_journal
from dianjing.run.layout import checkpoints
from dianjing.train.loop import train
from dianjing.train.probe import probe_set, probes_of, sight_gap, steps_between, verdict

LORA = {"tuning": "lora", "lora_dropout": 0.1}


@pytest.fixture
def held_out(tiny_dataset: Any, tmp_path: Path) -> str:
    """Two records about pictures of the data set, with answers that are not in it."""
    turns = [{"from": "human", "value": "<image>\nWhich one?"}, {"from": "gpt", "value": "Another one."}]
    records = [{"id": name, "image": name, "conversations": turns} for name in ("wide.png", "tall.jpg")]
    (tmp_path / "held_out.json").write_text(json.dumps(records))
    return str(tmp_path / "held_out.json")


def test_the_losses_are_those_of_the_records_alone(make_recipe: Any) -> None:
    recipe = make_recipe()
    built = build(recipe)
    dataset = open_dataset(recipe.data, built.encoder, built.image_processor)
    records = [dataset.records[index] for index, pictures in enumerate(dataset.pictures) if pictures]
    model = built.model.eval()
    found = probe_set(records, dataset).losses(lambda batch: forward_loss(model, batch), torch.device("cpu"))
    with torch.no_grad():
        batches = [dataset.batch_of([record]) for record in records]
        alone = sum(float(forward_loss(model, batch)) for batch in batches) / sum(b.num_supervised for b in batches)
    assert found["right"] == pytest.approx(alone, rel=1e-5)
    assert abs(found["other"] - found["right"]) > 1e-4, "the pictures are others"
    assert abs(found["none"] - found["right"]) > 1e-4


def test_one_picture_alone_has_no_other(make_recipe: Any) -> None:
    recipe = make_recipe()
    built = build(recipe)
    dataset = open_dataset(recipe.data, built.encoder, built.image_processor)
    record = next(record for record in dataset.records if len(record.images) == 1)
    assert probe_set([record, replace(record, id="again")], dataset).packs.keys() == {"right", "none"}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_probe_changes_nothing(make_recipe: Any, tmp_path: Path, held_out: str, stage: str) -> None:
    tuned = {} if stage == "pretrain" else {"language_model": LORA, "vision_tower": LORA}
    recipe = make_recipe(stage, train={"epochs": 3, "probe_every": 0}, **tuned)
    plain = train(recipe, quiet=True)
    probed = replace(
        recipe,
        output=str(tmp_path / "probed"),
        train=replace(recipe.train, probe_every=1),
        data=replace(recipe.data, held_out=held_out),
    )
    run = train(probed, quiet=True)
    weights = [(newest(folder) / "trainable.safetensors").read_bytes() for folder in (plain, run)]
    assert weights[0] == weights[1]
    assert [row["loss"] for row in read_journal(plain)] == [row["loss"] for row in read_journal(run)]
    probes = probes_of(read_journal(run))
    assert [found["step"] for found in probes] == list(range(7))
    assert all({"right", "other", "none"} <= found[name].keys() for found in probes for name in ("train", "held_out"))
    assert "sight gap" in (run / "loss.svg").read_text()
    assert not probes_of(read_journal(plain))


def test_the_checkpoint_of_the_lowest_held_out_loss_is_kept(make_recipe: Any, held_out: str) -> None:
    recipe = make_recipe(
        train={"epochs": 10, "save_every": 1, "keep": 1, "learning_rate": 0.05, "probe_every": -1},
        data={"held_out": held_out},
    )
    run = train(recipe, quiet=True)
    losses = {found["step"]: found["held_out"]["right"] for found in probes_of(read_journal(run)) if found["step"]}
    lowest = min(losses, key=lambda step: losses[step])
    kept = [read_state(checkpoint) for checkpoint in checkpoints(run)]
    assert {state.step for state in kept} == {lowest, 20}
    assert all(state.held_out_loss == losses[state.step] for state in kept)
    assert best(checkpoints(run)) == [run / "checkpoints" / f"step-{lowest:06d}"]


def test_a_run_ends_when_the_held_out_loss_does_not_fall_any_more(
    make_recipe: Any, held_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(
        train={"epochs": 50, "learning_rate": 0.5, "probe_every": 1, "stop_when": "no better for 4"},
        data={"held_out": held_out},
    )
    run = train(recipe)
    losses = {found["step"]: found["held_out"]["right"] for found in probes_of(read_journal(run))}
    end = max(losses)
    assert end < 100
    assert min(losses, key=lambda step: losses[step]) == end - 4
    assert read_state(newest(run)).step == end
    assert f"ended after step {end} of 100: no better for 4" in capsys.readouterr().err


@pytest.mark.parametrize(("stop_when", "words"), [("later", "no better for N"), ("no better for 5", "data.held_out")])
def test_when_to_stop_must_make_sense(make_recipe: Any, tmp_path: Path, stop_when: str, words: str) -> None:
    save_recipe(make_recipe(train={"stop_when": stop_when}), tmp_path / "recipe.toml")
    with pytest.raises(ConfigError, match=words):
        load_recipe(tmp_path / "recipe.toml")


def test_held_out_records_that_are_trained_on_are_refused(make_recipe: Any, tiny_dataset: Any) -> None:
    with pytest.raises(DataError, match="it is in the training data too, as "):
        train(make_recipe(data={"held_out": str(tiny_dataset.path)}, train={"probe_every": 1}), quiet=True)


def test_probes_take_a_hundredth_of_the_time() -> None:
    assert [steps_between(size, 1) for size in (1, 16, 256, 10**6)] == [1920, 120, 8, 1]
    assert steps_between(16, 2) == 240


def losses(right: float, other: float) -> dict[str, float]:
    return {"right": right, "other": other, "none": other}


def test_the_last_lines_say_how_much_the_pictures_matter() -> None:
    start = {"step": 0, "train": losses(3.0, 3.0)}
    (said,) = verdict([start, {"step": 9, "train": losses(1.0, 1.5)}])
    assert said == (
        "train probe: loss 3.000 at step 0, 1.000 at step 9; +0.500 with other pictures: near 0, they are not used"
    )
    assert verdict([start, {"step": 9, "train": {"right": 1.0, "none": 2.0}}])[0].endswith("1.000 at step 9")
    assert verdict([]) == []
    assert sight_gap({"right": 1.0}) is None


def test_the_step_of_the_lowest_held_out_loss_is_said() -> None:
    history = [{"step": step, "held_out": losses(loss, loss)} for step, loss in ((0, 3.0), (5, 1.0), (9, 2.0))]
    assert verdict(history)[-1] == "the held-out loss was lowest after step 5 (1.0000)"


@pytest.mark.parametrize(
    ("same", "words"),
    [
        ("", ""),
        ("picture", "9 pictures of different names are one and the same"),
        ("answer", '9 of 9 records looked at have the same answer, "Yes"'),
    ],
)
def test_pictures_and_answers_that_are_all_the_same_are_said(
    make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], same: str, words: str
) -> None:
    records = []
    for number in range(9):
        colour = (90, 90, 90) if same == "picture" else (20 * number, 90, 200 - 20 * number)
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{number}.png")
        answer = "Yes" if same == "answer" else f"It is number {number}."
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    train(
        make_recipe(
            data={"path": str(tmp_path / "data.json"), "images": str(tmp_path)},
            train={"max_steps": 1, "probe_every": 1},
        )
    )
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert ("one and the same" in said or "the same answer" in said) == bool(same)
