"""The findings of a check -> one self-contained HTML page."""

from __future__ import annotations

import os
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from dianjing.check.check import Result
from dianjing.check.codes import CODES, SEVERITIES, Finding, in_words
from dianjing.check.summary import NUMBER_OF, facts, histogram, printable, refusal
from dianjing.eval.compare import thumbnail
from dianjing.language import counted, language, say
from dianjing.pictures.picture import PictureError, load_image
from dianjing.pictures.rule import PictureRule

SHOWN = 20
"""Findings of a code on the page."""
OPEN = 5
"""Most kinds of errors that lie open."""
PICTURES_SHOWN = 8
"""...of which this number with their picture."""
BARS = {
    "turns": "Turns in a record",
    "pictures": "Pictures of a record",
    "question characters": "Characters of a question",
    "answer characters": "Characters of an answer",
    "question script": "Questions by script",
    "answer script": "Answers by script",
    "yes or no": "Answers of one word",
}


def page(result: Result) -> str:
    """Return the page."""
    findings = result.findings
    groups = [
        {
            "code": code,
            "about": CODES[code],
            "words": in_words(code),
            "number": findings.counts[code],
            "fixes": findings.fixes(code),
            "rows": _rows(findings.of(code)[:SHOWN], result.settings.rule),
        }
        for code in findings.codes()
    ]
    errors = [group for group in groups if group["about"].severity == "error"]
    for group in groups:
        group["open"] = len(errors) <= OPEN and group in errors
    values = {title: result.values[name] for name, title in BARS.items() if result.values.get(name)}
    charts = [_chart(say(title), histogram(numbers)) for title, numbers in values.items()]
    if result.run and result.run.lengths:
        charts.append(_chart(say("Positions of a record"), histogram(result.run.distribution())))
    source = files("dianjing.check").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(source).render(
        title=", ".join(os.path.basename(path) for path in result.settings.paths),
        language=language(),
        say=say,
        verdict=[
            (number, severity, counted(number, *NUMBER_OF[severity]))
            for severity in SEVERITIES
            for number in [findings.number(severity)]
        ],
        refusal=refusal(result),
        facts=list(facts(result)),
        groups=groups,
        charts=charts,
    )


def _rows(findings: list[Finding], rule: PictureRule) -> list[dict[str, Any]]:
    return [
        {
            "place": printable(finding.place),
            "text": printable(finding.text),
            "picture": _thumbnail(finding.picture, rule) if finding.picture and number < PICTURES_SHOWN else "",
        }
        for number, finding in enumerate(findings)
    ]


def _thumbnail(path: str, rule: PictureRule) -> str:
    """Return a picture as a data URI; "" for one that cannot be decoded."""
    folder, name = os.path.split(path)
    try:
        return thumbnail(load_image(folder, name, rule))
    except PictureError:
        return ""


def _chart(title: str, bars: list[tuple[str, int]]) -> dict[str, Any]:
    most = max(number for _, number in bars)
    return {"title": title, "bars": [(label, number, 100 * number / most) for label, number in bars]}
