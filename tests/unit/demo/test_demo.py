"""A demo too small to learn anything still does all of it, and says so honestly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from dianjing.cli.main import main
from dianjing.demo.report import write_report
from dianjing.demo.run import RESULTS, Results, run_demo, score_table
from dianjing.demo.tiny import tiny_world
from dianjing.demo.world import World
from dianjing.errors import ConfigError
from dianjing.tinyworld.records import Sizes, write_demo_data
from dianjing.train.interrupt import Stopped

SMALL = Sizes(pretrain=16, finetune=8, questions_per_scene=2, held_out=9, held_out_pairs=4, captions=2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, World, Results]:
    out = tmp_path_factory.mktemp("demo")
    world, results = run_demo(out, lambda: tiny_world(out, SMALL), Console(quiet=True))
    write_report(out, world, results)
    return out, world, results


def test_results_have_the_promised_form(demo: tuple[Path, World, Results]) -> None:
    found = json.loads((demo[0] / "results.json").read_text(encoding="utf-8"))
    assert set(found["stages"]) == {"base", "pretrain", "finetune"}
    for stage in found["stages"].values():
        for name in ("accuracy", "accuracy_other_picture", "accuracy_no_picture"):
            assert 0 <= stage[name] <= 1
        assert len(stage["by_type"]) >= 8
        assert stage["loss"] is None
    assert found["ceiling"] >= 0.8  # 9 questions: one may go wrong
    assert {"data", "pretrain", "finetune", "scoring", "export"} <= set(found["seconds"])


def test_the_blind_model_is_blind(demo: tuple[Path, World, Results]) -> None:
    base = demo[2].stages["base"]
    assert not base.report.can_see
    assert base.report.overall.mean("accuracy") == 0
    assert {one.answer for one in base.report.answers} <= {"I cannot see a picture.", "我看不到图片。"}


def test_everything_is_left_to_look_at(demo: tuple[Path, World, Results]) -> None:
    out = demo[0]
    for name in ("report.html", "compare.html"):
        page = (out / name).read_text(encoding="utf-8")
        assert "data:image/" in page
        assert "http://" not in page.replace("http://www.w3.org", "")
        assert 'src="/' not in page
    assert (out / "export" / "parity.json").exists()
    assert (out / "finetune" / "loss.svg").exists()
    assert score_table(*demo[1:]).row_count == 6


def test_no_held_out_scene_or_pair_is_trained_on(tmp_path: Path) -> None:
    data = write_demo_data(tmp_path, Sizes(pretrain=60, finetune=60, held_out=40, held_out_pairs=20, captions=5))
    pictures = {path: path.read_bytes() for path in data.images.rglob("*.png")}
    assert len(set(pictures.values())) == len(pictures)
    trained = data.pretrain.read_text(encoding="utf-8") + data.finetune.read_text(encoding="utf-8")
    asked = json.loads(data.held_out_pairs.read_text(encoding="utf-8"))
    assert asked
    assert not any(record["image"] in trained for record in asked)
    for pair in ("red star", "blue cross", "红色星形", "蓝色十字形"):
        assert f"a small {pair}" not in trained
        assert f"a large {pair}" not in trained
        assert f"小的{pair}" not in trained


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        run_demo(tmp_path, lambda: tiny_world(tmp_path, SMALL), Console(quiet=True))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_demo_that_was_broken_off_is_replaced(tmp_path: Path) -> None:
    def broken() -> World:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, broken, Console(quiet=True))
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "old").write_text("")
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, broken, Console(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [RESULTS]
    (tmp_path / RESULTS).write_text("[]")
    with pytest.raises(ConfigError, match="not empty"):
        run_demo(tmp_path, broken, Console(quiet=True))


def test_a_signal_ends_the_demo_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Stopped(15, "stopped after step 3 of 9, with a checkpoint")

    monkeypatch.setattr("dianjing.demo.run.run_demo", stopped)
    assert main(["demo", "--out", str(tmp_path)]) == 143
    assert "stopped after step 3 of 9" in capsys.readouterr().err
