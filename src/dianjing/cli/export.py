"""`dianjing export RUN OUT`: merge, write in the hub's layout, read back, compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from dianjing.cli.flags import parse
from dianjing.config.load import load_recipe
from dianjing.errors import DataError
from dianjing.run.layout import RECIPE

if TYPE_CHECKING:
    from dianjing.export.receipt import Proof
    from dianjing.infer.generate import Conversation

NAME = "export"
SUMMARY = "write a run as a Hugging Face LLaVA folder that equals it"
RECORDS = 8
"""Records of the data that run and export are compared on, besides drawn pictures."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line gives."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write; it must not exist."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """LLaVA JSON to compare run and export on; the run's own if not given."""
    images: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of its pictures; the data file's own if not given."""
    format: Literal["hf", "adapter", "xtuner", "llava", "gguf"] = "hf"
    """hf: merged, for transformers, vLLM and others; adapter: only what was learned; xtuner, llava: for those
    programs; gguf: for llama.cpp and Ollama."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights written."""
    quantize: str = "f16"
    """Type of the language model's weights in a GGUF."""
    verify: bool = False
    """Let llama.cpp itself answer from a GGUF, too."""


def run(arguments: list[str]) -> int:
    """Export a run and say how equal it is."""
    given = parse(Arguments, arguments, NAME, SUMMARY)

    # Slow to import, so a typing error is said before.
    from dianjing.export.export import Options, export, require_free
    from dianjing.infer.load import load_for_use

    require_free(given.out)
    notices = Console(stderr=True)
    conversations = real_conversations(given, notices)
    options = Options(dtype=given.dtype, quantize=given.quantize, verify=given.verify)
    proof = export(load_for_use(given.run, "cpu"), given.out, conversations, given.format, options)
    notices.print(said(proof), soft_wrap=True, highlight=False, markup=False)
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
        pictures = load_pictures(questions, images or str(Path(data).parent))
    except DataError as error:
        if given.data:
            raise
        text = f"the data of the run is not there any more, so drawn pictures alone are compared: {error}"
        notices.print(text, style="yellow", markup=False, soft_wrap=True)
        return []
    return [Conversation((), one.text, [pictures[name] for name in one.images]) for one in questions]
