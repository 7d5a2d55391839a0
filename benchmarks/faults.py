"""Plants faults into small runs and writes the table of docs/reliability.md: fault, promise, tries, kept, words.

python benchmarks/faults.py                 all of it, and the table into docs/reliability.md (`make faults`)
python benchmarks/faults.py --tries 1       a short form, which writes nothing
"""

from __future__ import annotations

import argparse
import io
import locale
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file

from dianjing.cli.main import main as dianjing
from dianjing.config.load import save_recipe
from dianjing.config.schema import DataConfig, LanguageModelConfig, Recipe, TrainConfig, VisionTowerConfig
from dianjing.data import workers
from dianjing.model.build import build
from dianjing.run.checkpoint import newest
from dianjing.run.layout import JOURNAL, LOCK, OPTIMIZER, STATE, TRAINABLE, checkpoints

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "reliability.md"
MARKS = "<!-- faults -->", "<!-- /faults -->"
STEPS, SAVE_EVERY = 60, 5
Do = Callable[[], object]
SECONDS = 180


@dataclass(frozen=True)
class Tried:
    """One try of one fault."""

    kept: bool
    words: str


class Run:
    """`dianjing ARGUMENTS` in a copy of this process, which has imported all that it needs."""

    def __init__(self, arguments: list[str], env: Mapping[str, str], before: Do) -> None:
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (as long as the run)
        self.pid = os.fork()
        if self.pid:
            self._code: int | None = None
            return
        code = 1
        try:
            os.dup2(self._said.fileno(), 2)
            os.dup2(self._said.fileno(), 1)
            os.environ.update(env)
            before()
            code = dianjing(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code, or minus the signal that ended it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its exit code and words.

        Raises:
            TimeoutError: it takes longer than SECONDS.
        """
        limit = time.monotonic() + SECONDS
        while (code := self.poll()) is None:
            if time.monotonic() > limit:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"not ended after {SECONDS} s")
            time.sleep(0.002)
        self._said.seek(0)
        return code, self._said.read()

    def kill(self) -> None:
        """End it at once."""
        self.send(signal.SIGKILL)
        self.end()


class World:
    """A folder with the two tiny models, the data, and the weights that runs without a fault end with."""

    def __init__(self, folder: Path) -> None:
        from tests.tiny import write_clip, write_dataset, write_llm

        self.folder = folder
        self.llm, self.clip = write_llm(folder / "llm"), write_clip(folder / "clip")
        self.data = write_dataset(folder / "data")
        self._straight: dict[tuple[str, int], bytes] = {}
        self._number = 0
        build(self.recipe())  # imports what a run needs

    def recipe(self, stage: str = "pretrain", **train: Any) -> Recipe:
        """Return a recipe of its own folder, written next to it as .toml."""
        self._number += 1
        lora = {"tuning": "lora", "lora_dropout": 0.1} if stage == "finetune" else {}
        settings: dict[str, Any] = {"global_batch_size": 3, "epochs": 99, "max_steps": STEPS, "save_every": SAVE_EVERY}
        recipe = Recipe(
            stage=stage,  # type: ignore[arg-type]
            output=str(self.folder / f"run-{self._number}"),
            language_model=LanguageModelConfig(folder=str(self.llm), template="internlm2_chat", lora_rank=4, **lora),
            vision_tower=VisionTowerConfig(folder=str(self.clip)),
            data=DataConfig(path=str(self.data.path), images=str(self.data.images), pack_tokens=256),
            train=TrainConfig(precision="fp32", log_every=1, **settings | train),
        )
        save_recipe(recipe, f"{recipe.output}.toml")
        return recipe

    def start(
        self, recipe: Recipe, *flags: str, env: Mapping[str, str] | None = None, before: Do = lambda: None
    ) -> Run:
        """Start `dianjing train` in a copy of this process, after `before` in it."""
        return Run(["train", f"{recipe.output}.toml", *flags], env or {}, before)

    def run(self, recipe: Recipe, *flags: str, **how: Any) -> tuple[int, str]:
        """Run `dianjing train` to its end; return its exit code and words."""
        return self.start(recipe, *flags, **how).end()

    def same_as_straight(self, recipe: Recipe, ranks: int = 1) -> bool:
        """Return whether a run ended with the weights of one without a fault."""
        key = recipe.stage, ranks
        if key not in self._straight:
            straight = self.recipe(recipe.stage)
            self.run(straight, *(["--gpus", str(ranks)] if ranks > 1 else []))
            self._straight[key] = (newest(Path(straight.output)) / TRAINABLE).read_bytes()
        return (newest(Path(recipe.output)) / TRAINABLE).read_bytes() == self._straight[key]

    def resumed(self, recipe: Recipe, said: str, ranks: int = 1, **how: Any) -> Tried:
        """Resume a run; it must end as one without a fault."""
        flags = ["--resume", *(["--gpus", str(ranks)] if ranks > 1 else [])]
        code, more = self.run(recipe, *(flags if checkpoints(Path(recipe.output)) else flags[1:]), **how)
        failed = "Traceback" in said + more
        return Tried(code == 0 and not failed and self.same_as_straight(recipe, ranks), said + more)


Fault = Callable[[World, random.Random], Tried]
FAULTS: list[tuple[str, str, int, Fault]] = []
"""Name, promise, how often it is tried, and what tries it."""


def fault(name: str, promise: str, tries: int = 2) -> Callable[[Fault], Fault]:
    """Add a row."""

    def add(tried: Fault) -> Fault:
        FAULTS.append((name, promise, tries, tried))
        return tried

    return add


def wait_for_checkpoint(process: Run, recipe: Recipe, number: int = 1) -> None:
    """Wait until a run has that many checkpoints, or has ended."""
    while process.poll() is None and not checkpoints(Path(recipe.output))[number - 1 :]:
        time.sleep(0.002)


def _killed(stage: str, ranks: int) -> Fault:
    def tried(world: World, rng: random.Random) -> Tried:
        recipe = world.recipe(stage)
        flags = ["--gpus", str(ranks)] if ranks > 1 else []
        for round in range(3):
            process = world.start(recipe, *flags, *(["--resume"] if round else []))
            wait_for_checkpoint(process, recipe)
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
            time.sleep(10 if ranks > 1 else 0)  # the ranks see that the launcher is gone
            if not checkpoints(Path(recipe.output)):
                shutil.rmtree(recipe.output, ignore_errors=True)
                break
        return world.resumed(recipe, "", ranks)

    return tried


for _stage in ("pretrain", "finetune"):
    fault(f"kill -9 three times in a run and its saves, {_stage}", "resumed, the same bits", 10)(_killed(_stage, 1))
fault("kill -9 of the launcher of two ranks", "resumed, the same bits", 2)(_killed("pretrain", 2))


def _signalled(stage: str, number: signal.Signals) -> Fault:
    def tried(world: World, rng: random.Random) -> Tried:
        recipe = world.recipe(stage)
        process = world.start(recipe)
        wait_for_checkpoint(process, recipe)
        process.send(number)
        code, said = process.end()
        found = world.resumed(recipe, said)
        return replace(found, kept=found.kept and code in (0, 128 + number))

    return tried


for _stage in ("pretrain", "finetune"):
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        fault(f"{_number.name}, {_stage}", f"a checkpoint, exit code {128 + _number}, resumed, the same bits")(
            _signalled(_stage, _number)
        )


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit flipped": _flip,
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
}


def _damaged(name: str, damage: Callable[[Path], object], older: bool) -> Fault:
    def tried(world: World, rng: random.Random) -> Tried:
        recipe = world.recipe(keep=3)
        process = world.start(recipe)
        wait_for_checkpoint(process, recipe, 3)
        process.send(signal.SIGTERM)
        process.end()
        whole = checkpoints(Path(recipe.output))
        damage(whole[-2 if older else -1] / name)
        found = world.resumed(recipe, "")
        return replace(found, kept=found.kept and ("passed over" in found.words) != older)

    return tried


for _name in (TRAINABLE, OPTIMIZER, STATE, "manifest.json"):
    for _words, _damage in DAMAGES.items():
        fault(f"newest checkpoint: {_name} {_words}", "passed over by name, resumed, the same bits", 1)(
            _damaged(_name, _damage, False)
        )
fault("older checkpoint: one bit flipped", "not read, resumed, the same bits", 1)(_damaged(TRAINABLE, _flip, True))


@fault("train.jsonl torn in the middle", "the line named and left out, resumed, the same bits")
def _torn(world: World, rng: random.Random) -> Tried:
    recipe = world.recipe()
    process = world.start(recipe)
    wait_for_checkpoint(process, recipe)
    process.kill()
    journal = Path(recipe.output) / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[rng.randrange(len(lines))] = b'{"step": 1, "lo\n'
    journal.write_bytes(b"".join(lines))
    found = world.resumed(recipe, "")
    return replace(found, kept=found.kept and "damaged" in found.words)


def _other_weights(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    save_file({name: weight * 1.01 for name, weight in load_file(path).items()}, path, {"format": "pt"})


def _other_pictures(folder: Path) -> None:
    for path in (*folder.rglob("*.png"), *folder.rglob("*.jpg")):
        size, file = path.stat().st_size, io.BytesIO()
        with Image.open(path) as image:
            Image.new("RGB", image.size, "gray").save(file, image.format)
        assert file.tell() <= size
        path.write_bytes(file.getvalue().ljust(size, b"\0"))


def _changed(part: str, change: Callable[[Path], object]) -> Fault:
    def tried(world: World, rng: random.Random) -> Tried:
        before = {"language_model": world.llm, "vision_tower": world.clip, "pictures": world.data.images}[part]
        copy = shutil.copytree(before, world.folder / f"copy-{rng.random()}")
        recipe = world.recipe()
        where = {
            "language_model": {"language_model": replace(recipe.language_model, folder=str(copy))},
            "vision_tower": {"vision_tower": replace(recipe.vision_tower, folder=str(copy))},
            "pictures": {"data": replace(recipe.data, images=str(copy))},
        }[part]
        recipe = replace(recipe, **where)
        save_recipe(recipe, f"{recipe.output}.toml")
        process = world.start(recipe)
        wait_for_checkpoint(process, recipe)
        process.kill()
        change(copy)
        code, said = world.run(recipe, "--resume")
        return Tried(code == 2 and "Traceback" not in said and f"--allow-changed {part}" in said, said)

    return tried


fault("the base LLM's weights changed, then --resume", "refused by name")(_changed("language_model", _other_weights))
fault("the tower's weights changed, then --resume", "refused by name")(_changed("vision_tower", _other_weights))
fault("other pictures of the same sizes, then --resume", "refused by name")(_changed("pictures", _other_pictures))


@fault("two trainings, one folder, together", "one refused with the other's process and host, the other right")
def _two_writers(world: World, rng: random.Random) -> Tried:
    recipe = world.recipe()
    both = [world.start(recipe) for _ in range(2)]
    ends = [process.end() for process in both]
    refused = next((words for code, words in ends if code == 2), "")
    kept = (
        sorted(code for code, _ in ends) == [0, 2]
        and f"process {both[0].pid if ends[0][0] == 0 else both[1].pid} on " in refused
    )
    return Tried(kept and world.same_as_straight(recipe), refused)


@fault("a lock file of a process that was killed", "the next run takes it")
def _stale_lock(world: World, rng: random.Random) -> Tried:
    recipe = world.recipe()
    process = world.start(recipe)
    wait_for_checkpoint(process, recipe)
    process.kill()
    assert (Path(recipe.output) / LOCK).exists()
    return world.resumed(recipe, "")


@fault("file-size limit, reached by a save", "no torn checkpoint, exit code 2, resumed, the same bits")
def _file_size(world: World, rng: random.Random) -> Tried:
    recipe = world.recipe()
    code, said = world.run(recipe, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)))
    found = world.resumed(recipe, said)
    return replace(found, kept=found.kept and code == 2)


def _surroundings(**how: Any) -> Fault:
    def tried(world: World, rng: random.Random) -> Tried:
        recipe = world.recipe()
        code, said = world.run(recipe, **how)
        return Tried(code == 0 and world.same_as_straight(recipe), said)

    return tried


def _in_locale() -> None:
    locale.setlocale(locale.LC_ALL, "C")


fault("umask 077", "the same bits", 1)(_surroundings(before=lambda: os.umask(0o077)))
fault("locale C", "the same bits", 1)(_surroundings(env={"LANG": "C", "LC_ALL": "C"}, before=_in_locale))
fault("the cache cannot be written", "the same bits", 1)(_surroundings(env={"XDG_CACHE_HOME": "/proc/nothing"}))
fault("TMPDIR cannot be written", "the same bits", 1)(_surroundings(env={"TMPDIR": "/proc/nothing"}))
fault("at most 64 open files", "the same bits", 1)(
    _surroundings(before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
)


def _worker(number: signal.Signals, words: str) -> Fault:
    def tried(world: World, rng: random.Random) -> Tried:
        recipe = world.recipe()
        recipe = replace(recipe, data=replace(recipe.data, workers=2))
        save_recipe(recipe, f"{recipe.output}.toml")
        process = world.start(recipe, before=lambda: setattr(workers, "WORKER_SECONDS", 5))
        wait_for_checkpoint(process, recipe)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), number)
        code, said = process.end()
        found = world.resumed(recipe, said)
        return replace(found, kept=found.kept and code == 2 and words in said)

    return tried


fault("loader processes killed", "exit code 2, resumed, the same bits")(_worker(signal.SIGKILL, "was killed"))
fault("loader processes stopped (limit set to 5 s)", "exit code 2, resumed, the same bits")(
    _worker(signal.SIGSTOP, "made nothing for 5 seconds")
)


@fault("the output cannot be written", "refused before the first step", 1)
def _read_only(world: World, rng: random.Random) -> Tried:
    recipe = replace(world.recipe(), output="/proc/nothing/run")
    save_recipe(recipe, world.folder / "unwritable.toml")
    code, said = Run(["train", str(world.folder / "unwritable.toml")], {}, lambda: None).end()
    return Tried(code == 2 and "Traceback" not in said, said)


SAID = re.compile(
    r"^(?:error: |.*(?:passed over|damaged, and|stopping after|allow-changed)).*(?:\n  .*)?", re.MULTILINE
)
"""Lines that are about a fault; a run says much else."""


def rows(most: int, only: str = "", seed: int = 0) -> Iterator[tuple[str, str, int, int, str]]:
    """Yield fault, promise, tries, kept, and words of the last try, for faults whose name fits the pattern `only`."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for name, promise, tries, tried in FAULTS:
            if re.search(only, name):
                rng = random.Random(f"{seed} {name}")
                found = [tried(world, rng) for _ in range(min(tries, most))]
                said = SAID.search(found[-1].words)
                words = re.sub(r"/\S*/", "", " ".join(said[0].split())) if said else ""
                yield name, promise, len(found), sum(one.kept for one in found), words[:160]


def main() -> int:
    """Print the table, and write it where it belongs; return 1 if a promise was not kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=10**6)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    lines = ["| fault | promise | tries | kept | words |", "| --- | --- | --- | --- | --- |"]
    print("\n".join(lines))
    broken = 0
    for name, promise, tries, kept, words in rows(given.tries, given.only):
        lines.append(f"| {name} | {promise} | {tries} | {kept} | {words.replace('|', '/') or '-'} |")
        print(lines[-1], flush=True)
        broken += kept != tries
    if given.tries == parser.get_default("tries") and not given.only:
        text, (start, end) = DOCUMENT.read_text(encoding="utf-8"), MARKS
        before, _, rest = text.partition(start)
        table = "\n".join(lines)
        DOCUMENT.write_text(f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    return int(broken > 0)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
