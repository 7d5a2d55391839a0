"""`dianjing check DATA --images DIR`: faults in a data set, before a run."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dianjing.check.codes import CODES
from dianjing.cli.flags import parse
from dianjing.config.load import load_recipe
from dianjing.config.schema import DataConfig, Recipe
from dianjing.console import Console
from dianjing.errors import ConfigError
from dianjing.pictures.rule import PictureRule
from dianjing.progress import watched

if TYPE_CHECKING:
    from dianjing.check.check import Result, Settings
    from dianjing.check.tokens import Reading

NAME = "check"
SUMMARY = "find faults in a data set, and fix those that are certain"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing check`."""

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DATA ...")] = ()
    """LLaVA JSON or JSONL; the recipe's if not given."""
    images: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of the pictures; the data file's own if not given."""
    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE")] = ""
    """Also say what a run with this recipe would use, cut and leave out."""
    llm: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of the LLM, or "tinyworld": look for its special strings in the texts (a recipe does too)."""
    template: str = ""
    """Chat template of --llm; chosen from its tokenizer if not given."""
    white: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """The value that is white in pictures of more than 8 bits which do not name it themselves; a recipe says its own
    (data.white)."""
    held_out: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Records kept for evaluation: say which pictures and records are in both."""
    json: bool = False
    """Print one JSON object a finding and nothing else."""
    report: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Write an HTML page with histograms and pictures."""
    fix: Annotated[str, tyro.conf.arg(metavar="OUT")] = ""
    """Write a corrected copy (.json or .jsonl) here, and OUT.changes.jsonl next to it."""
    pictures: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """With --fix: write a copy of every picture into this new folder, one that all programs read alike (upright,
    opaque, 8 bits, sRGB); OUT names the copies."""
    convert: Annotated[str, tyro.conf.arg(metavar="OUT")] = ""
    """Check nothing: turn a file or folder of another format or layout into LLaVA JSON."""


def run(arguments: list[str]) -> int:
    """Check a data set; return 1 when there are errors in it."""
    given = parse(Arguments, arguments, NAME, SUMMARY)
    notices = Console(stderr=True, highlight=False)
    if given.convert:
        return convert(given, notices)
    settings = read_settings(given)
    if given.fix and len(settings.paths) != 1:
        raise ConfigError(f"--fix corrects one file at a time, {len(settings.paths)} are given; name one")
    if given.pictures and not given.fix:
        raise ConfigError("--pictures goes with --fix OUT, the records that name the copies")
    result = watched_check(settings, notices)
    errors = int(result.findings.number("error") > 0)
    with suppress(BrokenPipeError):  # the reader has enough; what there is to write and to return stays
        tell(result, as_json=given.json)
    if given.report:
        # Slow to import, as is all that only some calls need.
        from dianjing.check.report import page

        Path(given.report).write_text(page(result), encoding="utf-8")
        notices.print(given.report, markup=False, soft_wrap=True)
    if given.fix:
        from dianjing.check.fix import fix

        names = {**result.names, **copied(given, settings, result, notices)}
        fixed = fix(settings.paths[0], given.fix, names)
        changes = sum(fixed.changes.values())
        notices.print(
            f"{fixed.out}: {fixed.records:,} records, {changes:,} changes ({fixed.changes_file.name}), "
            f"{fixed.left_out:,} left out because they cannot be read",
            markup=False,
            soft_wrap=True,
        )
    return errors


def copied(given: Arguments, settings: Settings, result: Result, notices: Console) -> dict[str, tuple[str, str]]:
    """Write plain copies of the pictures if --pictures asks for them, and return the names that change."""
    if not given.pictures:
        return {}
    from dianjing.check.copies import write_copies

    root = settings.images or os.path.dirname(settings.paths[0]) or "."
    right = {name: path for name, (_, path) in result.names.items()}
    used = list(dict.fromkeys([*result.usable, *right.values()]))
    with watched(notices) as watch:
        changed = write_copies(root, used, Path(given.pictures), settings.rule, watch)
    notices.print(
        f"{given.pictures}: {len(used):,} pictures, {len(changed):,} of them written as plain PNG; its name goes into "
        "data.images",
        markup=False,
        soft_wrap=True,
    )
    return changed | {name: changed[path] for name, path in right.items() if path in changed}


def convert(given: Arguments, notices: Console) -> int:
    """Turn one file into LLaVA JSON; return 1 when some of its records could not be."""
    from dianjing.check import convert as conversion

    if len(given.data) != 1:
        raise ConfigError(f"--convert turns one file into another, {len(given.data)} are given; name one")
    with notices.status("converting"):
        converted = conversion.convert(given.data[0], given.convert, given.images)
    lines = [
        f"{given.data[0]}: {converted.layout}",
        *(f"{number:,} {what}" for what, number in converted.notices.items()),
        *(f"left out: {reason}" for reason in converted.left_out[: conversion.REASONS_SHOWN]),
        f"{converted.out}: {converted.records:,} records, {converted.pictures:,} pictures in {converted.images}, "
        f"{len(converted.left_out):,} left out",
    ]
    for line in lines:
        notices.print(line, markup=False, soft_wrap=True)
    return int(bool(converted.left_out))


def read_settings(given: Arguments) -> Settings:
    """Return what is to be checked.

    Raises:
        ConfigError: no data is named, or a flag lacks the one it goes with.
    """
    from dianjing.check.check import Settings

    if given.recipe and given.llm:
        raise ConfigError("--recipe and --llm both name an LLM; leave one out")
    if given.template and not given.llm:
        raise ConfigError("--template goes with --llm; a recipe names its own")
    recipe = load_recipe(given.recipe) if given.recipe else None
    if recipe and recipe.start_from:
        from dianjing.start import settle  # slow to import

        recipe = settle(recipe)
    paths, images = given.data, given.images
    if not paths:
        if not recipe:
            raise ConfigError("no data is named; write dianjing check DATA --images DIR, or --recipe RECIPE")
        paths = (recipe.data.path,) if isinstance(recipe.data.path, str) else recipe.data.path
        images = images or recipe.data.images
    return Settings(
        paths=paths,
        images=images,
        held_out=given.held_out,
        reading=read_reading(given, recipe) if recipe or given.llm else None,
        recipe=recipe,
        rule=PictureRule.of(recipe.data) if recipe and not given.white else PictureRule(white=given.white),
    )


def read_reading(given: Arguments, recipe: Recipe | None) -> Reading:
    """Return how the LLM of a recipe, or of --llm, reads records."""
    from dianjing.check.tokens import Reading
    from dianjing.data.encode import load_tokenizer
    from dianjing.data.picture_tokens import FixedCount, PictureTokens
    from dianjing.data.template import special_strings_missing, template_for
    from dianjing.infer.segments import picture_tokens_of
    from dianjing.model.folders import resolve

    folder = resolve(recipe.language_model.folder if recipe else given.llm, "language_model")
    tokenizer = load_tokenizer(folder)
    name = recipe.language_model.template if recipe else given.template
    template, _ = template_for(tokenizer, name)
    picture_tokens: PictureTokens = FixedCount(1)
    if recipe:
        tower = resolve(recipe.vision_tower.folder, "vision_tower")
        picture_tokens = picture_tokens_of(tower, recipe.projector.kind)
    data = recipe.data if recipe else replace(DataConfig(path=""), on_long_record="truncate")
    return Reading(
        tokenizer_folder=str(folder),
        template=template.name,
        picture_tokens=picture_tokens,
        data=data,
        strings_missing=tuple(special_strings_missing(template, tokenizer)),
    )


def watched_check(settings: Settings, notices: Console) -> Result:
    """Check with a progress bar."""
    from dianjing.check.check import check

    with watched(notices) as watch:
        return check(settings, watch)


def tell(result: Result, *, as_json: bool) -> None:
    """Print the findings for a program, or for a person."""
    if not as_json:
        from dianjing.check.summary import print_summary

        print_summary(result, Console(highlight=False))
        return
    for code in result.findings.codes():
        about = CODES[code]
        for finding in result.findings.of(code):
            fields = {"severity": about.severity, **asdict(finding), "fix": about.fix}
            print(json.dumps(fields))
        if (more := result.findings.counts[code] - len(result.findings.of(code))) > 0:
            print(json.dumps({"severity": about.severity, "code": code, "text": f"{more} more of this kind"}))
