"""`dianjing demo`: watch a text-only model get eyes, on drawn scenes, in a few minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dianjing.cli.flags import parse

NAME = "demo"
SUMMARY = "watch a blind model learn to see, on drawn scenes"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing demo`."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("demo-out")
    """Folder for data, runs, export, results.json and report.html; an earlier demo in it is replaced."""
    scenes: Annotated[int, tyro.conf.arg(metavar="N")] = 4000
    """Training scenes of each stage; fewer are quicker and see less."""


def run(arguments: list[str]) -> int:
    """Run the demo and print what it found."""
    given = parse(Arguments, arguments, NAME, SUMMARY)

    # Slow to import, so a typing error is said before.
    from dianjing.demo.report import write_report
    from dianjing.demo.run import run_demo, score_table
    from dianjing.tinyworld.records import Sizes

    notices = Console(stderr=True)
    results = run_demo(given.out, Sizes(pretrain=given.scenes, finetune=given.scenes), notices)
    report = write_report(given.out, results)
    Console().print(score_table(results))
    seconds = results.seconds
    work = sum(seconds[name] for name in ("pretrain", "finetune", "scoring"))
    notices.print(
        f"training and scoring took {work:.0f} s (pretrain {seconds['pretrain']:.0f}, finetune "
        f"{seconds['finetune']:.0f}, scoring {seconds['scoring']:.0f}); run and export agree within "
        f"{results.parity:.1e}\n"
        f"look:  {report} (curves, pictures, answers), {given.out / 'compare.html'}\n"
        f"ask:   dianjing chat {given.out / 'finetune'} --image {given.out}/data/images/held_out/00000.png\n"
        f"reuse: {given.out / 'export'} is a LLaVA folder that transformers loads",
        highlight=False,
        soft_wrap=True,
    )
    return 0
