"""The results of the demo -> two self-contained pages: report.html and compare.html."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from dianjing.data.record import without_markers
from dianjing.demo.run import STAGES, Results, score_rows
from dianjing.demo.world import World
from dianjing.eval.compare import Column, page, thumbnail
from dianjing.infer.answers import load_pictures
from dianjing.pictures.rule import PLAIN
from dianjing.run.layout import CURVE

SHOWN_OF_EACH_TYPE = 2
COMPARED = 120


def write_report(out: Path, world: World, results: Results) -> Path:
    """Write report.html and compare.html into `out`; return the report's path."""
    answered = {name: results.stages[name].report.answers for name in STAGES}
    questions = [one.question for one in answered["finetune"]]
    types = [name for name in world.types if name in results.stages["finetune"].report.by_type]
    shown = SHOWN_OF_EACH_TYPE * len(types)
    pictures = load_pictures(questions[: max(COMPARED, shown)], str(world.images), PLAIN)

    columns = [Column.of_report(results.stages[name].report, name, COMPARED) for name in STAGES]
    compared = page(f"Before and after: {world.title}", questions[:COMPARED], columns, pictures)
    (out / "compare.html").write_text(compared, encoding="utf-8")

    cards = [
        {
            "picture": thumbnail(pictures[question.images[0]]),
            "type": question.type,
            "question": without_markers(question.text),
            "reference": question.reference,
            "answers": [
                {
                    "stage": name,
                    "text": answered[name][i].answer,
                    "right": bool(answered[name][i].scored.values["accuracy"]),
                }
                for name in STAGES
            ],
            "other": answered["finetune"][i].answer_other_picture,
            "none": answered["finetune"][i].answer_no_picture,
        }
        for i, question in enumerate(questions[:shown])
    ]
    source = files("dianjing.demo").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = template.from_string(source).render(
        world=world,
        results=results,
        rows=score_rows(world, results),
        stages=STAGES,
        types=types,
        cards=cards,
        curves={name: _inline(out / name / CURVE) for name in STAGES[1:]},
    )
    report = out / "report.html"
    report.write_text(text, encoding="utf-8")
    return report


def _inline(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
