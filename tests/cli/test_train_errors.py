"""`dianjing train` on what it cannot use: exit code 2, one clear message, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dianjing.cli.main import main
from dianjing.config.load import save_recipe
from dianjing.config.schema import Recipe
from dianjing.run import checkpoint as checkpoint_module
from dianjing.run.checkpoint import newest, read_state
from dianjing.run.fingerprints import PROJECTOR_START, SUBJECTS
from dianjing.run.layout import checkpoints
from dianjing.run.lock import locked
from dianjing.train import loop as loop_module
from dianjing.train.loop import train
from tests.tiny import tiny_records, write_clip, write_images


@pytest.fixture
def file(make_recipe: Any, tmp_path: Path) -> Path:
    save_recipe(make_recipe(train={"epochs": 1}), tmp_path / "run.toml")
    return tmp_path / "run.toml"


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run `dianjing train`, which must refuse; return the message without "error: "."""
    assert main(["train", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    before, _, message = err.rpartition("error: ")
    assert "error" not in before
    return message


def test_the_command_itself(file: Path) -> None:
    """As a process: the code and message of the others are the same, in less time."""
    command = [sys.executable, "-m", "dianjing", "train", str(file), "--data.max-tokens", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --data.max-tokens: data.max_tokens = 0: it must be at least 1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "nowhere.toml: there is no such recipe; give a TOML file or a shipped recipe: course"),
        (["FILE", "--data.path", "no.json"], "no.json"),
        (["FILE", "--data.images=no/where"], "no/where: there is no such image folder"),
        (["FILE", "--language-model.folder", "no-llm"], "no-llm: no such language model folder"),
        (["FILE", "--language-model.template", "interlm2_chat"], "internlm2_chat"),
        (["FILE", "--data.max-tokens", "20"], "tokens, but max_tokens is 20; shorten it, raise data.max_tokens"),
        (["FILE", "--projector.init-from", "no-run"], "no-run: no such run or checkpoint"),
        (["FILE", "--allow-changed", "tower"], "--allow-changed tower: there is no such input; choose from data, "),
        (["FILE", "--resume"], "there is no checkpoint in it; train without --resume first"),
    ],
)
def test_flags_and_places(file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in complaint(capsys, *(str(file) if word == "FILE" else word for word in arguments))
    assert not (file.parent / "run").exists()


def break_record(index: int, **changes: Any) -> list[dict[str, Any]]:
    records = tiny_records()
    records[index] |= changes
    return records


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": value} for role, value in turns]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (break_record(0, image="gone.png"), 'data.json: record 0 ("wide"): picture "gone.png"'),
        (break_record(0, image=["wide.png", "tall.jpg"]), 'record 0 ("wide"): 1 <image> marker'),
        (break_record(2, image="wide.png"), 'record 2 ("text"): '),
        (break_record(2, conversations=[]), 'record 2 ("text"): '),
        (break_record(2, conversations=talk(("system", "x"), ("gpt", "y"))), 'record 2 ("text"): '),
        (break_record(0, image="broken.jpg"), 'record 0 ("wide"): picture "broken.jpg"'),
        (break_record(0, image="../secret.png"), 'record 0 ("wide"): picture "../secret.png"'),
    ],
    ids=["missing picture", "too few markers", "no marker", "empty", "unknown role", "broken picture", "outside"],
)
def test_data(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], records: list[dict[str, Any]], message: str
) -> None:
    write_images(tmp_path / "images")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "secret.png")
    Image.radial_gradient("L").save(tmp_path / "images" / "broken.jpg")
    content = (tmp_path / "images" / "broken.jpg").read_bytes()
    (tmp_path / "images" / "broken.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    flags = ["--data.path", tmp_path / "data.json", "--data.images", tmp_path / "images"]
    assert message in complaint(capsys, file, *flags)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_projector_of_another_tower(
    file: Path, tmp_path: Path, make_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_clip(tmp_path / "clip", hidden_size=32, num_attention_heads=4)
    wide = make_recipe(vision_tower={"folder": str(other)}, output=str(tmp_path / "wide"), train={"max_steps": 1})
    train(wide, quiet=True)
    message = complaint(capsys, file, "--projector.init-from", tmp_path / "wide")
    assert "it goes 32 -> 32, here 24 -> 32 is needed" in message


def test_a_folder_that_cannot_be_made(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(capsys, file, "--output", file / "run")
    assert message == f"{file / 'run'}: a run cannot be written there: Not a directory; choose another output\n"


def test_a_disk_that_is_too_small(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    message = complaint(capsys, file)
    assert "73,497 bytes are needed for checkpoints, but only 1,000 are free on this disk" in message


@pytest.fixture
def started(make_recipe: Any, tmp_path: Path) -> Recipe:
    """Return a recipe of four steps of which two are done, with a checkpoint each."""
    recipe = make_recipe(train={"epochs": 2, "save_every": 1, "keep": 9})
    run = train(recipe, quiet=True)
    for checkpoint in checkpoints(run)[2:]:
        checkpoint.rename(tmp_path / checkpoint.name)
    save_recipe(recipe, tmp_path / "run.toml")
    return recipe


def test_a_disk_that_is_full_while_saving(
    started: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", fail)
        message = complaint(capsys, tmp_path / "run.toml", "--resume")
    assert "step-000003: the checkpoint cannot be written: [Errno 28] No space left on device; make room" in message
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*.*")} == before
    assert main(["train", str(tmp_path / "run.toml"), "--resume", "--quiet"]) == 0
    assert read_state(newest(tmp_path / "run")).step == 4


def test_a_torn_checkpoint_is_passed_over_aloud(
    started: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoints(tmp_path / "run")[-1] / "optimizer.safetensors").write_bytes(b"torn")
    assert main(["train", str(tmp_path / "run.toml"), "--resume"]) == 0
    said = capsys.readouterr().err
    assert "step-000002: optimizer.safetensors has 4 bytes, not " in said
    assert "using step-000001" in said
    assert "resumed from " in said


def sign(checkpoint: Path) -> None:
    """Make a checkpoint whole again after one of its files was edited."""
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    for entry in manifest["files"]:
        path = checkpoint / entry
        manifest["files"][entry] = {"bytes": path.stat().st_size, "sha256": checkpoint_module._digest(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_checkpoint_of_other_weights(started: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only someone who edits a checkpoint gets here; even then nothing is loaded half."""
    last = checkpoints(tmp_path / "run")[-1]
    weights = load_file(last / "trainable.safetensors")
    name = min(weights)
    save_file({**weights, name: torch.zeros(3)}, last / "trainable.safetensors")
    sign(last)
    assert f"{name} (3 in the checkpoint, " in complaint(capsys, tmp_path / "run.toml", "--resume")


def test_a_second_writer_is_refused(started: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with locked(tmp_path / "run", print):
        assert "already holds a run, up to step-000002; give --resume" in complaint(capsys, tmp_path / "run.toml")
        message = complaint(capsys, tmp_path / "run.toml", "--resume")
        assert message.startswith(f"{tmp_path / 'run'}: process {os.getpid()} on {socket.gethostname()} is writing")
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_torn_line_in_the_middle_of_the_journal_resumes(
    started: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "run" / "train.jsonl"
    first, *rest = journal.read_text().splitlines(keepends=True)
    journal.write_text(first[:20] + "\n" + first + "".join(rest))
    assert main(["train", str(tmp_path / "run.toml"), "--resume"]) == 0
    assert f"{journal}: damaged, and left out from here on: line 1\n" in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in journal.read_text().splitlines()] == [1, 2, 3, 4]


def change_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight + 1 for name, weight in weights.items()}, file, metadata={"format": "pt"})


def change_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")


def change_picture(folder: Path) -> None:
    Image.new("RGB", (60, 20), "navy").save(folder / "wide.png", "BMP")


OTHERS = [
    ("language_model", change_weights, "the base LLM: its weights, config.json or tokenizer.json"),
    ("language_model", change_config, "the base LLM: "),
    ("language_model", change_tokenizer, "the tokenizer or its chat template (language_model.folder)"),
    ("vision_tower", change_weights, "the vision tower: its weights or config.json (vision_tower.folder)"),
    ("pictures", change_picture, "the pictures: other content under the same names (data.images)"),
]


@pytest.mark.parametrize(("part", "change", "named"), OTHERS)
def test_other_inputs_under_the_same_names_are_refused_on_resume(
    make_recipe: Any,
    tiny_llm: Path,
    tiny_clip: Path,
    tiny_dataset: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    change: Any,
    named: str,
) -> None:
    """Same sizes, same names, other content; what was changed is named, and put back it goes on."""
    bases = {"language_model": tiny_llm, "vision_tower": tiny_clip, "pictures": tiny_dataset.images}
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in bases.items()}
    Image.new("RGB", (60, 20), "red").save(folders["pictures"] / "wide.png", "BMP")
    recipe = make_recipe(
        train={"epochs": 1, "save_every": 1, "keep": 9},
        language_model={"folder": str(folders["language_model"])},
        vision_tower={"folder": str(folders["vision_tower"])},
        data={"images": str(folders["pictures"])},
    )
    save_recipe(recipe, tmp_path / "run.toml")
    shutil.rmtree(newest(train(recipe, quiet=True)))
    shutil.copytree(folders[part], tmp_path / "before")
    change(folders[part])
    message = complaint(capsys, tmp_path / "run.toml", "--resume")
    assert "it is of another run; undo this, or start a new run; or, if it is meant, give --allow-changed " in message
    assert named in message
    shutil.rmtree(folders[part])
    (tmp_path / "before").rename(folders[part])
    assert main(["train", str(tmp_path / "run.toml"), "--resume", "--quiet"]) == 0


def test_a_checkpoint_of_an_older_version_resumes_with_a_line(
    started: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = checkpoints(tmp_path / "run")[-1]
    fields = json.loads((last / "state.json").read_text(encoding="utf-8"))
    assert fields.pop("fingerprints").keys() == {*SUBJECTS, PROJECTOR_START}
    (last / "state.json").write_text(json.dumps(fields), encoding="utf-8")
    sign(last)
    assert main(["train", str(tmp_path / "run.toml"), "--resume"]) == 0
    assert (
        "is of an older version: whether base models or pictures have changed is not known" in capsys.readouterr().err
    )
    assert read_state(newest(tmp_path / "run")).fingerprints.keys() >= SUBJECTS.keys()


def test_a_run_says_what_it_does(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(file), "--train.log-every", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    told = [
        "language model: LlamaForCausalLM",
        "vision tower: CLIPVisionModel",
        "projector: ",
        "stage pretrain: ",
        "data: 8 records, 4 pictures, 2 text-only",
        "only 2 optimizer steps: 8 records in batches of 4, 1 epoch. In fewer than 100 a model hardly learns; ",
        "step 1/2  loss ",
        "step 2/2  loss ",
        "done: 2 steps, loss ",
        f"{tmp_path / 'run'} holds the checkpoint",
    ]
    places = [err.index(text) for text in told]
    assert places == sorted(places)


def test_a_run_that_was_stopped_names_the_whole_command_to_go_on_with(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_on_any_rank", lambda accelerator, number: signal.SIGINT)
    flags = ["--output", str(tmp_path / "my run"), "--train.save-every", "25"]
    for given in (flags, [*flags, "--resume"]):
        monkeypatch.setattr(loop_module, "_on_any_rank", lambda accelerator, number: signal.SIGINT)
        code = main(["train", str(file), *given, "--train.epochs", "2"])
        said = capsys.readouterr().err
        assert code == 130
        again = f"{file} --output '{tmp_path}/my run' --train.save-every 25"
        assert f"go on with: dianjing train {again} " in said
        assert said.count("--resume") == 1
