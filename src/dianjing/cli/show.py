"""`dianjing show DATA`: what the model sees of each record, and what it learns from it."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import tyro
from PIL.Image import Image
from rich.console import Console
from rich.text import Text

from dianjing.config.schema import DataConfig
from dianjing.data.dataset import Dataset, open_dataset
from dianjing.data.encode import Encoder, Example, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.survey import image_folder
from dianjing.data.template import OWN, TEMPLATES, doubts, template_for
from dianjing.errors import ConfigError
from dianjing.infer.segments import headline, picture_tokens_of, segments
from dianjing.model.folders import resolve
from dianjing.pictures.image import ImageProcessor, load_image
from dianjing.pictures.rule import PictureRule
from dianjing.progress import watched

NAME = "show"
SUMMARY = "show what the model sees of each record, and what it learns from it"

RECORDS_SHOWN = 3
STYLES = {"plain": "", "supervised": "bold green", "picture": "cyan"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing show`."""

    data: tyro.conf.Positional[str]
    """LLaVA JSON or JSONL."""
    images: str = ""
    """Folder of the pictures; the data file's own if not given."""
    llm: str
    """Folder of the LLM, or "tinyworld"; only its tokenizer is read."""
    template: Annotated[str, tyro.conf.arg(help=f"Chat template: {', '.join((*TEMPLATES, OWN))}.")] = ""
    vision_tower: str = ""
    """Folder of the vision tower, or "tinyworld"; without it a picture is one image token."""
    transparency: Literal["white", "drop"] = DataConfig.transparency
    """Transparent pictures are laid on white, or their alpha channel is ignored (as in imported runs)."""
    white: int = DataConfig.white
    """The value that is white in pictures of more than 8 bits which do not name it themselves (data.white)."""
    max_tokens: int = DataConfig.max_tokens
    """Longer records are cut here, a picture counted as one token."""
    limit: int | None = None
    """Records shown; all with --json, else 3."""
    out: str = ""
    """Write an HTML page with the preprocessed pictures here."""
    json: bool = False
    """Print one JSON object a record (id, input_ids, labels, image_token_id) and nothing else."""


def run(arguments: list[str]) -> int:
    """Show records; return the exit code."""
    chosen = tyro.cli(
        Arguments,
        args=arguments,
        prog=f"dianjing {NAME}",
        description=SUMMARY,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if chosen.out and not chosen.vision_tower:
        raise ConfigError("--out shows the pictures after preprocessing: say which --vision-tower does it")
    notices = Console(stderr=True, highlight=False)
    dataset, how = open_records(chosen, notices)
    limit = chosen.limit if chosen.limit is not None else dataset.num_records if chosen.json else RECORDS_SHOWN
    shown = range(min(limit, dataset.num_records))
    for line in (how, *report_lines(dataset)):
        notices.print(line, markup=False, soft_wrap=True)
    for i in shown:
        print_record(dataset.example(i), dataset.encoder, as_json=chosen.json)
    if chosen.out:
        Path(chosen.out).write_text(page(dataset, shown), encoding="utf-8")
        notices.print(f"{chosen.out}: {len(shown)} records", markup=False, soft_wrap=True)
    return 0


def open_records(chosen: Arguments, notices: Console) -> tuple[Dataset, str]:
    """Return the records as a run with these settings would read them, cut where they are too long, and how the
    template was chosen."""
    tokenizer = load_tokenizer(resolve(chosen.llm, "language_model", weights=False))
    template, how = template_for(tokenizer, chosen.template)
    tower = resolve(chosen.vision_tower, "vision_tower", weights=False) if chosen.vision_tower else None
    encoder = Encoder(
        tokenizer=tokenizer,
        template=template,
        picture_tokens=picture_tokens_of(tower) if tower else FixedCount(1),
        max_tokens=chosen.max_tokens,
        on_long_record="truncate",
        image_token_id=image_token_id(tokenizer),
    )
    config = DataConfig(
        path=chosen.data,
        images=chosen.images,
        white=chosen.white,
        transparency=chosen.transparency,
        max_tokens=chosen.max_tokens,
        pack_tokens=sys.maxsize,
    )
    image_processor = ImageProcessor.from_folder(tower, rule=PictureRule.of(config)) if tower else None
    with watched(notices) as watch:
        return open_dataset(config, encoder, image_processor, watch), how


def report_lines(dataset: Dataset) -> Iterator[str]:
    """Yield what is worth knowing about the whole set."""
    yield counts(dataset)
    if dataset.opened:
        yield dataset.opened
    yield from doubts(dataset.encoder.template, dataset.encoder.tokenizer)
    if cut := dataset.report["truncated"]:
        yield f"warning: records cut to {dataset.encoder.max_tokens} tokens (--max-tokens): {cut}"


def counts(dataset: Dataset) -> str:
    """Return what the set holds in one line."""
    return ", ".join(f"{number:,} {name}" for name, number in dataset.report.items() if number)


def print_record(example: Example, encoder: Encoder, *, as_json: bool) -> None:
    """Print a record for a program, or for a person."""
    if as_json:
        fields = {"id": example.id, "input_ids": example.input_ids, "labels": example.labels}
        print(json.dumps({**fields, "image_token_id": encoder.image_token_id}))
        return
    console = Console(highlight=False)
    console.rule(Text(headline(example)))
    console.print(Text.assemble(*((part.text, STYLES[part.kind]) for part in segments(example, encoder))))


def page(dataset: Dataset, indices: Iterable[int]) -> str:
    """Return an HTML page of records, each with its pictures as the vision tower gets them."""
    processor = dataset.image_processor
    assert processor, "a page needs the tower's preprocessing"
    records: list[dict[str, Any]] = []
    for i in indices:
        record, example = dataset.records[i], dataset.example(i)
        folder = image_folder(dataset.config, record.source)
        seen = [processor.to_picture(processor(load_image(folder, name, processor.rule))) for name in record.images]
        records.append(
            {
                "headline": headline(example),
                "pictures": [(name, _inline(image)) for name, image in zip(record.images, seen, strict=True)],
                "segments": segments(example, dataset.encoder),
            }
        )
    template = files("dianjing.cli").joinpath("show.html.j2").read_text(encoding="utf-8")
    return jinja2.Template(template, autoescape=True).render(
        title=os.path.basename(dataset.records[0].source), records=records, counts=counts(dataset)
    )


def _inline(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
