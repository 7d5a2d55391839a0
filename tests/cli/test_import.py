"""`dianjing import`: what it prints, and how it ends when something is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dianjing.cli.main import main
from tests.loaded_models import picture
from tests.xtuner import XTUNER

TINY = XTUNER / "tiny"
PLACES = ["--llm", str(TINY / "tiny_internlm2"), "--vision-tower", str(TINY / "tiny_clip")]


def test_a_checkpoint_becomes_a_run_that_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["import", str(TINY / "finetune_iter_10.pth"), str(run), *PLACES]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{run}\n"
    for line in (
        "XTuner checkpoint: 62 tensors",
        "matched: 50, as 54 of ours (9,712 parameters)",
        "missing: 0, unexpected: 0",
        "dropped: 12, behind the layer of the tower that the projector reads",
        "optimizer: AdamW's state of 54 tensors",
        "it can be asked and exported, not trained on: its data (/data/llava/train/train.json",
    ):
        assert line in shown.err
    image = tmp_path / "x.png"
    picture(40, 30).save(image)
    asked = subprocess.run(
        [sys.executable, "-m", "dianjing", "chat", str(run), "--image", str(image)],
        input="What is it?\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr


class Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> object:
        import os

        return (os.system, (f"touch {self.path}",))


def test_an_evil_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil, ran = tmp_path / "iter_1.pth", tmp_path / "ran"
    torch.save({"state_dict": {}, "x": Touch(str(ran))}, evil)
    assert main(["import", str(evil), str(tmp_path / "run"), *PLACES]) == 2
    said = capsys.readouterr().err
    assert f"error: {evil}: refused, nothing in it was run: it asks for posix.system" in said
    assert "Traceback" not in said
    assert not ran.exists()
    assert not (tmp_path / "run").exists()


def test_mistakes_are_said_with_the_flag_that_puts_them_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        assert main(["import", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    source, run = TINY / "pretrain_iter_10.pth", tmp_path / "run"
    assert "give --llm DIR" in said(source, run)
    assert "no such file or folder; give an XTuner checkpoint" in said(tmp_path / "gone.pth", run, *PLACES)
    assert "already there" in said(source, tmp_path, *PLACES)
    shutil.copytree(TINY / "tiny_internlm2", tmp_path / "llm")
    assert "it has no mm_projector" in said(tmp_path / "llm", run, *PLACES)
