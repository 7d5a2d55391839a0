"""The findings of a check, for the terminal and as numbers for a page."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator

from rich.text import Text

from dianjing.check.check import Result
from dianjing.check.codes import CODES, SEVERITIES, Severity, in_words
from dianjing.check.image_folder import nearby_folder
from dianjing.check.picture_notes import SEEN_OTHERWISE
from dianjing.console import Console
from dianjing.language import counted, say

EXAMPLES = 3
NUMBER_OF: dict[Severity, tuple[str, str]] = {
    "error": ("{number:,} error", "{number:,} errors"),
    "warning": ("{number:,} warning", "{number:,} warnings"),
    "note": ("{number:,} note", "{number:,} notes"),
}
STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def print_summary(result: Result, console: Console) -> None:
    """Print the findings by code, each with its number and its first examples, then what the set is like."""
    findings = result.findings
    for code in findings.codes():
        about = CODES[code]
        meaning, remedy = in_words(code)
        number = f" x {findings.counts[code]:,}" if findings.counts[code] > 1 else ""
        way_out = say(" ({text})", text=done) if (done := findings.fixes(code)) else ""
        console.print(
            Text.assemble(
                (say(about.severity), STYLES[about.severity]),
                " ",
                (code, "bold"),
                f"{number}{say(': ')}{meaning}",
                *([] if about.fix == "-" else [f"{say('; ')}{remedy}{way_out}"]),
            ),
            soft_wrap=True,
        )
        for finding in findings.of(code)[:EXAMPLES]:
            console.print(Text(f"    {finding.place}: {printable(finding.text)}", style="dim"), soft_wrap=True)
        if findings.counts[code] > EXAMPLES:
            more = say("and {number:,} more", number=findings.counts[code] - EXAMPLES)
            console.print(Text(f"    {more}", style="dim"))
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
    return say(", ").join(counted(result.findings.number(severity), *NUMBER_OF[severity]) for severity in SEVERITIES)


def refusal(result: Result) -> str:
    """Return which files training does not read at all, "" when there is none."""
    return say("training would refuse {files} as a whole", files=", ".join(result.refused)) if result.refused else ""


def facts(result: Result) -> Iterator[str]:
    """Yield what the set is like, a line each."""
    yield say("{records:,} records, {pictures:,} pictures", records=result.records, pictures=result.pictures)
    counts = result.findings.counts
    if result.pictures and counts["picture_missing"] == result.pictures:
        missing = [finding.text for finding in result.findings.of("picture_missing")]
        folder = nearby_folder(result.settings.paths[0], missing)
        yield say(
            "none of the {number:,} pictures is there; name their folder: --images {folder}",
            number=result.pictures,
            folder=shlex.quote(folder) if folder else "DIR",
        )
    if others := [f"{counts[code]:,} {say(words)}" for code, words in SEEN_OTHERWISE.items() if counts[code]]:
        yield say(
            "other programs, such as the readers of an export, see these pictures otherwise: {others}; "
            "--fix OUT --pictures DIR writes copies that all read alike",
            others=", ".join(others),
        )
    values = result.values
    if answers := values.get("answer characters"):
        questions = values["question characters"]
        yield say(
            "{turns:,} turns; characters of a question: {question}, of an answer: {answer}",
            turns=answers.total(),
            question=_middle(questions),
            answer=_middle(answers),
        )
        scripts = values["answer script"].most_common()
        shares = ", ".join(f"{name} {number / answers.total():.0%}" for name, number in scripts)
        yield say("answers in: {scripts}", scripts=shares)
        said = values["yes or no"]
        if said["yes"] + said["no"]:
            yield say("answers that are only yes: {yes:,}, only no: {no:,}", yes=said["yes"], no=said["no"])
    if result.run:
        run = result.run
        total = sum(run.lengths)
        yield say(
            "a run would use {records:,} records and skip {skipped:,}; it cuts {cut:,}; {positions:,} positions, "
            "the longest record {longest:,}; {supervised:.1%} of them supervised",
            records=run.records,
            skipped=run.skipped,
            cut=run.truncated,
            positions=total,
            longest=max(run.lengths, default=0),
            supervised=run.supervised / max(total, 1),
        )
        if run.pack_fill is not None:
            yield say("its packs would be {fill:.0%} full", fill=run.pack_fill)
        if run.steps is not None:
            yield run.few_steps or say("its training takes {steps:,} optimizer steps", steps=run.steps)


def _middle(values: Counter[str | int]) -> str:
    """Return median and largest of a distribution of numbers."""
    ordered = sorted((int(value), number) for value, number in values.items())
    seen, half = 0, values.total() / 2
    for value, number in ordered:
        seen += number
        if seen >= half:
            return say("{middle:,} (median) to {most:,}", middle=value, most=ordered[-1][0])
    return say("none")


def histogram(values: Counter[str | int], bins: int = 16) -> list[tuple[str, int]]:
    """Return (label, how often) of a distribution: words as they are, numbers in bins that double."""
    if any(isinstance(value, str) for value in values):
        return [(str(value) or say("neither"), number) for value, number in values.most_common(bins)]
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
