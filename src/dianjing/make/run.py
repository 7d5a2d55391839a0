"""`dianjing make` from beginning to end: look, plan, ask, build, write."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dianjing.errors import ConfigError
from dianjing.make.build import (
    Made,
    RecordJson,
    build,
    held_out_names,
    near_duplicate_names,
    overlap,
    write_json,
)
from dianjing.make.cost import Budget
from dianjing.make.endpoint import Endpoint
from dianjing.make.filters import REASONS
from dianjing.make.journal import Journal
from dianjing.make.pictures import Pictures
from dianjing.make.prompts import Prompt
from dianjing.make.requests import Parameters, Request
from dianjing.make.send import Sender

INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class Job:
    """The records to make, of which pictures."""

    pictures: Pictures
    prompts: Sequence[Prompt]
    requests: Sequence[Request]
    parameters: Parameters
    blind_check: bool
    held_out: float
    """Share of the pictures whose records go to a file of their own."""
    seed: int
    out: Path

    @property
    def paths(self) -> dict[str, Path]:
        """Return where the records of each kind go."""
        return record_paths(self.out, self.prompts)

    @property
    def report_path(self) -> Path:
        """Return where the lists of what failed and what was dropped go."""
        return self.out.with_name(f"{self.out.stem}.report.json")


@dataclass(frozen=True, kw_only=True)
class AskOutcome:
    """How the asking ended."""

    stopped: str = ""
    """Why it was, if some requests were left."""
    exit_code: int = 0
    """2 if the user has to put something right, 130 if interrupted."""
    problems: dict[str, str] = field(default_factory=dict)
    """Key -> why a request could not be sent."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The files written, with counts."""

    made: Made
    train: dict[Path, int]
    """File -> its records."""
    held_out: dict[Path, int]
    overlap: dict[str, int]
    near_duplicates: list[list[str]]
    """Groups of pictures that look nearly the same."""


def journal_path(out: Path) -> Path:
    """Return where the journal of an output file is.

    Raises:
        ConfigError: the output is not a .json file.
    """
    if out.suffix != ".json":
        raise ConfigError(f"--out {out}: the records are written as JSON; give a name that ends in .json")
    return out.with_name(f"{out.stem}.journal.jsonl")


def record_paths(out: Path, prompts: Sequence[Prompt]) -> dict[str, Path]:
    """Return where the records of each kind go: to `out` if there is one kind, else to a file of their own."""
    kinds = list(dict.fromkeys(prompt.kind for prompt in prompts))
    return {kind: out if len(kinds) == 1 else out.with_name(f"{out.stem}_{kind}.json") for kind in kinds}


def held_out_path(path: Path) -> Path:
    """Return where the held-out records go that would else be in `path`."""
    return path.with_name(f"{path.stem}_held_out.json")


def check_paths(out: Path, prompts: Sequence[Prompt], held_out: float) -> None:
    """Refuse to write over files of others, and to leave files of an earlier run that would now contradict.

    Raises:
        ConfigError: a file is not this verb's; an earlier run divided its records in another way.
    """
    journal, paths = journal_path(out), [*record_paths(out, prompts).values()]
    for path in paths:
        if path.exists() and not journal.exists():
            raise ConfigError(f"{path}: it exists, and has no journal ({journal.name}) next to it; give another --out")
        if path != out and journal_path(path).exists():
            raise ConfigError(f"{path}: it is an output of its own ({journal_path(path).name}); give another --out")
        if not held_out and held_out_path(path).exists():
            raise ConfigError(
                f"{held_out_path(path)}: an earlier run put these records aside; give --held-out again, or remove "
                "the file"
            )
    if out not in paths and out.exists():
        raise ConfigError(
            f"{out}: an earlier run wrote records of one kind there, which now go to "
            f"{', '.join(path.name for path in paths)}; remove it, nothing is asked again"
        )


def ask(
    job: Job,
    journal: Journal,
    budget: Budget,
    base_url: str,
    timeout_seconds: float,
    concurrency: int,
    show: Callable[[Sender, str], None],
) -> AskOutcome:
    """Ask what the journal has no answer to."""

    async def send_all() -> Sender:
        async with Endpoint(base_url, timeout_seconds) as endpoint:
            sender = Sender(endpoint, journal, job.pictures.root, job.parameters, budget, concurrency, show)
            with _interruptible(sender):
                await sender.ask_all(job.requests)
                if job.blind_check and not sender.limiter.reason:
                    blind = build(job.requests, job.prompts, journal, job.parameters, blind=True).blind_requests
                    show(sender, f"asking {len(blind)} questions again without the picture")
                    await sender.ask_all(blind)
        return sender

    try:
        sender = asyncio.run(send_all())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    reason = sender.limiter.reason
    code = 130 if reason == INTERRUPTED else 2 if sender.fatal else 0
    return AskOutcome(stopped=reason, exit_code=code, problems=sender.problems)


@contextmanager
def _interruptible(sender: Sender) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the answers under way, which are paid for; the second one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield  # who called has the signals
        return
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

    def hear() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)
        sender.limiter.stop(INTERRUPTED)
        sender.show("stopping when the answers under way are here (once more: at once)")

    for number in numbers:
        loop.add_signal_handler(number, hear)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def write(job: Job, journal: Journal, problems: dict[str, str]) -> Result:
    """Build the records from the journal, divide them, and write the files."""
    made = build(job.requests, job.prompts, journal, job.parameters, blind=job.blind_check, problems=problems)
    made.unasked += len({one.key for one in made.blind_requests if not journal.entry(one.key).settled})
    pictures = job.pictures.kept
    names = held_out_names(pictures, job.held_out, job.seed) if job.held_out else set[str]()
    aside = {kind: held_out_path(path) for kind, path in job.paths.items()} if job.held_out else {}
    train = [record for record in made.records if record["image"] not in names]
    held_out = [record for record in made.records if record["image"] in names]
    job.out.parent.mkdir(parents=True, exist_ok=True)
    result = Result(
        made=made,
        train=_write(train, job.paths),
        held_out=_write(held_out, aside),
        overlap=overlap(train, held_out, pictures) if job.held_out else {},
        near_duplicates=near_duplicate_names(pictures),
    )
    write_json(job.report_path, _report(job, result))
    return result


def _write(records: Sequence[RecordJson], paths: Mapping[str, Path]) -> dict[Path, int]:
    """Write the records of each kind to its file, and return how many each holds."""
    written: dict[Path, int] = {}
    for kind, path in paths.items():
        own = [record for record in records if record["type"] == kind]
        write_json(path, own)
        written[path] = len(own)
    return written


def _report(job: Job, result: Result) -> dict[str, object]:
    pictures, made = job.pictures, result.made
    return {
        "records": {"train": sum(result.train.values()), "held_out": sum(result.held_out.values())},
        "files": {path.name: number for path, number in (result.train | result.held_out).items()},
        "overlap": result.overlap,
        "requests_without_an_answer": made.unasked,
        "failed": [asdict(one) for one in made.failed],
        "dropped": made.drops,
        "dropped_turns": [asdict(one) for one in made.dropped],
        "reasons": {code: REASONS[code] for code in made.drops},
        "pictures_refused": pictures.refused,
        "pictures_with_the_same_content": pictures.duplicates,
        "pictures_that_look_nearly_the_same": result.near_duplicates,
    }
