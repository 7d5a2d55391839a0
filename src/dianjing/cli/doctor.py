"""`dianjing doctor [--json] [--skip-test]`: is this installation well?"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from dianjing import __version__
from dianjing.cli.flags import parse

if TYPE_CHECKING:
    from dianjing.doctor.doctor import Finding

NAME = "doctor"
SUMMARY = "say what is installed, missing or wrong on this machine, with a short self-test"
MARKS = {"well": "ok   ", "optional": "-    ", "wrong": "WRONG"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing doctor`."""

    json: bool = False
    """Print one JSON object."""
    skip_test: bool = False
    """Leave the self-test out."""


def run(arguments: list[str]) -> int:
    """Print the findings; return 0 if nothing is wrong, else 1."""
    given = parse(Arguments, arguments, NAME, SUMMARY)
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=given.json)
    console.print(f"dianjing {__version__}, Python {platform.python_version()}, {platform.platform()}")
    found = []
    for finding in _findings(given.skip_test):
        found.append(finding)
        console.print(f"{MARKS[finding.state]} {finding.subject:22} {finding.words}")
    wrong = [finding for finding in found if finding.state == "wrong"]
    if given.json:
        about = {"dianjing": __version__, "python": platform.python_version(), "platform": platform.platform()}
        print(json.dumps({**about, "well": not wrong, "findings": [asdict(one) for one in found]}, indent=1))
    else:
        console.print(f"{len(wrong)} wrong: {', '.join(one.subject for one in wrong)}" if wrong else "all is well")
    return 1 if wrong else 0


def _findings(skip_test: bool) -> Iterator[Finding]:
    from dianjing.doctor.doctor import caches, conflicts, device, packages  # slow to import

    yield from packages()
    yield from conflicts()
    yield from device()
    yield from caches()
    if not skip_test:
        from dianjing.doctor.self_test import self_test

        yield from self_test()
