"""The exported tokenizer ends an answer where training's template does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dianjing.data.encode import load_tokenizer
from dianjing.data.template import answer_end, get_template
from dianjing.export.tokenizer import save_tokenizer
from dianjing.infer.generate import LoadedModel, stop_sequences
from tests.loaded_models import loaded_text_model
from tests.tiny import write_llm


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return loaded_text_model(write_llm(tmp_path / "llm"))


def test_eos_is_what_ends_an_answer(loaded: LoadedModel, tmp_path: Path) -> None:
    """Readers that hand `tokenizer.eos_token_id` alone to generate would run on past <|im_end|>."""
    save_tokenizer(loaded.tokenizer, loaded.encoder, "{{ 1 }}", 512, tmp_path)
    written = load_tokenizer(tmp_path)
    assert (loaded.tokenizer.eos_token, written.eos_token) == ("</s>", "<|im_end|>")
    assert (written.bos_token, written.unk_token) == (loaded.tokenizer.bos_token, loaded.tokenizer.unk_token)
    assert written.pad_token == (loaded.tokenizer.pad_token or loaded.tokenizer.unk_token or "</s>")
    said = written.encode("red<|im_end|></s>", add_special_tokens=False)
    assert written.decode(said, skip_special_tokens=True).strip() == "red"
    names = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert names["eos_token"] == "<|im_end|>"


def test_eos_stays_where_the_template_ends_with_it(loaded: LoadedModel) -> None:
    assert answer_end(get_template("vicuna"), loaded.tokenizer) == "</s>"
    several = replace(get_template("internlm2_chat"), suffix="two tokens")
    assert answer_end(several, loaded.tokenizer) == "</s>"


def test_tokens_that_generation_config_names_end_an_answer_too(loaded: LoadedModel) -> None:
    assert (9,) not in stop_sequences(loaded)
    assert {*stop_sequences(replace(loaded, stop_ids=(9,)))} == {*stop_sequences(loaded), (9,)}
