"""How the packages of an extra are installed, in words that work from a clone and from a wheel."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path


def install(extra: str) -> str:
    """Return the command that installs an extra's packages next to this one.

    It names the packages themselves: "dianjing[extra]" would need an index that has Dianjing.
    """
    try:
        found = [re.fullmatch(r"(.+?)\s*;\s*extra == ['\"](.+)['\"]", line) for line in requires("dianjing") or ()]
    except PackageNotFoundError:  # read from its source folder, never installed
        found = []
    names = [match[1] for match in found if match and match[2] == extra]
    return f"{_pip()} install {shlex.join(names or [f'dianjing[{extra}]'])}"


def _pip() -> str:
    """Return how pip is called for this Python: by its name alone where that is found first."""
    first = shutil.which("pip")
    here = Path(sys.executable).parent
    return "pip" if first and Path(first).parent == here else f"{shlex.quote(sys.executable)} -m pip"
