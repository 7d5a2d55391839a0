"""Everything that can be known about a data set before a run, in one pass."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from dianjing.check.codes import Finding, Findings
from dianjing.check.gather import Gathered, Names, gather
from dianjing.check.names import Folder
from dianjing.check.pictures import Picture, PictureChecker
from dianjing.check.set_findings import leaked_records, picture_findings, record_findings
from dianjing.check.tokens import Reading
from dianjing.config.schema import Recipe
from dianjing.config.steps import few_steps, steps_per_epoch, total_steps
from dianjing.data.pack import pack
from dianjing.data.parallel import spread
from dianjing.errors import DataError
from dianjing.pictures.rule import PLAIN, PictureRule
from dianjing.pictures.wide import proposed_white
from dianjing.progress import Watch

PICTURES_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The files to check, with the model and recipe they are checked for."""

    paths: tuple[str, ...]
    images: str = ""
    """Folder of the pictures; "" = that of each data file."""
    held_out: str = ""
    reading: Reading | None = None
    recipe: Recipe | None = None
    """Says how the records of a step are packed."""
    rule: PictureRule = PLAIN
    """How pictures are read."""
    workers: int = 0
    """Processes; 0 = one a core."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The counts that a run with this recipe prints in its first lines."""

    records: int
    skipped: int
    truncated: int
    lengths: tuple[int, ...]
    """Positions of each record it would use, pictures expanded."""
    supervised: int
    """Tokens, of all positions together."""
    pack_fill: float | None
    """Share of the positions of its packs that are in use; None without a recipe."""
    steps: int | None
    """Optimizer steps of its training; None without a recipe."""
    few_steps: str
    """Warning about a training of few steps."""

    def distribution(self) -> Counter[str | int]:
        """Return how often each length is there."""
        return Counter[str | int](self.lengths)


@dataclass(kw_only=True)
class Result:
    """All that a check found."""

    settings: Settings
    findings: Findings
    records: int
    pictures: int
    refused: list[str]
    """Files that training would refuse whole."""
    values: dict[str, Counter[str | int]]
    """Distributions: name -> value -> how often."""
    run: Run | None = None
    """None without a recipe, and when training would refuse a file whole."""
    names: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Picture path as written -> (code, path as it should be), where there is no doubt."""
    usable: list[str] = field(default_factory=list[str])
    """Paths of the pictures that can be used, without those of the held-out set."""


def check(settings: Settings, watch: Watch) -> Result:
    """Return everything that is wrong with a data set.

    Raises:
        DataError: a file cannot be read.
    """
    for folder in [settings.images] if settings.images else []:
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: there is no such image folder; name it (--images)")
    findings, names = Findings(), Names()
    if settings.reading and settings.reading.strings_missing:
        findings.add(_template_finding(settings.reading))
    gathered = gather(
        settings.paths,
        settings.images,
        names,
        findings=findings,
        watch=watch,
        reading=settings.reading,
        workers=settings.workers,
    )
    held_out, own_pictures = None, len(names.numbers)
    if settings.held_out:
        paths = (settings.held_out,)
        held_out = gather(paths, settings.images, names, findings=Findings(), watch=watch, workers=settings.workers)
    pictures = look_at_pictures(names, settings.rule, settings.workers, watch)
    right_names: dict[str, tuple[str, str]] = {}
    found = [
        _about_pictures(gathered, names, pictures, right_names),
        record_findings(gathered),
        picture_findings(gathered, held_out, pictures),
        leaked_records(gathered, held_out) if held_out else (),
    ]
    for finding in (finding for group in found for finding in group):
        findings.add(finding)
    return Result(
        settings=settings,
        findings=findings,
        records=len(gathered.ids),
        pictures=len(pictures),
        refused=gathered.refused,
        values=gathered.values,
        run=None if _refused(settings.reading, gathered) else _run(gathered, pictures, settings),
        names=right_names,
        usable=[
            name
            for number, (_, name) in enumerate(names.numbers)
            if number < own_pictures and not pictures[number].code
        ],
    )


def _template_finding(reading: Reading) -> Finding:
    missing = reading.strings_missing
    text = (
        f'{len(missing)} special strings of the template "{reading.template}" are plain text to the tokenizer: '
        f"{', '.join(missing)}"
    )
    return Finding(code="template_strings", file=reading.tokenizer_folder, text=text)


def look_at_pictures(names: Names, rule: PictureRule, workers: int, watch: Watch) -> list[Picture]:
    """Return what every picture is like, by its number."""
    found: list[Picture] = [Picture()] * len(names.numbers)
    for root in {root for root, _ in names.numbers}:
        own = [(name, number) for (folder, name), number in names.numbers.items() if folder == root]
        groups = [own[at : at + PICTURES_AT_ONCE] for at in range(0, len(own), PICTURES_AT_ONCE)]
        tasks = ([name for name, _ in group] for group in groups)
        done = 0
        for group, pictures in zip(groups, spread(partial(PictureChecker, root, rule), tasks, workers), strict=True):
            for (_, number), picture in zip(group, pictures, strict=True):
                found[number] = picture
            done += len(group)
            watch("pictures", done, len(own))
    return found


def _about_pictures(
    gathered: Gathered, names: Names, pictures: Sequence[Picture], right_names: dict[str, tuple[str, str]]
) -> Iterator[Finding]:
    """Yield why records cannot use their pictures, and what is odd about a picture where it is first shown."""
    paths = list(names.numbers)
    brightest = max((picture.brightest for picture in pictures), default=0)
    folders: dict[str, Folder] = {}
    explained: dict[int, tuple[str, str]] = {}
    seen: set[int] = set()
    for record in range(len(gathered.ids)):
        for number in gathered.pictures_of(record):
            picture, (root, name) = pictures[number], paths[number]
            if picture.code:
                if number not in explained:
                    folder = folders.setdefault(root, Folder(root))
                    explained[number] = _explained(picture, name, folder, right_names, brightest)
                code, text = explained[number]
                found = gathered.finding(record, code, text, "image", _shown(root, name, picture))
                yield replace(found, fixed=name in right_names)
            elif number not in seen:
                seen.add(number)
                for code, text in picture.notes:
                    text = f'picture "{name}": {text}'
                    yield gathered.finding(record, code, text, "image", os.path.join(root, name))


def _explained(
    picture: Picture, name: str, folder: Folder, right_names: dict[str, tuple[str, str]], brightest: int
) -> tuple[str, str]:
    """Return code and sentence for a picture that cannot be used, with the path or the white that was meant."""
    if picture.code == "picture_white":
        text = f'picture "{name}": values up to {picture.brightest}, and the file does not say which one is white'
        white = proposed_white(brightest)
        return picture.code, f"{text}; the brightest of all pictures is {brightest}: data.white = {white} (--white)"
    certain = folder.certain(picture.code, name)
    if certain:
        right_names[name] = certain
        return certain[0], f'{picture.text}; it is "{certain[1]}"'
    if picture.code in ("picture_missing", "path_absolute", "path_outside") and (near := folder.nearest(name)):
        return picture.code, f"{picture.text}; was {near} meant?"
    if name.startswith("data:"):
        return picture.code, f"{picture.text}; `dianjing check FILE --convert OUT.json` stores it as a file"
    if picture.passes:
        return picture.code, f"{picture.text}; a run would begin, and stop at it"
    return picture.code, picture.text


def _shown(root: str, name: str, picture: Picture) -> str:
    """Return the path of a picture that may be opened for a thumbnail; "" when it may not."""
    return os.path.join(root, name) if picture.passes else ""


def _refused(reading: Reading | None, gathered: Gathered) -> bool:
    """Return whether nothing is known of a run, or it would not even look at the records."""
    return not reading or bool(gathered.refused or reading.strings_missing)


def _pack_fill(recipe: Recipe, lengths: Sequence[int], modality_lengths: Sequence[int]) -> float:
    """Return how full the packs of the first epoch are, of 1; `modality_lengths` as a Dataset has them."""
    from dianjing.data.order import epoch_order, step_indices  # slow to import: torch

    size = recipe.train.global_batch_size
    mode = recipe.data.order
    order = epoch_order(len(lengths), recipe.seed, 0, mode, lengths=modality_lengths, global_batch_size=size)
    steps = (step_indices(order, step, size, 0, 1) for step in range(steps_per_epoch(len(lengths), size)))
    packs = sum(len(pack([lengths[i] for i in step], recipe.data.pack_tokens)) for step in steps)
    return sum(lengths) / max(packs * recipe.data.pack_tokens, 1)


def _run(gathered: Gathered, pictures: Sequence[Picture], settings: Settings) -> Run:
    items, recipe = gathered.items, settings.recipe
    others = settings.reading.picture_tokens() - 1 if settings.reading else 0  # a picture's tokens but for one
    lengths: list[int] = []
    modality_lengths: list[int] = []
    supervised = truncated = 0
    for number, record in enumerate(items.record):
        shown = items.pictures.get(number)
        if not gathered.usable[record] or not items.positions[number]:
            continue
        seen = gathered.pictures_of(record) if shown is None else shown
        if all(pictures[one].passes for one in seen):
            lengths.append(items.positions[number])
            tokens = lengths[-1] - len(seen) * others
            modality_lengths.append(tokens if len(seen) else -tokens)
            supervised += items.supervised[number]
            truncated += items.truncated[number] > 0
    unreadable = gathered.usable.count(False)
    tried = sum(gathered.usable[record] for record in items.record)
    return Run(
        records=len(lengths),
        skipped=unreadable + tried - len(lengths),
        truncated=truncated,
        lengths=tuple(lengths),
        supervised=supervised,
        pack_fill=_pack_fill(recipe, lengths, modality_lengths) if recipe else None,
        steps=total_steps(recipe, len(lengths)) if recipe else None,
        few_steps=few_steps(recipe, len(lengths)) if recipe else "",
    )
