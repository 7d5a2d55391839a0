"""`dianjing export RUN OUT --format NAME`: write, read back, compare, keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dianjing.cli.flags import parse
from dianjing.config.load import load_recipe
from dianjing.console import Console
from dianjing.errors import DataError
from dianjing.export.formats import FORMATS, Dtype, Options, require_taken
from dianjing.run.layout import RECIPE

if TYPE_CHECKING:
    from dianjing.export.receipt import Proof
    from dianjing.infer.generate import Conversation

NAME = "export"
SUMMARY = "write a run for other programs to load, proved to answer as the run does"
RECORDS = 8
"""Records of the data that run and export are compared on, besides drawn pictures."""
FORMATS_HELP = "\n".join(f"{name}: {format.purpose}" for name, format in FORMATS.items()) + "\n"
if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[*FORMATS]


def taken_by(option: str) -> str:
    """Return the names of the formats that take an option."""
    return ", ".join(name for name, format in FORMATS.items() if option in format.options)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing export`."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write; it must not exist."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """LLaVA JSON to compare run and export on; the run's own if not given."""
    images: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of its pictures; the data file's own if not given."""
    format: Annotated[FormatName, tyro.conf.arg(help=FORMATS_HELP)] = "hf"
    dtype: Annotated[Dtype, tyro.conf.arg(help=f"{taken_by('dtype')}: type of the weights.")] = "fp32"
    quantize: Annotated[str, tyro.conf.arg(help=f"{taken_by('quantize')}: type of the LLM's weights.")] = "f16"
    verify: Annotated[bool, tyro.conf.arg(help=f"{taken_by('verify')}: let llama.cpp answer, too.")] = False


def run(arguments: list[str]) -> int:
    """Export a run and say how equal it is."""
    given = parse(Arguments, arguments, NAME, SUMMARY)

    # Slow to import, so a typing error is said before.
    from dianjing.export.export import export, require_free
    from dianjing.infer.load import load_for_use

    require_free(given.out)
    options = Options(dtype=given.dtype, quantize=given.quantize, verify=given.verify)
    require_taken(given.format, options)
    notices = Console(stderr=True)
    conversations = real_conversations(given, notices)
    proof = export(load_for_use(given.run, "cpu"), given.out, conversations, given.format, options)
    notices.print(said(proof), soft_wrap=True, highlight=False, markup=False)
    notices.print(
        f"next: {given.out / 'README.md'} says how it is loaded", soft_wrap=True, highlight=False, markup=False
    )
    print(given.out)
    return 0


def said(proof: Proof) -> str:
    """Return what the receipt says, in a few lines."""
    cases = proof.cases
    same = ["tokens"] * all(case.same_ids for case in cases)
    same += ["pixels"] * all(case.pixel_difference is not None for case in cases)
    same += ["greedy answers"] * all(case.same_answer for case in cases)
    lines = [
        f"run and export agree on {len(cases)} conversations: same {', '.join(same) or 'logits'}, "
        f"logits within {proof.max_logit_difference:.1e} (parity.json)",
        *proof.notes,
    ]
    return "\n".join(lines)


def real_conversations(given: Arguments, notices: Console) -> list[Conversation]:
    """Return a few questions with their pictures, spread over the data; none if the run's own is gone.

    Raises:
        DataError: the data that --data names cannot be used.
    """
    from dianjing.data.record import load_records
    from dianjing.infer.answers import load_pictures
    from dianjing.infer.generate import Conversation
    from dianjing.infer.questions import questions_of

    data, images = given.data, given.images
    recipe = Path(given.run).expanduser() / RECIPE
    if not data and recipe.is_file():
        config = load_recipe(recipe).data
        data, images = config.path if isinstance(config.path, str) else config.path[0], config.images
    if not data:
        return []
    try:
        records = load_records(data, on_bad_record="skip").records
        spread = records[:: max(1, len(records) // RECORDS)][:RECORDS]
        questions = [questions_of(record)[0] for record in spread]
        from dianjing.infer.load import picture_rule

        pictures = load_pictures(questions, images or str(Path(data).parent), picture_rule(given.run))
    except DataError as error:
        if given.data:
            raise
        text = f"the data of the run is not there any more, so drawn pictures alone are compared: {error}"
        notices.print(text, style="yellow", markup=False, soft_wrap=True)
        return []
    return [Conversation((), one.text, [pictures[name] for name in one.images]) for one in questions]
