"""A recipe and the flags that win over it, as `dianjing train` and `dianjing plan` read them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dianjing.cli.flags import parse_with_recipe
from dianjing.cli.main import main
from dianjing.cli.plan import Arguments as PlanArguments
from dianjing.cli.train import Arguments
from dianjing.config.fields import recipe_fields
from dianjing.config.load import flatten, load_recipe
from dianjing.errors import ConfigError

RECIPE = "tinyworld_pretrain"


def parsed(*arguments: str) -> Arguments:
    return parse_with_recipe(Arguments, list(arguments), "train", "")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a verb whose flags must be refused; return what it prints, on one line and without the frame."""
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    return " ".join(re.sub(r"[│─╭╮╰╯|]|-{4,}", " ", err).split())


def test_without_flags_it_is_the_recipe() -> None:
    assert parsed(RECIPE).recipe == load_recipe(RECIPE)


@pytest.mark.parametrize(
    ("flags", "name", "expected"),
    [
        (["--train.learning-rate", "1e-4"], "train.learning_rate", 1e-4),
        (["--train.learning_rate=1"], "train.learning_rate", 1.0),
        (["--train.betas", "0.8", "0.9"], "train.betas", (0.8, 0.9)),
        (["--data.path", "a.json", "b.json"], "data.path", ("a.json", "b.json")),
        (["--data.path", "c.json"], "data.path", "c.json"),
        (["--data.images", "7"], "data.images", "7"),
        (["--language-model.lora-head", "true"], "language_model.lora_head", True),
        (["--language-model.learning-rate", "1e-5"], "language_model.learning_rate", 1e-5),
        (["--language-model.quantization", "fp8"], "language_model.quantization", "fp8"),
        (["--vision-tower.feature-layer", "-3"], "vision_tower.feature_layer", -3),
        (["--engine", "fsdp2", "--train.sample-every=0"], "train.engine", "fsdp2"),
        (["--engine=fsdp2", "--train.sample-every=0"], "train.engine", "fsdp2"),
        (["--output", "elsewhere"], "output", "elsewhere"),
        (["--seed", "4"], "seed", 4),
    ],
)
def test_a_flag_wins_and_has_the_type_of_its_field(flags: list[str], name: str, expected: object) -> None:
    value = flatten(parsed(RECIPE, *flags).recipe)[name]
    assert value == expected
    assert type(value) is type(expected)


def test_the_flags_of_the_verbs_themselves() -> None:
    given = parsed("--resume", "--train.epochs", "3", RECIPE, "--gpus=8")
    assert (given.path, given.resume, given.quiet, given.gpus) == (RECIPE, True, False, 8)
    planned = parse_with_recipe(PlanArguments, [RECIPE, "--gpu", "H100", "--json"], "plan", "")
    assert (planned.gpu, planned.memory, planned.gpus, planned.json) == ("H100", None, 1, True)


def test_a_flag_gives_what_the_file_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path("src/dianjing/recipes/tinyworld_pretrain.toml").read_text(encoding="utf-8")
    (tmp_path / "part.toml").write_text(re.sub("(?m)^output = .*$", "", text), encoding="utf-8")
    assert parsed(str(tmp_path / "part.toml"), "--output", "here").recipe.output == "here"
    assert "--output DIR Folder of the run. (required)" in refused(capsys, "train", str(tmp_path / "part.toml"))


def test_the_old_name_of_a_flag_is_read_with_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(RECIPE, "--language-model.frozen=nf4").recipe.language_model.quantization == "nf4"
    assert "language_model.frozen is now called language_model.quantization" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.learnin-rate", "1"], "--train.learnin-rate, 1 Perhaps you meant: --train.learning-rate FLOAT"),
        (["--data.pack-token", "4"], "--data.pack-token, 4 Perhaps you meant: --data.pack-tokens INT"),
        (["--train.epochs", "many"], "--train.epochs: a whole number is needed, not 'many'"),
        (["--train.epochs"], "Missing value for argument '--train.epochs'"),
        (["--train.clip-norm", "x"], "--train.clip-norm: a number is needed, not 'x'"),
        (["--language-model.lora-head", "1"], "--language-model.lora-head: true or false is needed, not '1'"),
        (["--language-model.quantization", "nf5"], "'--language-model.quantization'. Expected one of ('', 'nf4',"),
        (["--engine", "fsdp"], "invalid choice 'fsdp' for argument '--train.engine'. Expected one of ('ddp', 'fsdp2',"),
        (["other.toml"], "Unrecognized options: other.toml"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_what_is_refused(capsys: pytest.CaptureFixture[str], verb: str, flags: list[str], message: str) -> None:
    assert message in refused(capsys, verb, RECIPE, *flags)


def test_what_is_refused_by_one_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Missing from dianjing train: RECIPE" in refused(capsys, "train", "--resume")
    assert "Unrecognized options: --resume" in refused(capsys, "plan", RECIPE, "--resume")
    assert "--gpus: a whole number is needed, not '1.5'" in refused(capsys, "plan", RECIPE, "--gpus", "1.5")


def test_a_value_out_of_range_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--train.epochs: train.epochs = 0: it must be at least 1"):
        parsed(RECIPE, "--train.epochs", "0")


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_help_names_every_field_with_its_whole_docstring_and_is_quick(verb: str) -> None:
    code = f"import sys; from dianjing.cli.main import main\ntry: main(['{verb}', '--help'])\nfinally: "
    code += "assert not {'torch', 'transformers'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown = "".join(re.sub("[│─╭╮╰╯|]", " ", done.stdout).split())
    for name, field in recipe_fields().items():
        assert f"--{name.replace('_', '-')}" in shown
        assert "".join(field.meaning.split()) in shown, name
