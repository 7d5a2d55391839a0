"""Runs of the folder are found and followed; nothing outside it is shown, started or written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dianjing.config.load import save_recipe
from dianjing.config.schema import Recipe
from dianjing.errors import ConfigError, DataError
from dianjing.run.lock import locked
from dianjing.studio.model_view import ModelView
from dianjing.studio.runs import PACKAGE, POINTS, Runs, Started
from tests.conftest import MakeRecipe
from tests.tiny import NUM_IMAGE_TOKENS, TinyDataset, tiny_records

ROW = {"epoch": 0.1, "learning_rate": 1e-3, "grad_norm": 1.0, "samples_per_second": 9.0}


def write_run(folder: Path, recipe: Recipe, steps: int = 5) -> None:
    folder.mkdir(parents=True)
    save_recipe(recipe, folder / "recipe.toml")
    rows = [{"step": step, "loss": 3.0 - step / steps, **ROW} for step in range(1, steps + 1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text + '{"step": 6, "lo')
    first = tiny_records()[0]
    answers: list[dict[str, Any]] = [
        {"step": step, "id": first["id"], "question": "?", "reference": "a", "answer": f"b{step}"} for step in (2, 4)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path, tiny_dataset: TinyDataset) -> Recipe:
    return make_recipe(train={"sample_path": str(tiny_dataset.path), "sample_every": 2})


def test_recipes_and_runs_of_the_folder_are_listed(recipe: Recipe, tmp_path: Path) -> None:
    project = tmp_path / "project"
    write_run(project / "runs" / "one", recipe)
    save_recipe(recipe, project / "mine.toml")
    (project / "other.toml").write_text('[project]\nname = "x"\n')
    (project / "broken.toml").write_text("= 3")
    write_run(tmp_path / "outside", recipe)
    (project / "linked").symlink_to(tmp_path / "outside")
    (project / "linked.toml").symlink_to(tmp_path / "outside" / "recipe.toml")
    write_run(project / ".hidden", recipe)
    write_run(project / "adapter", recipe)
    (project / "adapter" / "bases.json").write_text("{}")
    (project / "compare.html").write_text("<!doctype html>\n<head>" + '<meta name="generator" content="dianjing">')
    (project / "other.html").write_text("<!doctype html>")
    (project / "linked.html").symlink_to(project / "compare.html")
    runs = Runs(project, "")
    found = {"recipes": ["mine.toml"], "runs": ["runs/one"], "exports": ["adapter"], "pages": ["compare.html"]}
    assert runs.listing() == {**found, "going": []}
    assert "dianjing" in runs.page("compare.html")
    for name in ("other.html", "linked.html", "../outside/x.html", "mine.toml"):
        with pytest.raises(DataError, match="no page"):
            runs.page(name)


def test_the_recipes_of_the_package_are_not_those_of_the_folder() -> None:
    assert Runs(PACKAGE.parent, "").listing()["recipes"] == []


def test_a_folder_full_of_data_is_passed_over(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dianjing.studio.runs.MANY", 5)
    for folder, others in (("few", 3), ("many", 6)):
        write_run(tmp_path / folder / "one", recipe)
        for number in range(others):
            (tmp_path / folder / f"{number}.png").touch()
    assert Runs(tmp_path, "").listing()["runs"] == ["few/one"]


def test_a_run_is_followed_by_its_files(recipe: Recipe, tmp_path: Path) -> None:
    write_run(tmp_path / "project" / "one", recipe)
    run = Runs(tmp_path / "project", "").run("one")
    assert run["curve"] == [[step, 3.0 - step / 5] for step in range(1, 6)]
    assert (run["last"]["step"], run["going"], run["exit_code"]) == (5, False, None)
    assert [row["answer"] for row in run["samples"]] == ["b4"]
    assert run["held_out"] == [[2, 0.0], [4, 0.0]]
    earlier = Runs(tmp_path / "project", "").run("one", step=2)
    assert [row["answer"] for row in earlier["samples"]] == ["b2"]


def test_a_long_curve_is_thinned_and_keeps_its_end(recipe: Recipe, tmp_path: Path) -> None:
    write_run(tmp_path / "project" / "one", recipe, steps=5000)
    curve = Runs(tmp_path / "project", "").run("one")["curve"]
    assert len(curve) <= POINTS
    assert (curve[0][0], curve[-1][0]) == (1, 5000)


def test_sample_pictures_come_from_the_named_folders_only(
    recipe: Recipe, tmp_path: Path, tiny_dataset: TinyDataset
) -> None:
    write_run(tmp_path / "project" / "one", recipe)
    name, first = "one", tiny_records()[0]["id"]
    elsewhere = Runs(tmp_path / "project", "")
    assert elsewhere.run(name)["samples"][0]["picture"] is False
    with pytest.raises(DataError, match="no picture"):
        elsewhere.picture(name, first)
    named = Runs(tmp_path / "project", str(tiny_dataset.path.parent))
    assert named.run(name)["samples"][0]["picture"] is True
    assert named.picture(name, first).size


@pytest.mark.parametrize("text", ["{}\n", "[]\n", "nonsense\n", '{"step": 1, "loss": "x"}\n', "\n"])
def test_a_damaged_line_is_left_out_and_named(recipe: Recipe, tmp_path: Path, text: str) -> None:
    write_run(tmp_path / "project" / "one", recipe)
    whole = Runs(tmp_path / "project", "").run("one")
    assert whole["damaged_lines"] == []
    for name in ("train.jsonl", "samples.jsonl"):
        file = tmp_path / "project" / "one" / name
        file.write_text(text + file.read_text())
    run = Runs(tmp_path / "project", "").run("one")
    assert run["damaged_lines"] == [1]
    assert (run["curve"], run["samples"]) == (whole["curve"], whole["samples"])


def test_a_run_that_is_written_elsewhere_is_not_started(recipe: Recipe, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    recipe = replace(recipe, output=str(project / "one"))
    save_recipe(recipe, project / "mine.toml")
    with locked(project / "one", print), pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* is writing"):
        Runs(project, "").start("mine.toml", resume=False)
    assert not (project / "mine.toml.log").exists()


def test_what_is_no_number_is_left_out_of_the_curve(recipe: Recipe, tmp_path: Path) -> None:
    write_run(tmp_path / "project" / "one", recipe)
    with (tmp_path / "project" / "one" / "train.jsonl").open("w") as file:
        file.write(json.dumps({"step": 1, "loss": float("nan"), **ROW}) + "\n")
    (tmp_path / "project" / "one" / "recipe.toml").write_text("damaged")
    run = Runs(tmp_path / "project", "").run("one")
    assert run["curve"] == [[1, None]]
    assert run["samples"][0]["picture"] is False
    json.dumps(run, allow_nan=False)


@pytest.mark.parametrize("name", ["", "..", "../outside", "/etc", "none", "one/../one"])
def test_only_what_is_listed_is_opened(recipe: Recipe, tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "project" / "one", recipe)
    write_run(tmp_path / "outside", recipe)
    runs = Runs(tmp_path / "project", "")
    for ask in (runs.run, runs.recipe, lambda one: runs.start(one, resume=False), runs.stop):
        with pytest.raises(DataError):
            ask(name)


def test_a_recipe_that_writes_elsewhere_is_not_started(recipe: Recipe, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for output in (tmp_path / "outside", project, project / ".." / "x"):
        save_recipe(replace(recipe, output=str(output)), project / "mine.toml")
        with pytest.raises(ConfigError, match="outside"):
            Runs(project, "").start("mine.toml", resume=False)
    assert sorted(path.name for path in project.iterdir()) == ["mine.toml"]


def test_the_model_is_shown_a_record_as_in_training(recipe: Recipe, tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    from dianjing.data.record import Place

    save_recipe(recipe, tmp_path / "mine.toml")
    fields = tiny_records()[0]
    seen = ModelView().text(str(tmp_path / "mine.toml"), fields, Place("data.json", 0, 0))
    kinds = [part["kind"] for part in seen["parts"]]
    assert {"plain", "supervised", "picture"} == set(kinds)
    assert f"{NUM_IMAGE_TOKENS} image tokens" in next(
        part["text"] for part in seen["parts"] if part["kind"] == "picture"
    )
    answer = next(turn["value"] for turn in fields["conversations"] if turn["from"] == "gpt")
    assert answer in "".join(part["text"] for part in seen["parts"] if part["kind"] == "supervised")
    image = fields["image"] if isinstance(fields["image"], str) else fields["image"][0]
    picture = ModelView().picture(str(tmp_path / "mine.toml"), str(tiny_dataset.images), image)
    assert picture.width == picture.height


STOPS = "import pathlib, signal, sys; signal.sigwait([signal.SIGTERM]); pathlib.Path(sys.argv[1]).touch()"


def test_the_end_waits_for_the_checkpoint_of_a_run(tmp_path: Path) -> None:
    runs = Runs(tmp_path, "")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # inherited: the signal waits until it is waited for
    try:
        process = subprocess.Popen([sys.executable, "-c", STOPS, str(tmp_path / "checkpoint")])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    runs._started[runs.folder / "mine"] = Started(process=process, log=tmp_path / "log")
    assert runs.listing()["going"] == ["mine"]
    assert runs.end() == ["mine"]
    assert (tmp_path / "checkpoint").exists()
    assert runs.listing()["going"] == runs.end() == []


def test_a_log_does_not_go_where_a_link_leads(recipe: Recipe, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "precious").write_text("mine")
    save_recipe(replace(recipe, output=str(project / "run")), project / "mine.toml")
    (project / "mine.toml.log").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"mine\.toml\.log"):
        Runs(project, "").start("mine.toml", resume=False)
    assert (tmp_path / "precious").read_text() == "mine"
