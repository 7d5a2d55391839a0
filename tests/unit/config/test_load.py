from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from dianjing.config.fields import recipe_fields, without_range
from dianjing.config.load import flatten, load_recipe, save_recipe, shipped_recipes
from dianjing.config.schema import Recipe
from dianjing.errors import ConfigError

RECIPE = """
stage = "finetune"
output = "runs/x"
[language_model]
folder = "llm"
[vision_tower]
folder = "clip"
[data]
path = "data.json"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_what_is_not_written_has_its_default(file: Path) -> None:
    recipe = load_recipe(file)
    assert (recipe.stage, recipe.data.path, recipe.data.max_tokens) == ("finetune", "data.json", 1472)
    assert recipe.projector.init_from == ""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"train.learning_rate": 1e-3}, 1e-3),
        ({"train.learning_rate": 1}, 1.0),
        ({"train.betas": [0.8, 0.9]}, (0.8, 0.9)),
        ({"data.path": ("a.json", "b.json")}, ("a.json", "b.json")),
        ({"seed": 4}, 4),
    ],
)
def test_an_override_wins_and_has_the_type_of_its_field(file: Path, override: dict[str, Any], expected: object) -> None:
    (name,) = override
    value = flatten(load_recipe(file, override))[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("max_token = 3", "unknown field 'max_token'; did you mean 'max_tokens'?"),
        ("learning_rate = 1e-3", "unknown field 'learning_rate'; did you mean 'language_model.learning_rate' or"),
        ("zzz = 1", "unknown field 'zzz'; there are path, images, aspect,"),
        ('max_tokens = "12"', 'data.max_tokens = "12": a whole number is needed, not text'),
        ("max_tokens = 1.5", "data.max_tokens = 1.5: a whole number is needed, not a number"),
        ("max_tokens = true", "data.max_tokens = true: a whole number is needed, not true or false"),
        ("max_tokens = 0", "data.max_tokens = 0: it must be at least 1"),
        ("images = 3", "data.images = 3: text is needed, not a whole number"),
        ('order = "shufle"', 'one of "shuffle", "sequential", "length_grouped" is needed; did you mean "shuffle"?'),
        ("[train]\nlearning_rate = nan", "train.learning_rate = nan: it must be"),
        ("[train]\nlearning_rate = -1", "train.learning_rate = -1.0: it must be at least 0"),
        ("[train]\nwarmup_ratio = 2", "it must be between 0 and 1"),
        ("[train]\nbetas = [0.9, 1]", "it must be at least 0 and below 1"),
        ("[train]\nbetas = [0.9]", "train.betas has 1 values; 2 must be there"),
        ("[train]\nsample_every = 5", "train.sample_path names no records"),
        pytest.param("x = " + "[" * 5000, "run.toml: not TOML: maximum recursion", id="deep"),
        ("[trian]\nx = 1", "unknown section [trian]; there are language_model, vision_tower, projector, data, train"),
        ("[projector]\ninit_from = 'x'\n[projector]", "not TOML: "),
    ],
)
def test_what_cannot_be_used_is_named_with_a_way_out(file: Path, added: str, message: str) -> None:
    file.write_text(f"{RECIPE}{added}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_recipe(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


def test_the_flag_is_named_when_the_flag_is_wrong(file: Path) -> None:
    with pytest.raises(ConfigError, match=r'^--train.epochs: train.epochs = "two": a whole number is needed'):
        load_recipe(file, {"train.epochs": "two"})
    with pytest.raises(ConfigError, match=r"^--data.max-token: unknown field 'max_token'; did you mean 'max_tokens'"):
        load_recipe(file, {"data.max_token": 5})


def test_what_is_missing_is_named(file: Path) -> None:
    file.write_text(RECIPE.replace('folder = "clip"', ""), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\[vision_tower\] lacks 'folder' \(text\); .* --vision-tower.folder"):
        load_recipe(file)
    assert load_recipe(file, {"vision_tower.folder": "b"}).vision_tower.folder == "b"


def test_a_value_in_a_sections_place(file: Path) -> None:
    file.write_text('data = "x"', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'data' is a section; write \[data\]"):
        load_recipe(file)


def test_pretrain_trains_the_projector_alone(file: Path) -> None:
    with pytest.raises(ConfigError, match=r'trains the projector alone, but vision_tower.tuning is "lora"'):
        load_recipe(file, {"stage": "pretrain", "vision_tower.tuning": "lora"})


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tinyworld_pretain: there is no such recipe.*did you mean 'tinyworld_pre"):
        load_recipe("tinyworld_pretain")
    with pytest.raises(ConfigError, match="a folder, not a recipe"):
        load_recipe(tmp_path)


def test_shipped_recipes_are_found_by_name() -> None:
    for name in shipped_recipes():
        assert isinstance(load_recipe(name), Recipe)


def test_saving_replaces_the_file_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(file)

    def die(self: Path, *_: Any, **__: Any) -> None:
        self.touch()
        raise KeyboardInterrupt

    before = file.read_bytes()
    monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(KeyboardInterrupt):
        save_recipe(recipe, file)
    assert file.read_bytes() == before


SIGNED = {"data.workers", "train.probe_every", "vision_tower.feature_layer"}


def test_every_number_of_a_recipe_has_a_range_but_three() -> None:
    numbers = {name for name, field in recipe_fields().items() if {int, float} & {*map(without_range, field.kinds)}}
    assert numbers > SIGNED
    for name in numbers - SIGNED:
        with pytest.raises(ConfigError, match=r"it must be (at least|above|between)"):
            load_recipe("tinyworld_pretrain", {name: -1})
    for name in SIGNED:
        assert flatten(load_recipe("tinyworld_pretrain", {name: -9}))[name] == -9


def test_every_field_has_a_docstring() -> None:
    assert [name for name, field in recipe_fields().items() if not field.meaning] == []


def test_the_old_name_of_a_field_is_read_with_a_notice(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = RECIPE.replace('"llm"', '"llm"\nfrozen = "nf4"')
    file.write_text(written, encoding="utf-8")
    assert load_recipe(file).language_model.quantization == "nf4"
    said = "language_model.frozen is now called language_model.quantization; rename it"
    assert capsys.readouterr().err == f"notice: {file}: {said}\n"
    file.write_text(written.replace('"nf4"', '"nf4"\nquantization = "fp8"'), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"language_model\.quantization is given twice, by its old name too"):
        load_recipe(file)


def test_fields_know_their_default_and_meaning() -> None:
    known = recipe_fields()
    assert known["train.keep"].default == 2
    assert known["train.keep"].meaning == "Newest checkpoints kept on disk."
    assert (known["seed"].section, known["seed"].key) == ("", "seed")
    assert list(flatten(load_recipe("tinyworld_pretrain"))) == list(known)


def test_a_saved_recipe_names_every_field_that_has_a_value(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    save_recipe(recipe, tmp_path / "saved.toml")
    saved = tomllib.loads((tmp_path / "saved.toml").read_text(encoding="utf-8"))
    written = {f"{section}.{key}" for section in saved if isinstance(saved[section], dict) for key in saved[section]}
    assert written == {name for name, value in flatten(recipe).items() if "." in name and value is not None}
