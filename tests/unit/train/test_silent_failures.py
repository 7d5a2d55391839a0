from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dianjing.errors import TrainError
from dianjing.model.build import build
from dianjing.run.checkpoint import newest
from dianjing.train.engine import Engine, Losses, StepOutcome
from dianjing.train.loop import train
from dianjing.train.optim import set_learning_rates
from dianjing.train.silent_failures import BLIND_STEPS, SilentFailures


def test_a_projector_that_never_learns_stops_the_run() -> None:
    watch = SilentFailures()
    for step in range(1, BLIND_STEPS):
        watch.sight(False, step)
    with pytest.raises(TrainError, match=f"step {BLIND_STEPS}: for {BLIND_STEPS} steps with pictures the projector"):
        watch.sight(False, BLIND_STEPS)


def test_a_projector_that_learns_now_and_then_does_not() -> None:
    watch = SilentFailures()
    for step in range(4 * BLIND_STEPS):
        watch.sight(step % BLIND_STEPS == 0, step)


@pytest.mark.parametrize("gradient", [None, 0.0, 1e-9, float("nan")])
def test_what_a_projector_learns_is_seen(make_recipe: Any, gradient: float | None) -> None:
    recipe = make_recipe()
    model = build(recipe).model
    engine = Engine(recipe, Accelerator(), model)
    projector: Any = model.model.multi_modal_projector
    for weight in projector.parameters():
        weight.grad = None if gradient is None else torch.full_like(weight, gradient)
    assert engine.step(torch.ones(()), projector).learns == bool(gradient)


@pytest.mark.parametrize(("loss", "gradient"), [(1.0, 0.5), (math.nan, 0.5), (math.inf, 0.5), (1.0, math.nan)])
def test_a_step_is_taken_or_changes_nothing(make_recipe: Any, loss: float, gradient: float) -> None:
    recipe = make_recipe()
    model = build(recipe).model
    engine = Engine(recipe, Accelerator(), model)
    set_learning_rates(engine.optimizer, 1.0)
    projector: Any = model.model.multi_modal_projector

    def step(loss: float, gradient: float) -> StepOutcome:
        for weight in projector.parameters():
            weight.grad = torch.full_like(weight, gradient)
        return engine.step(torch.tensor(loss), projector)

    def state() -> list[torch.Tensor]:
        moments = engine.optimizer_state()
        return [*(weight.clone() for weight in projector.parameters()), *(moments[name].clone() for name in moments)]

    assert step(1.0, 0.25).finite
    before = state()
    taken = step(loss, gradient)
    same = [torch.equal(one, other) for one, other in zip(before, state(), strict=True)]
    assert taken.finite == (not any(same)) == (math.isfinite(loss) and math.isfinite(gradient))
    assert taken.finite or all(same)
    assert taken.loss == pytest.approx(loss, nan_ok=True)


def test_a_step_without_supervised_tokens() -> None:
    with pytest.raises(TrainError, match="step 4: none of its tokens are supervised"):
        SilentFailures().supervised(0, 4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_stops_the_run_and_names_the_records(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, where: str, value: float
) -> None:
    """The third step goes wrong on the pack that holds the record "two"; the first checkpoint stays the last."""
    recipe = make_recipe(
        train={"global_batch_size": 4, "epochs": 3, "save_every": 2}, data={"order": "sequential", "pack_tokens": 100}
    )
    packs: list[Any] = []
    forward = Losses.forward

    def broken(self: Losses, batch: Any) -> torch.Tensor:
        packs.append(batch)
        loss = forward(self, batch)
        late = sum("two" in seen.ids for seen in packs) == 2
        if late and "two" in batch.ids and where == "loss":
            return loss * value
        if late and "two" in batch.ids:
            loss.register_hook(lambda gradient: gradient * value)
        return loss

    monkeypatch.setattr(Losses, "forward", broken)
    with pytest.raises(TrainError, match=r"step 4: .*(nan|inf).*no checkpoint written") as error:
        train(recipe, quiet=True)
    named = str(error.value).partition("Records: ")[2].partition(". Look")[0].split(", ")
    last = [batch.ids for batch in packs if "two" in batch.ids][-1]
    assert sorted(named) == sorted(last if where == "loss" else ["two", "small", "again", "chat"])
    assert newest(Path(recipe.output)).name == "step-000002"


def test_pretraining_without_pictures_is_refused(make_recipe: Any, tmp_path: Any) -> None:
    (tmp_path / "text.jsonl").write_text(
        '{"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]}\n'
    )
    recipe = make_recipe(data={"path": str(tmp_path / "text.jsonl"), "images": ""})
    with pytest.raises(TrainError, match=r"text\.jsonl: no record has a picture"):
        train(recipe, quiet=True)
