"""`dianjing make IMAGES --out data.json`: LLaVA records about pictures, by way of a vision model's endpoint."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tyro.conf import Positional, arg

from dianjing.cli.flags import parse
from dianjing.cli.recipes import copy_shipped
from dianjing.console import Console
from dianjing.errors import ConfigError
from dianjing.extras import install

if TYPE_CHECKING:
    from dianjing.make.cost import Budget, Prices
    from dianjing.make.journal import Journal
    from dianjing.make.pictures import Pictures
    from dianjing.make.run import AskOutcome, Job, Result
    from dianjing.make.send import Sender

NAME = "make"
SUMMARY = "make records about pictures with a vision model behind an OpenAI-compatible endpoint"
PROMPTS_SUMMARY = "list the shipped prompts, or copy one to edit"
DEFAULT_PROMPTS = ("conversation",)
LISTED = 5
EXTRA_BODY = '{"enable_thinking": false}'


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing make`. The endpoint's key comes from DIANJING_API_KEY or OPENAI_API_KEY alone."""

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """Folder of pictures, one picture, or a text file that names one a line; "prompts" lists the shipped prompts
    instead."""
    out: Annotated[Path, arg(metavar="FILE")]
    """The records, as LLaVA JSON, or FILE_KIND.json for each kind if the prompts are of several; the journal and the
    report lie next to it. The same command goes on after a stop."""
    model: str
    """The model, as the endpoint calls it."""
    base_url: Annotated[str, arg(metavar="URL")] = ""
    """The endpoint, such as http://127.0.0.1:8000/v1."""
    prompts: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Shipped prompts or .txt files of your own; "conversation" if neither these nor --questions are given."""
    questions: Annotated[Path | None, arg(metavar="FILE")] = None
    """Ask each line of this file alone and take the reply as the answer: for models that write no JSON."""
    language: Literal["en", "zh", "both"] = "en"
    """Of the shipped prompts."""
    pairs: Annotated[int, arg(metavar="N")] = 5
    """How many pairs of question and answer a prompt asks for."""
    max_tokens: Annotated[int, arg(metavar="N")] = 1024
    """Longest reply in tokens."""
    temperature: float | None = None
    """The endpoint's own if not given."""
    long_edge: Annotated[int, arg(metavar="PIXELS")] = 1024
    """Larger pictures are sent this large, as JPEG."""
    extra_body: Annotated[str, arg(metavar="JSON")] = ""
    """Further fields of a vendor, sent with every message, such as '{"enable_thinking": false}'."""
    white: Annotated[int, arg(metavar="N")] = 0
    """The value that is white in pictures of more than 8 bits which do not name it themselves (data.white)."""
    concurrency: Annotated[int, arg(metavar="N")] = 8
    """Most calls at once."""
    timeout_seconds: float = 120.0
    """Longest time for one call, from the first byte sent to the last one received."""
    price_in: float | None = None
    """Price of a million prompt tokens."""
    price_out: float | None = None
    """Price of a million reply tokens."""
    max_cost: float | None = None
    """Stop before all runs on this output together could cost more."""
    max_requests: Annotated[int | None, arg(metavar="N")] = None
    """Stop when all runs on this output together have made this number of calls."""
    blind_check: bool = False
    """Ask each question again without the picture, and drop those with the same answer. One more call each."""
    held_out: Annotated[float, arg(metavar="SHARE")] = 0.0
    """Put the records of this share of the pictures (0 to 0.5) into FILE_held_out.json."""
    seed: int = 7
    """Draws the held-out pictures."""
    dry_run: bool = False
    """Say what would be asked and about what it costs; call and write nothing."""
    batch_out: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the open requests for OpenAI's Batch API instead of asking."""
    batch_in: Annotated[Path | None, arg(metavar="FILE")] = None
    """Take over the results of a batch instead of asking."""


@dataclass(frozen=True, kw_only=True)
class PromptArguments:
    """The command line of `dianjing make prompts`."""

    action: Positional[Literal["list", "copy"]] = "list"
    """The action."""
    name: Annotated[Positional[str], arg(metavar="[NAME]")] = ""
    """The prompt to copy."""
    dest: Annotated[Positional[Path], arg(metavar="[DEST]")] = Path()
    """File or folder to copy it to; this folder if not given."""


def run(arguments: list[str]) -> int:
    """Make records; return 0 if every request has its answer, 1 if some have not."""
    if arguments[:1] == ["prompts"]:
        return _prompts(arguments[1:])
    given = parse(Arguments, arguments, NAME, SUMMARY)
    _check(given)

    # Slow to import, so a typing error is said before.
    from dianjing.make.journal import Journal
    from dianjing.make.run import AskOutcome, journal_path, write

    notices = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    journal = Journal(journal_path(given.out))
    job = _job(given, notices)
    if given.dry_run:
        journal.read()
        Console().print(_estimate_table(given, job, journal))
        return 0
    with journal:
        budget = _budget(given, job, journal)
        if given.batch_out:
            return _write_batch(given.batch_out, job, journal)
        asked = AskOutcome()
        if given.batch_in:
            _read_batch(given.batch_in, job, journal, budget)
        else:
            asked = _ask(given, job, journal, budget, notices)
        result = write(job, journal, asked.problems)
        _print_result(job, journal, budget, result, notices)
    return _exit_code(asked, job, result, notices)


def _prompts(arguments: list[str]) -> int:
    from dianjing.make.prompts import shipped_prompts, summary

    given = parse(PromptArguments, arguments, f"{NAME} prompts", PROMPTS_SUMMARY)
    if given.action == "copy":
        print(copy_shipped(shipped_prompts(), given.name, given.dest, "prompt"))
        return 0
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, path in shipped_prompts().items():
        table.add_row(name, summary(path))
    Console().print(table)
    return 0


def _check(given: Arguments) -> None:
    """Refuse what cannot be meant.

    Raises:
        ConfigError: a flag is out of its range, or lacks another one.
    """
    least = {"pairs": 1, "max_tokens": 1, "long_edge": 28, "concurrency": 1, "timeout_seconds": 0.1, "held_out": 0.0}
    limits = {"price_in": 0.0, "price_out": 0.0, "max_cost": 0.0, "max_requests": 0, "temperature": 0.0}
    for name, bound in {**least, **limits}.items():
        value = getattr(given, name)
        if value is not None and not value >= bound:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {bound} is needed")
    if given.held_out > 0.5:
        raise ConfigError(f"--held-out {given.held_out}: at most 0.5, as a share of the pictures")
    if (given.price_in is None) != (given.price_out is None):
        raise ConfigError("--price-in and --price-out belong together; give both")
    if given.max_cost is not None and given.price_in is None:
        raise ConfigError("--max-cost needs --price-in and --price-out, the prices of a million tokens")
    if given.batch_in and given.batch_out:
        raise ConfigError("--batch-in and --batch-out are two steps; give one")
    if not (given.base_url or given.dry_run or given.batch_in or given.batch_out):
        raise ConfigError("--base-url is needed: the endpoint to ask, such as http://127.0.0.1:8000/v1")
    asks = not (given.dry_run or given.batch_in or given.batch_out)
    if asks and importlib.util.find_spec("openai") is None:
        raise ConfigError(f"making records needs the package openai: {install('make')}")


def _job(given: Arguments, notices: Console) -> Job:
    from dianjing.make.endpoint import check_base_url
    from dianjing.make.pictures import look
    from dianjing.make.prompts import choose_prompts, read_questions
    from dianjing.make.requests import Parameters, plan
    from dianjing.make.run import Job, check_paths

    names = given.prompts or (() if given.questions else DEFAULT_PROMPTS)
    prompts = choose_prompts(names, given.language, given.pairs)
    if given.questions:
        prompts.append(read_questions(given.questions))
    check_paths(given.out, prompts, given.held_out)
    if given.base_url and (warning := check_base_url(given.base_url)):
        notices.print(f"warning: {warning}", style="yellow")
    parameters = Parameters(
        model=given.model,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        long_edge=given.long_edge,
        white=given.white,
        extra_body=_extra_body(given.extra_body),
    )
    with Progress(console=notices, transient=True) as progress:
        task = progress.add_task("looking at the pictures", total=None)
        pictures = look(
            given.images, given.white, lambda done, total: progress.update(task, completed=done, total=total)
        )
    _print_pictures(pictures, notices)
    return Job(
        pictures=pictures,
        prompts=prompts,
        requests=plan(pictures.kept, prompts, parameters),
        parameters=parameters,
        blind_check=given.blind_check,
        held_out=given.held_out,
        seed=given.seed,
        out=given.out,
    )


def _extra_body(text: str) -> str:
    """Return the fields of --extra-body as JSON in one spelling.

    Raises:
        ConfigError: it is not an object, or names a field that other flags give.
    """
    try:
        fields: object = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body: not JSON ({error}); write an object, such as {EXTRA_BODY}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"--extra-body: not an object; write one, such as {EXTRA_BODY}")
    if taken := sorted({"model", "messages", "stream", "response_format"} & fields.keys()):
        raise ConfigError(f"--extra-body: {', '.join(taken)} is given in another way; leave it out")
    return json.dumps(fields, sort_keys=True, ensure_ascii=False) if fields else ""


def _print_pictures(pictures: Pictures, notices: Console) -> None:
    from dianjing.make.pictures import named

    counts = {
        "pictures": len(pictures.kept),
        "refused": len(pictures.refused),
        "with the content of another one": len(pictures.duplicates),
        "other files left alone": pictures.other_files.total(),
    }
    left_alone = f" ({named(pictures.other_files)})" if pictures.other_files else ""
    notices.print(", ".join(f"{number:,} {name}" for name, number in counts.items() if number) + left_alone)
    for reason in list(pictures.refused.values())[:LISTED]:
        notices.print(f"refused: {reason}")


def _prices(given: Arguments) -> Prices | None:
    from dianjing.make.cost import Prices

    if given.price_in is None or given.price_out is None:
        return None
    return Prices(tokens_in=given.price_in, tokens_out=given.price_out)


def _budget(given: Arguments, job: Job, journal: Journal) -> Budget:
    from dianjing.make.cost import Budget

    return Budget(
        parameters=job.parameters,
        totals=journal.totals,
        prices=_prices(given),
        max_cost=given.max_cost,
        max_requests=given.max_requests,
    )


def _estimate_table(given: Arguments, job: Job, journal: Journal) -> Table:
    from dianjing.make.cost import estimate

    pending = [request for request in job.requests if not journal.entry(request.key).settled]
    found = estimate(pending, job.parameters, journal.totals.usage, _prices(given))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title="Dry run: nothing is called or written")
    table.title_justify = "left"
    rows = {
        "endpoint": given.base_url or "-",
        "model": given.model,
        "prompts": ", ".join(prompt.name for prompt in job.prompts),
        "pictures": f"{len(job.pictures.kept):,}",
        "requests": f"{len(job.requests):,}",
        "answered already": f"{len(job.requests) - len(pending):,}",
        "to ask": f"{found.requests:,}" + (", and once more a question for --blind-check" if given.blind_check else ""),
        "prompt tokens": f"about {found.prompt_tokens:,}",
        "reply tokens": f"about {found.completion_tokens:,}",
        "cost": "give --price-in and --price-out" if found.cost is None else f"about {found.cost:,.2f}",
        "estimated from": f"replies in the journal for {found.measured:,} requests, a rule of thumb for the others",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _write_batch(path: Path, job: Job, journal: Journal) -> int:
    from dianjing.make.batch import write_batch
    from dianjing.make.requests import Dialect

    for file in write_batch(path, job.requests, journal, job.pictures.root, job.parameters, Dialect()):
        print(file)
    return 0


def _read_batch(path: Path, job: Job, journal: Journal, budget: Budget) -> None:
    from dianjing.make.batch import read_batch
    from dianjing.make.endpoint import without_key

    counts = read_batch(path, job.requests, journal, budget, without_key)
    print(f"{path}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items()))


def _ask(given: Arguments, job: Job, journal: Journal, budget: Budget, notices: Console) -> AskOutcome:
    """Ask with a progress bar."""
    from dianjing.make.run import ask

    notices.print(f"asking {given.model} at {given.base_url}")
    if journal.totals.calls:
        answers = sum(journal.totals.statuses[name] for name in ("ok", "invalid", "refused"))
        lost = journal.totals.unanswered
        notices.print(f"going on: {answers:,} answers in {journal.path}, {lost:,} calls without one")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[state]}"), console=notices, transient=True) as progress:
        task = progress.add_task("asking", total=None, state="")

        def show(sender: Sender, line: str) -> None:
            count, limiter = sender.count, sender.limiter
            waiting = limiter.pause_seconds
            description = f"waiting {waiting:.0f} s" if waiting >= 1 else "asking"
            cost = f", cost {budget.spent():.4f}" if budget.prices else ""
            state = f"{count.failed} failed, {count.waiting} to try again{cost}"
            done = count.done + count.failed
            progress.update(task, description=description, completed=done, total=count.total, state=state)
            if line:
                progress.console.print(line)

        return ask(job, journal, budget, given.base_url, given.timeout_seconds, given.concurrency, show)


def _print_result(job: Job, journal: Journal, budget: Budget, result: Result, notices: Console) -> None:
    made, totals = result.made, journal.totals
    for path, number in result.train.items():
        print(f"{path}: {number:,} records")
    for path, number in result.held_out.items():
        print(f"{path}: {number:,} records of other pictures")
    if job.held_out:
        notices.print(", ".join(f"{name.replace('_', ' ')}: {n}" for name, n in result.overlap.items()))
    if result.near_duplicates:
        alike = sum(map(len, result.near_duplicates))
        groups = f"{len(result.near_duplicates):,} groups"
        notices.print(
            f"{alike:,} pictures look nearly like another one ({groups}), as charts and forms of one layout do"
        )
    if made.drops:
        notices.print("dropped: " + ", ".join(f"{number:,} {reason}" for reason, number in made.drops.items()))
    for one in made.failed[:LISTED]:
        notices.print(f"failed: {one.image}, {one.prompt}: {one.reason}")
    if len(made.failed) > LISTED:
        notices.print(f"and {len(made.failed) - LISTED:,} more, listed in {job.report_path}")
    used = totals.usage.values()
    tokens = (
        f"{sum(u.prompt_tokens for u in used):,} prompt and {sum(u.completion_tokens for u in used):,} reply tokens"
    )
    cost = f", cost {budget.spent():.4f}" if budget.prices else ""
    notices.print(f"in all runs: {totals.calls:,} calls, {totals.unanswered:,} without an answer, {tokens}{cost}")


def _exit_code(asked: AskOutcome, job: Job, result: Result, notices: Console) -> int:
    made, refused = result.made, len(job.pictures.refused)
    if asked.stopped:
        notices.print(f"stopped: {asked.stopped}")
    left = {"requests failed": len(made.failed), "not asked": made.unasked, "pictures refused": refused}
    if listed := ", ".join(f"{number:,} {name}" for name, number in left.items() if number):
        notices.print(f"not complete: {listed}; see {job.report_path}")
    for line in _next(job, result):
        notices.print(line)
    return asked.exit_code or int(bool(listed))


def _next(job: Job, result: Result) -> Iterator[str]:
    """Yield the commands that go on with the files that hold records, with the flags they need."""

    def command(*words: str | Path) -> str:
        return f"dianjing {shlex.join(map(str, words))}"

    files = [path for path, number in result.train.items() if number]
    if not files:
        return
    own_folder = {os.path.realpath(path.parent) for path in files} == {os.path.realpath(job.pictures.root)}
    images = [] if own_folder else ["--images", job.pictures.root]
    aside = next((path for path, number in reversed(result.held_out.items()) if number), None)
    held_out = ["--held-out", aside] if aside else []
    models = "--llm LLM --vision-tower TOWER"
    yield f"next: {command('check', *files, *images, *held_out)}"
    yield f"      {command('show', files[-1], *images)} {models}"
    yield f"      {command('recipes', 'new', *files, *images, *held_out)} {models}"
