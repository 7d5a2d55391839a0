"""chat, compare, eval and export from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import dianjing.cli.eval as eval_module
from dianjing.cli.main import main
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model, write_run
from tests.tiny import TinyDataset


@pytest.fixture
def run(make_recipe: MakeRecipe) -> str:
    recipe = make_recipe("finetune", language_model={"tuning": "lora"})
    return str(write_run(recipe, loaded_model(recipe)))


def test_one_prompt_prints_the_answer_alone(
    run: str, tiny_dataset: TinyDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(tiny_dataset.images / "wide.png")
    arguments = ["chat", run, "--image", picture, "--image", picture, "--max-new-tokens", "5"]
    assert main([*arguments, "--prompt", "What?"]) == 0
    first = capsys.readouterr().out
    assert main([*arguments, "--prompt", "What?"]) == 0
    assert capsys.readouterr().out == first
    assert first.endswith("\n")


def test_a_conversation(run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n/reset\n/exit\n"))
    assert main(["chat", run, "--max-new-tokens", "3"]) == 0
    assert "a new conversation" in capsys.readouterr().out


def test_a_text_model_says_that_it_does_not_see(
    tiny_llm: Path, tiny_dataset: TinyDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(tiny_dataset.images / "wide.png")
    assert main(["chat", str(tiny_llm), "--image", picture, "--prompt", "What?", "--max-new-tokens", "3"]) == 0
    assert "cannot see" in capsys.readouterr().err


def test_eval_writes_what_it_prints(
    run: str, tiny_dataset: TinyDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores" / "out.json"
    arguments = ["eval", run, str(tiny_dataset.path), "--images", str(tiny_dataset.images)]
    assert main([*arguments, "--max-new-tokens", "4", "--json", str(out)]) == 0
    shown, written = capsys.readouterr().out, json.loads(out.read_text())
    assert written["overall"]["n"] == 12
    assert written["by_type"]["text only"]["n"] == 3
    assert all(word in shown for word in ("other picture", "no picture", "sight", "text only"))
    assert main([*arguments, "--max-new-tokens", "4", "--json", str(out), "--limit", "2"]) == 0
    assert json.loads(out.read_text())["overall"]["n"] == 3


def test_a_stopped_eval_goes_on(
    run: str,
    tiny_dataset: TinyDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["eval", run, str(tiny_dataset.path), "--images", str(tiny_dataset.images), "--max-new-tokens", "4"]
    assert main([*arguments, "--json", str(tmp_path / "straight.json")]) == 0
    capsys.readouterr()
    keep = eval_module._Kept.__setitem__

    def stop_after_five(said: Any, key: Any, answer: str) -> None:
        keep(said, key, answer)
        if len(said) == 5:
            raise KeyboardInterrupt

    out = tmp_path / "out.json"
    with monkeypatch.context() as patched:
        patched.setattr(eval_module._Kept, "__setitem__", stop_after_five)
        assert main([*arguments, "--json", str(out)]) == 130
    kept = tmp_path / "out.json.answers.jsonl"
    assert not out.exists()
    assert len(kept.read_text().splitlines()) == 1 + 5
    capsys.readouterr()
    assert main([*arguments[:-1], "5", "--json", str(out)]) == 2, "answers of another length"
    assert str(kept) in capsys.readouterr().err
    assert main([*arguments, "--json", str(out)]) == 0
    assert "5 were there already" in capsys.readouterr().err
    assert json.loads(out.read_text()) == json.loads((tmp_path / "straight.json").read_text())
    assert not kept.exists()


def test_compare_writes_a_page(
    run: str, tiny_llm: Path, tiny_dataset: TinyDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "compare.html"
    arguments = ["compare", str(tiny_llm), run, "--data", str(tiny_dataset.path), "--images"]
    assert main([*arguments, str(tiny_dataset.images), "--out", str(page), "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    html = page.read_text()
    assert html.count('class="model"') == 2
    assert html.count('class="row"') == 12


def test_export_and_what_becomes_of_it(
    run: str, tiny_dataset: TinyDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", run, str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    receipt = json.loads((out / "parity.json").read_text())
    assert receipt["conversations"] == 8 + 5  # the records of the run's data, and the drawn pictures
    asked = ["--image", str(tiny_dataset.images / "tall.jpg"), "--prompt", "What?", "--max-new-tokens", "6"]
    answers = []
    for model in (run, str(out)):
        assert main(["chat", model, *asked]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_export_without_its_data_says_so(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("pretrain", data={"path": str(tmp_path / "gone.json")})
    run = write_run(recipe, loaded_model(recipe))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "drawn pictures alone" in capsys.readouterr().err
