"""The main job on a world, from its data to a proven export: the product's own verbs, one after another."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from dianjing.config.load import load_recipe
from dianjing.console import Console
from dianjing.demo.world import World
from dianjing.errors import ConfigError
from dianjing.eval.evaluate import Report, evaluate
from dianjing.export.export import export
from dianjing.infer.generate import LoadedModel
from dianjing.infer.load import load_for_use
from dianjing.train.loop import train

STAGES = ("base", "pretrain", "finetune")
RESULTS = "results.json"


@dataclass(kw_only=True)
class Stage:
    """The scores of one stage's model."""

    report: Report
    """On held-out questions, with the right picture, another one, and none."""
    figures: dict[str, float | None]
    """The world's own, by name."""

    def to_json(self) -> dict[str, object]:
        """Return the scores as JSON values."""
        by_type = {name: summary.to_json() for name, summary in self.report.by_type.items()}
        return {**self.report.overall.to_json(), **self.figures, "by_type": by_type}


@dataclass(kw_only=True)
class Results:
    """Everything the demo measured."""

    stages: dict[str, Stage] = field(default_factory=dict)
    ceiling: float | None = None
    """Accuracy of the text LLM when the held-out scenes are told in words; None where nothing tells them."""
    parity: float = 0.0
    """Largest difference of a logit between the run and its export."""
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return the scores as JSON values."""
        return {
            "stages": {name: stage.to_json() for name, stage in self.stages.items()},
            "ceiling": self.ceiling,
            "export_max_logit_difference": self.parity,
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
        }


def run_demo(out: Path, prepare: Callable[[], World], console: Console) -> tuple[World, Results]:
    """Make the data, train both stages, score all three models, compare, export; return what was measured of what.

    Raises:
        ConfigError: `out` holds something that is not a demo's.
    """
    _make_room(out)
    results = Results()
    _save(out, results)
    with _timed(results, "data", console, "getting models and data ready"):
        world = prepare()
    with _timed(results, "scoring", console, "asking the text-only model, which has no eyes"):
        blind = load_for_use(world.language_model)
        results.ceiling = world.ceiling(blind) if world.ceiling else None
        results.stages["base"] = _score(blind, world)
        del blind
    for name in STAGES[1:]:
        console.rule(f"stage: {name}")
        with _timed(results, name, console, ""):
            train(load_recipe(world.recipes[name], _overrides(out, name, world)))
        with _timed(results, "scoring", console, f"scoring {name} on held-out questions"):
            results.stages[name] = _score(load_for_use(str(out / name)), world)
        _save(out, results)
    console.rule("export")
    with _timed(results, "export", console, "merging, writing, reading back, comparing"):
        proof = export(load_for_use(str(out / "finetune"), "cpu"), out / "export")
        results.parity = proof.max_logit_difference
    _save(out, results)
    return world, results


def score_table(world: World, results: Results) -> Table:
    """Return the table that the demo prints."""
    table = Table(title=f"A blind model learns to see: {world.title}, share of answers exactly right")
    table.add_column("")
    for name in STAGES:
        table.add_column(name, justify="right")
    for label, _, values in score_rows(world, results):
        table.add_row(label, *("-" if value is None else f"{value:.3f}" for value in values))
    if results.ceiling is not None:
        table.caption = f"ceiling, the scenes told in words to the text-only model: {results.ceiling:.3f}"
    return table


def score_rows(world: World, results: Results) -> list[tuple[str, str, list[float | None]]]:
    """Return label, Chinese label and a value for each stage, a row each."""
    stages = [results.stages[name] for name in STAGES]
    exact = {
        "accuracy": ("right picture", "正确的图片"),
        "accuracy_other_picture": ("another picture", "别的图片"),
        "accuracy_no_picture": ("no picture", "没有图片"),
    }
    rows = [(*labels, [stage.report.overall.mean(name) for stage in stages]) for name, labels in exact.items()]
    own = [(one.label, one.label_zh, [stage.figures[one.name] for stage in stages]) for one in world.figures]
    return rows + own


def _overrides(out: Path, name: str, world: World) -> dict[str, object]:
    return {
        "output": str(out / name),
        "data.images": str(world.images),
        "train.sample_path": str(world.held_out_path),
        **({"projector.init_from": str(out / "pretrain")} if name == "finetune" else {}),
        **world.settings[name],
    }


def _score(loaded: LoadedModel, world: World) -> Stage:
    # Its answers are short, so exact match says enough; losses would make scoring a quarter to two fifths slower.
    report = evaluate(loaded, world.held_out, str(world.images), world.max_new_tokens, with_losses=False)
    figures = {
        one.name: one.measure(loaded, report) if one.measure else report.overall.mean(one.name) for one in world.figures
    }
    return Stage(report=report, figures=figures)


def _save(out: Path, results: Results) -> None:
    """Write the results so far; they also tell a demo's folder, even one that was broken off."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(json.dumps(results.to_json(), indent=1) + "\n", encoding="utf-8")


def _is_demo(out: Path) -> bool:
    try:
        found = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and Results().to_json().keys() <= found.keys()


def _make_room(out: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if not out.exists() or not any(out.iterdir()):
        return
    if not _is_demo(out):
        raise ConfigError(f"{out}: not empty, and not an earlier demo; give another folder with --out")
    for name in ("data", *STAGES, "export"):
        shutil.rmtree(out / name, ignore_errors=True)


@contextmanager
def _timed(results: Results, name: str, console: Console, text: str) -> Iterator[None]:
    began = time.monotonic()
    if text:
        console.print(text, highlight=False)
    yield
    results.seconds[name] = results.seconds.get(name, 0.0) + time.monotonic() - began
