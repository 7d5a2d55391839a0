"""`dianjing plan`: what it prints, what it refuses, and that it needs no weights."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig

from dianjing.cli.main import main
from dianjing.config.load import load_recipe, save_recipe
from dianjing.console import Console
from dianjing.plan.gpus import GPUS
from dianjing.plan.plan import make_plan
from dianjing.plan.report import print_plan
from tests.tiny import TinyDataset

VICUNA = "llava_v1_5_7b_finetune_lora"


@pytest.fixture
def recipe(make_recipe: Any, tmp_path: Path) -> str:
    save_recipe(
        make_recipe("finetune", language_model={"tuning": "lora"}, train={"precision": "auto"}), tmp_path / "run.toml"
    )
    return str(tmp_path / "run.toml")


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a 7B recipe whose folders hold config.json alone."""
    folder = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    LlamaConfig(vocab_size=32000, num_attention_heads=32, **sizes).save_pretrained(folder / "llm")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    CLIPVisionConfig(image_size=336, patch_size=14, **sizes).save_pretrained(folder / "tower")
    return [
        VICUNA,
        *("--language-model.folder", str(folder / "llm")),
        *("--vision-tower.folder", str(folder / "tower")),
    ]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err[:7]) == ("", "error: ")
    return err[7:]


def test_the_command_itself(recipe: str) -> None:
    command = [sys.executable, "-m", "dianjing", "plan", recipe, "--gpu", "4090", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["verdicts"][0]["fits"]


def test_a_plan_of_all_gpus(capsys: pytest.CaptureFixture[str], recipe: str, tiny_dataset: TinyDataset) -> None:
    out = said(capsys, recipe)
    records = len(json.loads(tiny_dataset.path.read_text()))
    assert f"data           {records} records\n" in out
    assert all(f"\n{gpu.name} " in out for gpu in GPUS)
    assert "frozen weights (bf16)" in out
    assert "Predicted, not measured" in out


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_plan_fits_a_terminal(recipe: str, columns: int) -> None:
    terminal = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None)
    print_plan(make_plan(load_recipe(recipe), GPUS), "mine", terminal)
    lines = terminal.file.getvalue().splitlines()  # type: ignore[attr-defined]
    tables = [line for line in lines if line.startswith(tuple(gpu.name for gpu in GPUS))]
    assert len(tables) == len(GPUS)
    assert max(map(len, tables)) <= columns
    assert all(" min  fits" in line and "\u2026" not in line for line in tables)
    assert ("GiB" in tables[0]) is (columns > 40)


def test_the_run_and_what_it_lacks(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    out = said(capsys, recipe)
    assert "\n  the run        only 2 optimizer steps: 8 records in batches of 4, 1 epoch. " in out
    assert "train.global_batch_size = 4 and train.epochs = 150 make 300 " in " ".join(out.split())
    assert "\n  the run        300 steps\n" in said(capsys, recipe, "--train.epochs", "150")


def test_gpus_that_wait_for_the_cpu_are_marked(
    capsys: pytest.CaptureFixture[str], recipe: str, vicuna: list[str]
) -> None:
    out = said(capsys, recipe)
    assert out.count("*  < 1 min  fits") == len(GPUS)
    assert "a GPU waits for the CPU that starts its work" in out
    assert "This machine has no GPU. Training on its CPU works too" in out
    assert "*" not in said(capsys, *vicuna, "--gpu", "RTX 4090")


def test_what_a_run_would_refuse_or_nobody_measured(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    out = said(capsys, recipe, "--data.pack-tokens", "50", "--train.precision", "fp32", "--gpu", "L4")
    assert "the longest has 83 positions, more than data.pack_tokens: `dianjing train` will refuse it" in out
    assert "Its speed is not known: only bf16's is." in out
    (verdict,) = json.loads(said(capsys, recipe, "--train.precision", "fp32", "--gpu", "L4", "--json"))["verdicts"]
    assert verdict["samples_per_second"] is verdict["hours"] is None


def test_json_is_the_same_plan(capsys: pytest.CaptureFixture[str], recipe: str, make_recipe: Any) -> None:
    plan = json.loads(said(capsys, recipe, "--json", "--train.epochs", "3"))
    assert [verdict["gpu"] for verdict in plan["verdicts"]] == [gpu.name for gpu in GPUS]
    assert plan["lengths"]["records"] == 8
    for verdict in plan["verdicts"]:
        assert verdict["needed"] == sum(plan["memory"].values())
        assert verdict["hours"] == pytest.approx(24 / verdict["samples_per_second"] / 3600)


def test_a_7b_model_on_a_24_gib_card(capsys: pytest.CaptureFixture[str], vicuna: list[str]) -> None:
    out = said(capsys, *vicuna, "--gpu", "RTX 4090")
    assert "assumed (data/llava_v1_5_mix665k.json is not there)" in out
    assert "language model " in out
    assert "7,058,231,296 parameters, 319,815,680 train (LoRA, r = 128)" in out
    assert "it fits with activation checkpointing, " in out
    assert "the run turns it on by itself" in out
    assert "for each 100,000 records" in out


def test_what_would_make_it_fit_does(capsys: pytest.CaptureFixture[str], vicuna: list[str]) -> None:
    given = [*vicuna, "--memory", "16", "--data.pack-tokens", "8192", "--train.gradient-checkpointing", "off"]
    out = said(capsys, *given)
    assert "16 GiB: it does NOT fit, " in out
    assert "makes it fit:\n" in out
    plan = json.loads(said(capsys, *given, "--json"))
    (verdict,) = plan["verdicts"]
    assert not verdict["fits"]
    assert verdict["changes"]
    for change in verdict["changes"]:
        assert f"\n  {change}\n" in out
        flags = [word for part in change.split(", ") for word in f"--{part}".replace('"', "").split(" = ")]
        again = json.loads(said(capsys, *given, *flags, "--json"))
        assert again["verdicts"][0]["fits"], change


def test_nothing_makes_it_fit(capsys: pytest.CaptureFixture[str], vicuna: list[str]) -> None:
    assert "No setting makes it fit: take a larger GPU" in said(capsys, *vicuna, "--memory", "4")


def test_it_says_which_packs_are_sooner_done(capsys: pytest.CaptureFixture[str], vicuna: list[str]) -> None:
    flags = ["--data.pack-tokens", "2048"]
    (verdict,) = json.loads(said(capsys, *vicuna, "--gpu", "H200", *flags, "--json"))["verdicts"]
    words, speed = verdict["faster"]
    assert words == "data.pack_tokens = 16384"
    assert speed > verdict["samples_per_second"]
    flags = ["--data.pack-tokens", "16384"]
    (verdict,) = json.loads(said(capsys, *vicuna, "--gpu", "H200", *flags, "--json"))["verdicts"]
    assert verdict["samples_per_second"] == speed
    assert verdict["faster"] is None


@pytest.mark.parametrize("said_so", ["auto", "on", "off"])
def test_packs_that_are_sooner_done_fit(capsys: pytest.CaptureFixture[str], vicuna: list[str], said_so: str) -> None:
    flags = ["--gpu", "RTX 5090", "--language-model.quantization", "nf4", "--train.gradient-checkpointing", said_so]
    flags += ["--data.pack-tokens", "2048"]
    (verdict,) = json.loads(said(capsys, *vicuna, *flags, "--json"))["verdicts"]
    assert verdict["fits"]
    if verdict["faster"]:
        words, speed = verdict["faster"]
        flags += [word for part in words.split(", ") for word in f"--{part}".replace('"', "").split(" = ")]
        (again,) = json.loads(said(capsys, *vicuna, *flags, "--json"))["verdicts"]
        assert (again["fits"], again["samples_per_second"]) == (True, speed)
    assert bool(verdict["faster"]) == (said_so == "on")


def test_models_of_the_hub_by_their_data_files(
    capsys: pytest.CaptureFixture[str], recipe: str, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def folder_of(name: str, *, weights: bool = True) -> Path:
        asked.append((name, weights))
        return tiny_llm

    monkeypatch.setattr("dianjing.model.folders.hub_folder", folder_of)
    said(capsys, recipe, "--language-model.folder", "some-owner/some-llm")
    assert set(asked) == {("some-owner/some-llm", False)}


def test_fp8_where_there_are_no_units_for_it(capsys: pytest.CaptureFixture[str], vicuna: list[str]) -> None:
    out = said(capsys, *vicuna, "--language-model.quantization", "fp8", "--gpu", "A10")
    assert 'no FP8 units; language_model.quantization = "nf4" or "" runs there' in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RECIPE", "--gpu", "nonsense"], "--gpu nonsense: not in the table (H200, "),
        (["RECIPE", "--gpu", "L4", "--memory", "24"], "--gpu and --memory are both given"),
        (["RECIPE", "--memory", "nan"], "--memory: a number above zero is needed, not nan"),
        (["RECIPE", "--gpus", "0"], "--gpus: a number above zero is needed, not 0"),
        (["RECIPE", "--tflops", "100"], "--tflops is for a GPU that is not in the table; give its --memory too"),
        (
            ["RECIPE", "--language-model.folder", "owner/llm"],
            "owner/llm: no such folder, and no such model in the hub's",
        ),
        (["RECIPE", "--language-model.folder", "/nowhere"], "/nowhere: no such language model folder"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], recipe: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIANJING_ONLINE", "0")
    assert message in refused(capsys, *(recipe if word == "RECIPE" else word for word in arguments))


def test_the_shipped_recipe_leaves_checkpointing_open() -> None:
    assert load_recipe(VICUNA).train.gradient_checkpointing == "auto"
