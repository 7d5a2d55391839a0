"""The shipped base models are what their card says: blind readers and seeing towers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from safetensors import safe_open

from dianjing.errors import ModelError
from dianjing.infer.generate import generate
from dianjing.infer.load import load_for_use
from dianjing.model.folders import resolve
from dianjing.tinyworld.grammar import LANGUAGES, QUESTION_TYPES, WORDS, ask
from dianjing.tinyworld.scene import allowed_pairs, sample_scene
from dianjing.tinyworld.wording import describe

MODELS = resolve("tinyworld", "language_model").parent


def test_they_fit_the_package() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 20e6


def test_a_folder_of_that_name_is_reached_with_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinyworld").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("tinyworld", "vision_tower") == MODELS / "vision_tower"
    assert resolve("./tinyworld", "vision_tower") == Path("tinyworld")
    with pytest.raises(ModelError, match="no such vision tower folder"):
        resolve("elsewhere", "vision_tower")


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_weights_are_bf16(part: str) -> None:
    with safe_open(MODELS / part / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_card_quotes_the_scores() -> None:
    card = (MODELS / "README.md").read_text(encoding="utf-8")
    language, tower = (
        json.loads((MODELS / part / "scores.json").read_text(encoding="utf-8"))["scores"]
        for part in ("language_model", "vision_tower")
    )
    for score in (f"{language['all']:.4f}", f"{language['gathered']:.3f}", f"{tower['held_out_pairs']:.3f}"):
        assert score in card
    assert language["all"] >= 0.98


def test_the_language_model_reads_and_does_not_pretend_to_see() -> None:
    rng, pairs = random.Random(11), allowed_pairs("any")
    told, blind = [], []
    for index in range(4 * len(QUESTION_TYPES)):
        scene, language = sample_scene(rng, pairs), LANGUAGES[index % 2]
        question = ask(rng, scene, language, QUESTION_TYPES[index % len(QUESTION_TYPES)])
        if question:
            told.append((f"{describe(rng, scene, language, 'sentences')}\n{question.text}", question.answer))
            blind.append((question.text, WORDS[language].blind))
    loaded = load_for_use("tinyworld", "cpu")
    answers = generate(loaded, [((), text, ()) for text, _ in (*told, *blind)], 32)
    right = [answer == wanted for answer, (_, wanted) in zip(answers, (*told, *blind), strict=True)]
    assert sum(right[: len(told)]) / len(told) >= 0.97
    assert sum(right[len(told) :]) / len(blind) >= 0.97
