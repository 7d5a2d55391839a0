"""The records of `dianjing show`: opened as a run would, printed for a person or a program, and as a page."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Any

import jinja2
from PIL.Image import Image
from rich.text import Text

from dianjing.config.schema import DataConfig
from dianjing.console import Console
from dianjing.data.dataset import Dataset, open_dataset
from dianjing.data.encode import Encoder, Example, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.survey import image_folder
from dianjing.data.template import doubts, template_for
from dianjing.infer.segments import headline, picture_tokens_of, segments
from dianjing.language import language, say
from dianjing.model.folders import resolve
from dianjing.pictures.picture import load_image
from dianjing.pictures.rule import PictureRule
from dianjing.progress import watched

STYLES = {"plain": "", "supervised": "bold green", "picture": "cyan"}


def open_records(
    config: DataConfig, llm: str, template: str, vision_tower: str, notices: Console
) -> tuple[Dataset, str]:
    """Return the records as a run with these settings would read them, cut where they are too long, and how the
    template was chosen."""
    tokenizer = load_tokenizer(resolve(llm, "language_model", weights=False))
    chosen, how = template_for(tokenizer, template)
    tower = resolve(vision_tower, "vision_tower", weights=False) if vision_tower else None
    encoder = Encoder(
        tokenizer=tokenizer,
        template=chosen,
        picture_tokens=picture_tokens_of(tower) if tower else FixedCount(1),
        max_tokens=config.max_tokens,
        on_long_record="truncate",
        image_token_id=image_token_id(tokenizer),
    )
    image_processor = None
    if tower:
        from dianjing.pictures.image import ImageProcessor  # imports torch, which text alone does not need

        image_processor = ImageProcessor.from_folder(tower, rule=PictureRule.of(config))
    with watched(notices) as watch:
        return open_dataset(config, encoder, image_processor, watch), how


def report_lines(dataset: Dataset) -> Iterator[str]:
    """Yield what is worth knowing about the whole set."""
    yield dataset.counts
    if dataset.opened:
        yield dataset.opened
    yield from doubts(dataset.encoder.template, dataset.encoder.tokenizer)
    if cut := dataset.report["truncated"]:
        most = dataset.encoder.max_tokens
        yield say("warning: records cut to {most} tokens (--max-tokens): {number}", most=most, number=cut)


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
        title=os.path.basename(dataset.records[0].source),
        records=records,
        counts=dataset.counts,
        language=language(),
        say=say,
    )


def _inline(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
