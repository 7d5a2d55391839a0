"""Follow docs/course.md without a GPU, from its first command to its last, in a new folder.

    python benchmarks/course.py [--folder DIR]

The commands are those of the blocks marked ```sh cpu on the page. Each must succeed; its time is printed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "course.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a new folder to work in; a temporary one if not given")
    folder = parser.parse_args().folder
    if folder:
        folder.mkdir(parents=True)
        follow(folder)
        return
    with tempfile.TemporaryDirectory(prefix="course-") as name:
        follow(Path(name))


def follow(folder: Path) -> None:
    """Run the commands of the page in a folder, and stop at the first that fails."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    began = time.monotonic()
    for command in commands(PAGE.read_text(encoding="utf-8")):
        print(f"$ {command.splitlines()[0]}", flush=True)
        start = time.monotonic()
        code = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, check=False).returncode
        print(f"  exit {code}, {time.monotonic() - start:.1f} s", flush=True)
        if code:
            raise SystemExit(f"the course stops here: {command}")
    print(f"the course, start to end: {time.monotonic() - began:.0f} s")


def commands(page: str) -> Iterator[str]:
    """Yield each command of the CPU way; the text of a here-document belongs to the command before it."""
    for block in re.findall(r"^```sh cpu\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        yield from re.findall(r"^.*<<'END'\n(?:.*\n)*?END$|^.+$", block, re.MULTILINE)


if __name__ == "__main__":
    main()
