"""`dianjing recipes new`: both stages' recipes for data and models, which train as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dianjing.cli.main import main
from dianjing.config.load import load_recipe
from dianjing.config.steps import few_steps
from dianjing.run.journal import read_journal

BOTH = ("a.json", "b.json")
MODELS = ["--llm", "tinyworld", "--vision-tower", "tinyworld"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        Image.new("RGB", (40, 30), (80 * index, 90, 120)).save(tmp_path / f"{index}.png")
    return tmp_path


def write(folder: Path, name: str, questions: list[str], turns: int = 1, **fields: Any) -> str:
    """Write a record for each of the first questions of its turns."""
    records = []
    for index, question in enumerate(questions):
        asked = [f"<image>\n{question}", *[f"{question} ({turn})" for turn in range(1, turns)]]
        said = [{"from": who, "value": value} for text in asked for who, value in (("human", text), ("gpt", "A ring."))]
        records.append({"id": str(index), "image": f"{index % 3}.png", "conversations": said, **fields})
    (folder / name).write_text(json.dumps(records), encoding="utf-8")
    return name


def new(*arguments: str) -> int:
    return main(["recipes", "new", *arguments, *MODELS])


def test_each_stage_gets_its_records_and_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = write(folder, "photos_caption.json", ["Describe it."] * 12, type="caption")
    talks = write(folder, "photos_conversation.json", [f"Is it {i}?" for i in range(9)], turns=2, type="conversation")
    held_out = write(folder, "held.json", ["What is it?"])
    assert new(talks, captions, "--held-out", held_out) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["photos_pretrain.toml", "photos_finetune.toml"]
    assert "pretrain: photos_caption.json: 12 records, batch 4, 100 epochs: 300 steps" in err
    assert "dianjing train photos_pretrain.toml && dianjing train photos_finetune.toml" in err
    pretrain, finetune = map(load_recipe, out.split())
    assert (pretrain.data.path, finetune.data.path) == (captions, talks)
    assert finetune.projector.init_from == pretrain.output == "runs/photos_pretrain"
    assert (pretrain.language_model.tuning, finetune.language_model.tuning) == ("frozen", "lora")
    for recipe, records in ((pretrain, 12), (finetune, 9)):
        assert few_steps(recipe, records) == ""
        assert recipe.train.sample_every == recipe.train.save_every == 75
        assert recipe.train.sample_path == held_out
    assert new(talks, captions) == 2
    assert "photos_pretrain.toml: it already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "pretrain", "finetune"),
    [
        ([("a.json", ["Which?"] * 5, 1, {})], "a.json", "a.json"),
        ([("a.json", ["Say it."] * 6, 1, {}), ("b.json", ["x", "y"], 1, {})], "a.json", "b.json"),
        (
            [("a.json", ["Say it."] * 6, 2, {}), ("b.json", ["x", "y"], 1, {})],
            ("a.json", "b.json"),
            ("a.json", "b.json"),
        ),
        ([("a.json", ["x", "y"], 1, {"type": "description"}), ("b.json", ["z"], 1, {})], "a.json", "b.json"),
    ],
    ids=["one file for both", "captions by their questions", "no captions", "captions by their type"],
)
def test_which_files_are_captions(
    folder: Path, files: list[Any], pretrain: object, finetune: object, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [write(folder, name, questions, turns, **fields) for name, questions, turns, fields in files]
    assert new(*names, "--out", "recipes") == 0
    found = [load_recipe(path).data.path for path in capsys.readouterr().out.split()]
    assert found == [pretrain, finetune]


def test_what_is_written_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write(folder, "mine.json", ["Which shape?", "Which colour?", "Where?"])
    assert new(name) == 0
    for path in capsys.readouterr().out.split():
        assert main(["train", path, "--train.max-steps", "3", "--quiet"]) == 0
        assert len(read_journal(Path(load_recipe(path).output))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data is named; write dianjing recipes new DATA"),
        (["none.json"], "none.json: cannot be read"),
        (["empty.json"], "empty.json: there is no record in it"),
        (["mine.json", "--held-out", "none.json"], "none.json: cannot be read"),
        (["mine.json", "--llm", "./nowhere"], "nowhere: no such language model folder"),
    ],
)
def test_what_is_refused(folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "mine.json", ["Which?"])
    (folder / "empty.json").write_text("[]", encoding="utf-8")
    models = MODELS if "--llm" not in arguments else MODELS[2:]
    assert main(["recipes", "new", *arguments, *models]) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("*.toml"))
