"""Recipes and runs of the folder: one is started as its own process, any is followed by the files it writes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from PIL.Image import Image

from dianjing.config.load import load_recipe
from dianjing.errors import ConfigError, DataError, DianjingError
from dianjing.eval.score import token_f1
from dianjing.pictures.picture import load_image
from dianjing.pictures.rule import PictureRule
from dianjing.run.journal import METRICS, SAMPLE, read_rows
from dianjing.run.layout import JOURNAL, RECIPE, SAMPLES, checkpoints
from dianjing.run.lock import require_no_writer

DEPTH = 4
"""Folders below the first that are looked through."""
MANY = 2000
"""A folder with more in it holds data, not recipes and runs, and is passed over."""
POINTS = 600
"""Of a curve, at most."""
LOG_BYTES = 8192
REPORT_MARK = b'<meta name="generator" content="dianjing">'
"""In the first MARKED_BYTES of a page that Dianjing wrote; no other page is shown."""
MARKED_BYTES = 2048
BASES = "bases.json"
"""In the folder of an exported adapter, next to its recipe; a run has none."""
PACKAGE = Path(str(files("dianjing"))).resolve()
"""Its own recipes are not those of the folder: `dianjing recipes copy` makes one yours."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """A run that was started here."""

    process: subprocess.Popen[bytes]
    log: Path


class Runs:
    """Recipes and runs in a folder; `images` is the only other folder whose pictures may be shown."""

    def __init__(self, folder: Path, images: str, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder.resolve()
        self._images = images
        self._readable = (self.folder, Path(images).resolve() if images else self.folder)
        self._environment = dict(environment or {})
        """Variables of runs that are started, added to those of this process."""
        self._started: dict[Path, Started] = {}
        self._lock = threading.Lock()

    def listing(self) -> dict[str, Any]:
        """Return the recipes, runs, exported adapters and pages by their path, and which run is going on."""
        recipes, runs, pages = self._found()
        going = [self._name(run) for run, one in self._started.items() if one.process.poll() is None]
        fresh = [self._name(run) for run in self._started]  # its folder may not be there yet
        return {
            "recipes": sorted(map(self._name, recipes)),
            "runs": sorted({*(self._name(run) for run in runs if not _is_export(run)), *fresh}),
            "exports": sorted(self._name(run) for run in runs if _is_export(run)),
            "pages": sorted(map(self._name, pages)),
            "going": going,
        }

    def page(self, name: str) -> str:
        """Return a page of the folder that Dianjing wrote, such as that of `dianjing compare`.

        Raises:
            DataError: the folder has no such page.
        """
        page = next((page for page in self._found()[2] if self._name(page) == name), None)
        if page is None:
            raise DataError(f'no page "{name[:200]}" in {self.folder}')
        return page.read_text(encoding="utf-8", errors="replace")

    def recipe(self, name: str) -> Path:
        """Return the file of a recipe, or of the recipe that a run was made with.

        Raises:
            DataError: the folder has no recipe or run of this name.
        """
        recipes, runs, _ = self._found()
        known = {self._name(path): path for path in recipes} | {self._name(run): run / RECIPE for run in runs}
        if name not in known:
            raise DataError(f'no recipe or run "{name[:200]}" in {self.folder}')
        return known[name]

    def start(self, name: str, *, resume: bool) -> str:
        """Start a run and return its name.

        Raises:
            DianjingError: the recipe cannot be used, writes outside the folder, or a run is going on here or elsewhere.
        """
        file = self.recipe(name)
        run = Path(load_recipe(file).output).expanduser().resolve()
        if self.folder not in run.parents:
            raise ConfigError(f"{name}: its output {run} is outside {self.folder}; start the studio on a folder above")
        with self._lock:
            if any(one.process.poll() is None for one in self._started.values()):
                raise ConfigError("a run is going on; stop it, or wait for it")
            require_no_writer(run)
            log = file.with_name(f"{file.name}.log")
            command = [sys.executable, "-m", "dianjing", "train", str(file), *(["--resume"] if resume else [])]
            # A link that stands there is not followed.
            with open(log, "wb", opener=lambda path, how: os.open(path, how | os.O_NOFOLLOW, 0o644)) as out:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, **self._environment},
                )
            self._started[run] = Started(process=process, log=log)
        return self._name(run)

    def stop(self, name: str) -> None:
        """Ask a run that was started here to stop, which it does after its step, with a checkpoint.

        Raises:
            DataError: it was not started here, or has ended.
        """
        started = self._started.get(self.folder / name)
        if not started or started.process.poll() is not None:
            raise DataError(f'"{name[:200]}" is not a run that was started here and is still going on')
        started.process.send_signal(signal.SIGTERM)

    def end(self) -> list[str]:
        """Stop what was started here, wait for the checkpoints, and return the names."""
        going = {run: one for run, one in self._started.items() if one.process.poll() is None}
        for one in going.values():
            one.process.send_signal(signal.SIGTERM)
        for one in going.values():
            one.process.wait()
        return [self._name(run) for run in going]

    def run(self, name: str, step: int | None = None) -> dict[str, Any]:
        """Return how far a run is: its curve, its sample answers (the latest, or those of a step), the end of its log.

        Raises:
            DataError: there is no such run.
        """
        run = self.folder / name
        started = self._started.get(run)
        if not started:
            run = self.recipe(name).parent
        journal = run / JOURNAL
        found, damaged = read_rows(journal, METRICS)
        rows = [_finite(row) for row in found]
        if damaged and damaged[-1] == len(found) + len(damaged):
            del damaged[-1]  # the last line: it may be half written
        age = time.time() - journal.stat().st_mtime if journal.is_file() else None
        code = started.process.poll() if started else None
        return {
            "name": name,
            "curve": [[row["step"], row["loss"]] for row in _thinned(rows)],
            "damaged_lines": damaged,
            "last": rows[-1] if rows else None,
            "total_steps": _total_steps(run),
            "seconds_since_last_line": age,
            "going": bool(started) and code is None,
            "exit_code": code,
            "log": _end_of(started.log) if started else "",
            **_samples(run, step, self._readable),
        }

    def picture(self, name: str, record: str) -> Image:
        """Return the picture of a run's sample question, if it lies in the folder.

        Raises:
            DianjingError: there is no such run or question, or its picture is elsewhere.
        """
        recipe = self.recipe(name)
        root, images = _sample_pictures(recipe.parent, self._readable)
        if record not in images:
            raise DataError("this question has no picture in the folder")
        return load_image(root, images[record], PictureRule.of(load_recipe(recipe).data))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _found(self) -> tuple[list[Path], list[Path], list[Path]]:
        return _contents(self.folder, Path(self._images).resolve() if self._images else None)


def _samples(run: Path, step: int | None, readable: Sequence[Path]) -> dict[str, Any]:
    """Return the sample answers of a step, and of each step their mean token F1."""
    rows, _ = read_rows(run / SAMPLES, SAMPLE)
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(row["step"], []).append(token_f1(row["answer"], row["reference"]))
    shown = step if step in values else max(values, default=0)
    try:
        _, images = _sample_pictures(run, readable)
    except DianjingError:  # the recipe or the held-out file has changed; the answers can still be read
        images = {}
    return {
        "samples": [{**row, "picture": row["id"] in images} for row in rows if row["step"] == shown],
        "held_out": [[at, sum(some) / len(some)] for at, some in sorted(values.items())],
    }


def _contents(folder: Path, images: Path | None) -> tuple[list[Path], list[Path], list[Path]]:
    """Return recipes, runs with exports, and pages; links, hidden folders and the package are left alone."""
    recipes, runs, pages = [], [], []
    for inside, names in _walk(folder, DEPTH, images):
        if PACKAGE in (inside, *inside.parents):
            continue
        if RECIPE in names and inside != folder:
            runs.append(inside)
        recipes += [inside / name for name in names if name.endswith(".toml") and _is_recipe(inside / name)]
        pages += [inside / name for name in names if name.endswith(".html") and _is_report(inside / name)]
    return [path for path in recipes if path.parent not in runs], runs, pages


def _sample_pictures(run: Path, readable: Sequence[Path]) -> tuple[str, dict[str, str]]:
    """Return the image folder of a run's sample questions and each one's first picture; none from elsewhere."""
    from dianjing.train.samples import sample_questions  # slow to import: torch

    recipe = load_recipe(run / RECIPE)
    root = recipe.data.images or str(Path(recipe.train.sample_path).parent)
    if not recipe.train.sample_path or not _is_in(recipe.train.sample_path, readable) or not _is_in(root, readable):
        return root, {}
    questions = sample_questions(recipe.train.sample_path, recipe.train.sample_count)
    return root, {question.id: question.images[0] for question in questions if question.images}


def _is_in(path: str, folders: Sequence[Path]) -> bool:
    resolved = Path(path).expanduser().resolve()
    return any(folder == resolved or folder in resolved.parents for folder in folders)


def _walk(folder: Path, depth: int, without: Path | None) -> Iterator[tuple[Path, list[str]]]:
    try:
        with os.scandir(folder) as found:
            inside = list(islice(found, MANY + 1))
            entries = [entry for entry in inside if not entry.name.startswith(".") and not entry.is_symlink()]
    except OSError:
        return
    if len(inside) > MANY:
        return
    yield folder, [entry.name for entry in entries if entry.is_file()]
    for entry in sorted(entries, key=lambda entry: entry.name):
        if depth and entry.is_dir() and Path(entry.path) != without:
            yield from _walk(Path(entry.path), depth - 1, without)


def _is_export(folder: Path) -> bool:
    return (folder / BASES).is_file()


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return REPORT_MARK in file.read(MARKED_BYTES)
    except OSError:
        return False


def _is_recipe(path: Path) -> bool:
    try:
        return "stage" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with None for the numbers that JSON cannot hold, and without what probes have measured."""
    numbers = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**{name: value for name, value in row.items() if name != "probe"}, **dict.fromkeys(numbers)}


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most POINTS of the rows, evenly, the last one among them."""
    every = -(-len(rows) // POINTS) or 1
    return [row for i, row in enumerate(rows) if i % every == 0 or i == len(rows) - 1]


def _total_steps(run: Path) -> int | None:
    """Return how many steps a run has in all, which its checkpoints know; None before the first."""
    from dianjing.run.checkpoint import read_state  # slow to import: torch

    for checkpoint in reversed(checkpoints(run)):
        try:
            return read_state(checkpoint).total_steps
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _end_of(log: Path) -> str:
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LOG_BYTES))
        return file.read().decode(errors="replace")
