"""`dianjing export RUN OUT`: merge, write in the hub's layout, read back, compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from dianjing.config.load import load_recipe
from dianjing.data.record import load_records
from dianjing.errors import DianjingError
from dianjing.export.export import export
from dianjing.use.ask import load_pictures
from dianjing.use.generate import Conversation
from dianjing.use.load import load_for_use
from dianjing.use.questions import questions_of

NAME = "export"
SUMMARY = "write a run as a Hugging Face LLaVA folder that equals it"
RECORDS = 8
"""Records of the data that the receipt covers, besides the drawn pictures."""


def run(arguments: list[str]) -> int:
    """Export a run and say how equal it is."""
    parser = argparse.ArgumentParser(prog=f"dianjing {NAME}", description=SUMMARY)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--data", help="LLaVA JSON to compare run and export on (default: the run's own)")
    parser.add_argument("--images", help="its image folder (default: the folder of the data file)")
    given = parser.parse_args(arguments)
    notices = Console(stderr=True)
    seer = load_for_use(given.run, "cpu")
    conversations = _conversations(given.run, given.data, given.images, notices) if seer.can_see else []
    cases = export(seer, given.out, conversations)
    difference = max(case.logit_difference for case in cases)
    notices.print(
        f"run and export agree on {len(cases)} conversations: same tokens, same greedy answers, "
        f"logits within {difference:.1e} (parity.json)"
    )
    print(given.out)
    return 0


def _conversations(run: str, data: str | None, images: str | None, notices: Console) -> list[Conversation]:
    """Return a few real questions with their pictures, spread over the data."""
    path, root = data, images
    if path is None and (Path(run) / "recipe.toml").is_file():
        config = load_recipe(Path(run) / "recipe.toml").data
        path = config.path if isinstance(config.path, str) else config.path[0]
        root = config.images or None
    if path is None:
        return []
    try:
        records = load_records(path, on_bad_record="skip").records
        chosen = records[:: max(1, len(records) // RECORDS)][:RECORDS]
        questions = [questions_of(record)[0] for record in chosen]
        pictures = load_pictures(questions, root or str(Path(path).parent))
    except DianjingError as error:
        if data is not None:
            raise
        notices.print(f"compared on drawn pictures only: {error}", style="yellow")
        return []
    return [Conversation((), one.text, [pictures[name] for name in one.images]) for one in questions]
