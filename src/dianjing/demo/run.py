"""The main job on the tiny world, from drawn scenes to a proven export: the product's own verbs, one after another."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dianjing.config.load import load_recipe
from dianjing.data.record import load_records
from dianjing.errors import ConfigError
from dianjing.eval.evaluate import Report, evaluate
from dianjing.export.export import export
from dianjing.infer.answers import answer_questions
from dianjing.infer.generate import LoadedModel
from dianjing.infer.load import load_for_use
from dianjing.infer.questions import Question, questions_of
from dianjing.tinyworld.grammar import CAPTION, caption_f1, read_caption
from dianjing.tinyworld.records import DemoData, Sizes, write_demo_data
from dianjing.train.loop import train

STAGES = ("base", "pretrain", "finetune")
MAX_NEW_TOKENS = 100
"""More than the longest caption of a scene."""


@dataclass(kw_only=True)
class Stage:
    """The scores of one stage's model."""

    report: Report
    """On held-out scenes, with the right picture, another one, and none."""
    held_out_pairs: float
    """Accuracy on colour and shape pairs that no training picture showed."""
    caption_f1: float
    """Objects right in the captions it gives on request."""
    captions_instead: float
    """Share of the questions that it answers with a caption."""


@dataclass(kw_only=True)
class Results:
    """Everything the demo measured."""

    stages: dict[str, Stage] = field(default_factory=dict)
    ceiling: float = 0.0
    """Accuracy of the text LLM when the held-out scenes are told in words: no eyes can do better."""
    parity: float = 0.0
    """Largest difference of a logit between the run and its export."""
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return the scores as JSON values."""
        return {
            "stages": {name: _stage_json(stage) for name, stage in self.stages.items()},
            "ceiling": self.ceiling,
            "export_max_logit_difference": self.parity,
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
        }


def _stage_json(stage: Stage) -> dict[str, object]:
    return {
        **stage.report.overall.to_json(),
        "accuracy_held_out_pairs": stage.held_out_pairs,
        "caption_f1": stage.caption_f1,
        "captions_instead_of_answers": stage.captions_instead,
        "by_type": {name: summary.to_json() for name, summary in stage.report.by_type.items()},
    }


def run_demo(out: Path, sizes: Sizes, console: Console) -> Results:
    """Draw the data, train both stages, score all three models, compare, export; return what was measured.

    Raises:
        ConfigError: `out` holds something that is not a demo's.
    """
    _make_room(out)
    results = Results()
    with _timed(results, "data", console, "drawing scenes and writing LLaVA JSON"):
        data = write_demo_data(out / "data", sizes)
    with _timed(results, "scoring", console, "asking the text-only model, which has no eyes"):
        blind = load_for_use("tinyworld")
        results.ceiling = _accuracy(blind, data.held_out_in_words, data)
        results.stages["base"] = _score(blind, data)
    for name in STAGES[1:]:
        console.rule(f"stage: {name}")
        with _timed(results, name, console, ""):
            train(load_recipe(f"tinyworld_{name}", _overrides(out, name, data)))
        with _timed(results, "scoring", console, f"scoring {name} on held-out scenes"):
            results.stages[name] = _score(load_for_use(str(out / name)), data)
    console.rule("export")
    with _timed(results, "export", console, "merging, writing, reading back, comparing"):
        proof = export(load_for_use(str(out / "finetune"), "cpu"), out / "export")
        results.parity = proof.max_logit_difference
    (out / "results.json").write_text(json.dumps(results.to_json(), indent=1) + "\n", encoding="utf-8")
    return results


def score_table(results: Results) -> Table:
    """Return the table that the demo prints."""
    table = Table(title="A blind model learns to see: held-out scenes, share of answers exactly right")
    table.add_column("")
    for name in STAGES:
        table.add_column(name, justify="right")
    stages = [results.stages[name] for name in STAGES]
    overall = [stage.report.overall for stage in stages]
    rows: list[tuple[str, Sequence[float | None]]] = [
        ("right picture", [one.mean("accuracy") for one in overall]),
        ("another picture", [one.mean("accuracy_other_picture") for one in overall]),
        ("no picture", [one.mean("accuracy_no_picture") for one in overall]),
        ("colour-shape pairs never drawn in training", [stage.held_out_pairs for stage in stages]),
        ("captions on request: objects right (F1)", [stage.caption_f1 for stage in stages]),
        ("questions answered with a caption", [stage.captions_instead for stage in stages]),
    ]
    for label, values in rows:
        table.add_row(label, *("-" if value is None else f"{value:.3f}" for value in values))
    table.caption = f"ceiling, the scenes told in words to the text-only model: {results.ceiling:.3f}"
    return table


def faster_precision() -> str:
    """Return "bf16" or "fp32", whichever this machine multiplies faster in: having the units does not tell."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return min(("fp32", "bf16"), key=_seconds_of_products)


def _seconds_of_products(precision: str) -> float:
    """Return the least time of a few products of the tiny world's size."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows, columns = torch.ones(4096, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
    taken = []
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(rows @ columns, columns.T)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _overrides(out: Path, name: str, data: DemoData) -> dict[str, str]:
    path = data.pretrain if name == "pretrain" else data.finetune
    return {
        "output": str(out / name),
        "data.path": str(path),
        "data.images": str(data.images),
        "train.sample_path": str(data.held_out),
        "train.precision": faster_precision(),
        **({"projector.init_from": str(out / "pretrain")} if name == "finetune" else {}),
    }


def _score(loaded: LoadedModel, data: DemoData) -> Stage:
    report = evaluate(loaded, read_questions(data.held_out), str(data.images), MAX_NEW_TOKENS)
    captions = read_questions(data.held_out_captions)
    said = answer_questions(loaded, captions, str(data.images), MAX_NEW_TOKENS)
    f1 = [caption_f1(text, data.scenes[one.id]) for text, one in zip(said, captions, strict=True)]
    instead = [bool(read_caption(one.answer)) for one in report.answers if one.question.type != CAPTION]
    return Stage(
        report=report,
        held_out_pairs=_accuracy(loaded, data.held_out_pairs, data),
        caption_f1=sum(f1) / len(f1),
        captions_instead=sum(instead) / len(instead),
    )


def _accuracy(loaded: LoadedModel, path: Path, data: DemoData) -> float:
    questions = read_questions(path)
    answers = answer_questions(loaded, questions, str(data.images), MAX_NEW_TOKENS)
    right = [answer == question.reference for answer, question in zip(answers, questions, strict=True)]
    return sum(right) / len(right)


def read_questions(path: Path) -> list[Question]:
    """Return the questions of one of the demo's files."""
    return [question for record in load_records(str(path)).records for question in questions_of(record)]


def _make_room(out: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / "data" / "held_out_pairs.json").exists():
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
