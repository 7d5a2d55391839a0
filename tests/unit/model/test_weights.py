"""What a run has learned, out of a model and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dianjing.errors import CheckpointError, ModelError
from dianjing.formats.source import open_foreign
from dianjing.model.build import build
from dianjing.model.stage import apply_stage
from dianjing.model.weights import load_projector, load_trainable_state, trainable_state
from dianjing.run.checkpoint import newest, save
from dianjing.run.state import TrainState
from tests.conftest import MakeRecipe
from tests.tiny import write_clip, write_llm
from tests.xtuner import XTUNER


@pytest.fixture
def model(make_recipe: MakeRecipe) -> Any:
    recipe = make_recipe("finetune", language_model={"tuning": "lora"})
    model = build(recipe).model
    apply_stage(model, recipe)
    return model


def learned(model: Any) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(weight) for name, weight in trainable_state(model).items()}


def test_what_is_loaded_is_what_was_saved(model: Any) -> None:
    state = learned(model)
    load_trainable_state(model, state)
    assert all(torch.equal(weight, state[name]) for name, weight in trainable_state(model).items())


@pytest.mark.parametrize("fault", ["missing", "left over", "of another shape"])
def test_a_state_that_does_not_fit_is_refused_whole(model: Any, fault: str) -> None:
    before = {name: weight.clone() for name, weight in trainable_state(model).items()}
    state = learned(model)
    name = "model.multi_modal_projector.linear_2.bias"
    match fault:
        case "missing":
            del state[name]
        case "left over":
            name = "model.other.weight"
            state[name] = torch.zeros(1)
        case _:
            state[name] = torch.zeros(7)
    with pytest.raises(ModelError, match=f"(?s){name}.*{fault}"):
        load_trainable_state(model, state)
    assert all(torch.equal(weight, before[name]) for name, weight in trainable_state(model).items())


def write_checkpoint(run: Path, step: int, state: dict[str, torch.Tensor]) -> Path:
    at = TrainState(step=step, epoch=0, samples_seen=0, total_steps=step, recipe={}, data={})
    return save(run, state, {"step": torch.ones(1)}, at, keep=9)


def test_the_projector_of_the_last_checkpoint_is_taken(model: Any, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    states = {step: learned(model) for step in (100, 1000, 20)}
    for step, state in sorted(states.items()):
        write_checkpoint(tmp_path / "before", step, state)
    built = build(make_recipe("finetune", projector={"init_from": str(tmp_path / "before")}))
    for name, weight in built.model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(weight, states[1000][f"model.multi_modal_projector.{name}"])
    assert "step-001000" in str(built.report)


def test_a_fresh_projector_reads_no_other_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("finetune", projector={"init_from": "nowhere"})
    with pytest.raises(ModelError, match=r"nowhere: no such run or checkpoint"):
        build(recipe)
    fresh = build(recipe, fresh_projector=True)
    assert "new, seed 0" in str(fresh.report)


def test_one_checkpoint_can_be_named(model: Any, tmp_path: Path) -> None:
    state = learned(model)
    folder = write_checkpoint(tmp_path, 1, state)
    write_checkpoint(tmp_path, 2, learned(model))
    load_projector(model, folder)
    weight = model.model.multi_modal_projector.linear_1.weight
    assert torch.equal(weight, state["model.multi_modal_projector.linear_1.weight"])


def test_a_projector_of_other_widths_is_refused(model: Any, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    llm = write_llm(tmp_path / "llm", hidden_size=16)
    clip = write_clip(tmp_path / "clip", hidden_size=20)
    parts = {"language_model": {"folder": str(llm)}, "vision_tower": {"folder": str(clip)}}
    other = build(make_recipe("pretrain", **parts)).model
    folder = write_checkpoint(
        tmp_path, 1, dict(other.model.multi_modal_projector.state_dict(prefix="model.multi_modal_projector."))
    )
    with pytest.raises(ModelError, match="20 -> 16, here 24 -> 32"):
        load_projector(model, folder)


def test_a_checkpoint_without_a_projector_or_damaged_is_refused(model: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, {"model.other.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match="no projector"):
        load_projector(model, folder)
    (folder / "trainable.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"damaged: trainable.safetensors has 4 bytes, not \d+; name another"):
        load_projector(model, folder)


@pytest.mark.parametrize("steps", [(999_500, 1_000_000), (20, 1000)])
@pytest.mark.parametrize("damaged", [None, "trainable.safetensors", "optimizer.safetensors", "state.json"])
def test_init_from_takes_the_checkpoint_that_a_resume_takes(
    model: Any, tmp_path: Path, steps: tuple[int, int], damaged: str | None
) -> None:
    states = {step: learned(model) for step in steps}
    folders = [write_checkpoint(tmp_path, step, state) for step, state in states.items()]
    if damaged:
        (folders[-1] / damaged).write_bytes(b"torn")
    told: dict[str, list[str]] = {"init_from": [], "resume": []}
    expected = newest(tmp_path, told["resume"].append)
    assert expected == folders[0 if damaged else 1]
    assert load_projector(model, tmp_path, told["init_from"].append).parent == expected
    assert told["init_from"] == told["resume"]
    assert len(told["resume"]) == bool(damaged)
    weight = model.model.multi_modal_projector.linear_1.weight
    assert torch.equal(weight, states[steps[0 if damaged else 1]]["model.multi_modal_projector.linear_1.weight"])


def test_a_run_without_a_checkpoint_has_no_projector(model: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(CheckpointError, match="there is no checkpoint in it"):
        load_projector(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_1.bias": torch.ones(1)}, r"another shape: linear_1.bias \(1 in it, 32 here\)"),
        ({"linear_1.bias": torch.ones(7)}, r"another shape: linear_1.bias \(7 in it, 32 here\)"),
        ({"linear_1.weight": torch.ones(1, 24)}, r"another shape: linear_1.weight \(1x24 in it, 32x24 here\)"),
        ({"linear_1.weight": torch.ones(24)}, r"another shape: linear_1.weight \(24 in it, 32x24 here\)"),
        (
            {
                "linear_1.weight": torch.ones(20, 24),
                "linear_1.bias": torch.ones(20),
                "linear_2.weight": torch.ones(32, 20),
            },
            r"another shape: linear_1.bias \(20 in it, 32 here\), linear_1.weight .*, linear_2.weight",
        ),
        ({"linear_1.weight": torch.ones(32, 24, dtype=torch.int8)}, r"linear_1.weight \(torch.int8\).*are not weights"),
        ({"linear_2.bias": torch.full((32,), torch.nan)}, "linear_2.bias hold values that are not finite"),
        ({"linear_1.bias": None, "linear_2.bias": None}, "linear_1.bias, linear_2.bias missing"),
        ({"linear_1.extra": torch.ones(1)}, "linear_1.extra left over"),
    ],
)
def test_what_is_not_exactly_the_projector_is_refused_by_name(
    model: Any, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    own = model.model.multi_modal_projector.state_dict()
    before = {name: weight.clone() for name, weight in own.items()}
    kept = {name: weight for name, weight in {**before, **change}.items() if weight is not None}
    ours = {f"model.multi_modal_projector.{name}": weight for name, weight in kept.items()}
    numbers = {"linear_1": "projector.model.0", "linear_2": "projector.model.2"}
    theirs = {f"{numbers[name[:8]]}{name[8:]}": weight for name, weight in kept.items()}
    torch.save(theirs, tmp_path / "iter_1.pth")
    for source in (write_checkpoint(tmp_path, 1, ours), tmp_path / "iter_1.pth"):
        with pytest.raises(ModelError, match=f"{source}: .*{message}"):
            load_projector(model, source)
    assert all(torch.equal(weight, before[name]) for name, weight in own.items())


def test_a_path_too_long_is_none(model: Any) -> None:
    with pytest.raises(ModelError, match="no such run or checkpoint"):
        load_projector(model, "x" * 300)


def test_the_projector_of_an_xtuner_checkpoint_is_taken_as_it_lies(make_recipe: MakeRecipe) -> None:
    tiny, checkpoint = XTUNER / "tiny", XTUNER / "tiny" / "pretrain_iter_10.pth"
    parts = {
        "language_model": {"folder": str(tiny / "tiny_internlm2")},
        "vision_tower": {"folder": str(tiny / "tiny_clip")},
    }
    built = build(make_recipe("finetune", projector={"init_from": str(checkpoint)}, **parts))
    own, stored = built.model.model.multi_modal_projector.state_dict(), open_foreign(checkpoint).weights
    for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
        for kind in ("weight", "bias"):
            assert torch.equal(own[f"{ours}.{kind}"], stored[f"projector.model.{theirs}.{kind}"])
    assert "pretrain_iter_10.pth" in str(built.report)


def test_a_projector_of_another_depth_is_refused(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "mm_projector.bin"
    torch.save({f"model.mm_projector.{number}.weight": torch.zeros(2, 2) for number in (0, 2, 4)}, path)
    with pytest.raises(ModelError, match=r"mm_projector.bin: its projector has 3 linear layers; only those of 2"):
        load_projector(model, path)
