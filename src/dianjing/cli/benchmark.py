"""`dianjing eval MODEL --benchmark NAME FILE`: a published benchmark, asked and scored."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path

from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Table

from dianjing.benchmark.item import Benchmark, first_groups
from dianjing.benchmark.run import (
    Asked,
    Scores,
    questions_of_items,
    require_distinct,
    score_benchmark,
    write_results,
)
from dianjing.benchmark.table import BENCHMARKS
from dianjing.console import Console
from dianjing.errors import ConfigError, DataError
from dianjing.eval.summary import RIGHT, WAYS, Figure
from dianjing.infer.load import load_for_use
from dianjing.run.checkpoint import newest
from dianjing.run.layout import is_run


def benchmark_named(name: str) -> Benchmark:
    """Return a benchmark.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in BENCHMARKS:
        close = get_close_matches(name, BENCHMARKS, n=1)
        hint = f'did you mean "{close[0]}"? ' if close else ""
        raise ConfigError(f'--benchmark: unknown "{name}"; {hint}There are: {", ".join(BENCHMARKS)}')
    return BENCHMARKS[name]


def run_benchmark(model: str, name: str, data: str, images: str, out: str, limit: int) -> int:
    """Ask a benchmark's questions of a model, print the figures, and write everything to `out` if it is given."""
    benchmark, file = benchmark_named(name), Path(data).expanduser()
    items = first_groups(benchmark.read(file), limit)
    require_distinct(items, data)
    console, notices = Console(), Console(stderr=True)
    with ExitStack() as closing:
        folder = Path(out).expanduser() if out else Path(closing.enter_context(tempfile.TemporaryDirectory()))
        inside = any(isinstance(picture, bytes) for item in items for picture in item.pictures)
        if inside and any(isinstance(picture, str) for item in items for picture in item.pictures):
            raise DataError(f"{data}: some pictures are names and some are base64; write all of them one way")
        pictures = folder / "pictures"
        questions = questions_of_items(items, pictures)
        root = str(pictures) if inside else images or str(file if file.is_dir() else file.parent)
        loaded = load_for_use(model)
        asked = Asked(
            benchmark=benchmark,
            items=items,
            questions=questions,
            image_root=root,
            journal=folder / "answers.jsonl" if out else None,
            header={"journal": "benchmark", "benchmark": name, "questions": _digest(items), "model": state_of(model)},
        )
        ways = len(WAYS) if loaded.can_see else 1
        with Progress(console=notices, transient=True) as progress:
            task = progress.add_task("answering", total=ways * len(questions))
            scores, answers = score_benchmark(loaded, asked, lambda count: progress.advance(task, count))
        if RIGHT in scores.judged:
            console.print(table(f"{model}: {name}, {len(items):,} questions", scores))
            if not any(unit.value for unit in scores.judged[RIGHT].units):
                console.print("Nothing counts as right. The first answers, to compare with the rule below:")
                for item, answer in [*zip(items, answers, strict=True)][:3]:
                    console.print(f"  {item.id}: {answer!r}", soft_wrap=True, markup=False)
        else:
            console.print(f"{name}: no references are published for these {len(items):,} questions; nothing is scored")
        console.print(f"read so: {benchmark.rule}", soft_wrap=True, markup=False)
        if out:
            for path in write_results(folder, asked, scores, answers):
                console.print(f"written: {path}", soft_wrap=True, markup=False)
    return 0


def table(title: str, scores: Scores) -> Table:
    """Return the figures by way of asking and by type."""
    shown = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, caption_justify="left")
    if scores.blind:
        shown.caption = "A blind model passes: without pictures the score is not lower. It says nothing about seeing."
    shown.add_column("figure")
    for way in scores.judged:
        shown.add_column(WAYS[way], justify="right")
    for name in scores.judged[RIGHT].figures:
        shown.add_row(name, *(f"{judged.figures[name]:.4g}" for judged in scores.judged.values()), style="bold")
    shown.add_section()
    for name, type_ in {"all, with 95 % interval": None, **{name: name for name in scores.types}}.items():
        shown.add_row(f"  {name}", *(_cell(scores.figure(way, type_)) for way in scores.judged))
    if scores.sight:
        shown.add_row("  sight", _cell(scores.sight))
    return shown


def _cell(figure: Figure | None) -> str:
    return f"{figure.mean:.3f} \\[{figure.low:.2f},{figure.high:.2f}]" if figure else "-"


def _digest(items: object) -> str:
    return hashlib.sha256(repr(items).encode()).hexdigest()[:16]


def state_of(model: str) -> str:
    """Return what the answers stand on: a run's newest checkpoint, or the model's folder."""
    folder = Path(model).expanduser()
    return str(newest(folder).resolve()) if is_run(folder) else str(folder.resolve() if folder.is_dir() else model)
