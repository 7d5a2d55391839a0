"""The findings of a check, for the terminal and as numbers for a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.text import Text

from dianjing.check.check import Result
from dianjing.check.codes import CODES, SEVERITIES, Severity
from dianjing.check.picture_notes import SEEN_OTHERWISE
from dianjing.console import Console

EXAMPLES = 3
STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def print_summary(result: Result, console: Console) -> None:
    """Print the findings by code, each with its number and its first examples, then what the set is like."""
    findings = result.findings
    for code in findings.codes():
        about = CODES[code]
        number = f" x {findings.counts[code]:,}" if findings.counts[code] > 1 else ""
        way_out = f" ({done})" if (done := findings.fixes(code)) else ""
        console.print(
            Text.assemble(
                (about.severity, STYLES[about.severity]),
                " ",
                (code, "bold"),
                f"{number}: {about.meaning}",
                *([] if about.fix == "-" else [f"; {about.fix}{way_out}"]),
            ),
            soft_wrap=True,
        )
        for finding in findings.of(code)[:EXAMPLES]:
            console.print(Text(f"    {finding.place}: {printable(finding.text)}", style="dim"), soft_wrap=True)
        if findings.counts[code] > EXAMPLES:
            console.print(Text(f"    and {findings.counts[code] - EXAMPLES:,} more", style="dim"))
    for line in facts(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if refused := refusal(result):
        console.print(refused, markup=False, highlight=False, soft_wrap=True)
    console.print(verdict(result), style="bold", markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """Return a text that any terminal can show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def verdict(result: Result) -> str:
    """Return the numbers of findings in one line."""
    parts = [(result.findings.number(severity), severity) for severity in SEVERITIES]
    return ", ".join(f"{number:,} {name}{'' if number == 1 else 's'}" for number, name in parts)


def refusal(result: Result) -> str:
    """Return which files training does not read at all, "" when there is none."""
    return f"training would refuse {', '.join(result.refused)} as a whole" if result.refused else ""


def facts(result: Result) -> Iterator[str]:
    """Yield what the set is like, a line each."""
    yield f"{result.records:,} records, {result.pictures:,} pictures"
    counts = result.findings.counts
    if others := [f"{counts[code]:,} {words}" for code, words in SEEN_OTHERWISE.items() if counts[code]]:
        yield (
            f"other programs, such as the readers of an export, see these pictures otherwise: {', '.join(others)}; "
            "--fix OUT --pictures DIR writes copies that all read alike"
        )
    values = result.values
    if answers := values.get("answer characters"):
        questions = values["question characters"]
        yield (
            f"{answers.total():,} turns; characters of a question: {_middle(questions)}, "
            f"of an answer: {_middle(answers)}"
        )
        scripts = values["answer script"]
        yield "answers in: " + ", ".join(
            f"{name} {number / answers.total():.0%}" for name, number in scripts.most_common()
        )
        said = values["yes or no"]
        if said["yes"] + said["no"]:
            yield f"answers that are only yes: {said['yes']:,}, only no: {said['no']:,}"
    if result.run:
        run = result.run
        total = sum(run.lengths)
        yield (
            f"a run would use {run.records:,} records and skip {run.skipped:,}; it cuts {run.truncated:,}; "
            f"{total:,} positions, the longest record {max(run.lengths, default=0):,}; "
            f"{run.supervised / max(total, 1):.1%} of them supervised"
        )
        if run.pack_fill is not None:
            yield f"its packs would be {run.pack_fill:.0%} full"
        if run.steps is not None:
            yield f"its training takes {run.steps:,} optimizer steps" if not run.few_steps else run.few_steps


def _middle(values: Counter[str | int]) -> str:
    """Return median and largest of a distribution of numbers."""
    ordered = sorted((int(value), number) for value, number in values.items())
    seen, half = 0, values.total() / 2
    for value, number in ordered:
        seen += number
        if seen >= half:
            return f"{value:,} (median) to {ordered[-1][0]:,}"
    return "none"


def histogram(values: Counter[str | int], bins: int = 16) -> list[tuple[str, int]]:
    """Return (label, how often) of a distribution: words as they are, numbers in bins that double."""
    if any(isinstance(value, str) for value in values):
        return [(str(value) or "neither", number) for value, number in values.most_common(bins)]
    numbers = {int(value): number for value, number in values.items()}
    if len(numbers) <= bins and max(numbers, default=0) <= 2 * bins:
        return [(str(value), numbers[value]) for value in sorted(numbers)]
    counted = Counter[int]()
    for value, number in numbers.items():
        counted[value.bit_length()] += number
    lowest, highest = min(counted), max(counted)
    return [(_bin(bits), counted[bits]) for bits in range(lowest, highest + 1)]


def _bin(bits: int) -> str:
    return "0" if bits == 0 else "1" if bits == 1 else f"{2 ** (bits - 1):,}-{2**bits - 1:,}"
