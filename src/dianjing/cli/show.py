"""`dianjing show DATA`: what the model sees of each record, and what it learns from it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dianjing.cli.flags import parse
from dianjing.config.schema import DataConfig
from dianjing.console import Console
from dianjing.data.template import OWN, TEMPLATES
from dianjing.errors import ConfigError

NAME = "show"
SUMMARY = "show what the model sees of each record, and what it learns from it"

RECORDS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing show`."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
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
    white: Annotated[int, tyro.conf.arg(metavar="N")] = DataConfig.white
    """The value that is white in pictures of more than 8 bits which do not name it themselves (data.white)."""
    max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = DataConfig.max_tokens
    """Longer records are cut here, a picture counted as one token."""
    limit: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Records shown; all with --json, else 3."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Write an HTML page with the preprocessed pictures here."""
    json: bool = False
    """Print one JSON object a record (id, input_ids, labels, image_token_id) and nothing else."""


def run(arguments: list[str]) -> int:
    """Show records; return the exit code."""
    chosen = parse(Arguments, arguments, NAME, SUMMARY)
    if chosen.out and not chosen.vision_tower:
        raise ConfigError("--out shows the pictures after preprocessing: say which --vision-tower does it")
    # Slow to import, so a typing error is said before.
    from dianjing.data.source import DataFile

    DataFile(chosen.data)
    from dianjing.cli.show_records import open_records, page, print_record, report_lines

    notices = Console(stderr=True, highlight=False)
    config = DataConfig(
        path=chosen.data,
        images=chosen.images,
        white=chosen.white,
        transparency=chosen.transparency,
        max_tokens=chosen.max_tokens,
        pack_tokens=sys.maxsize,
    )
    dataset, how = open_records(config, chosen.llm, chosen.template, chosen.vision_tower, notices)
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
