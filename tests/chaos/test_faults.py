"""The short form of `make faults`: a few of its rows, each once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = "train.jsonl torn|saves, finetune|the tower's weights changed"


@pytest.mark.timeout(300)
def test_the_promises_are_kept() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "benchmarks/faults.py", "--tries", "1", "--only", SHORT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| 1 | 1 |") == 3
