from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dianjing.cli import show
from dianjing.errors import ConfigError, DataError, ModelError
from dianjing.pictures.image import ImageProcessor, load_image
from tests.tiny import IMAGE_SIZE, NUM_IMAGE_TOKENS, TinyDataset, tiny_records
from tests.xtuner import XTUNER


@pytest.fixture
def arguments(tiny_dataset: TinyDataset, tiny_llm: Path) -> list[str]:
    return [str(tiny_dataset.path), "--images", str(tiny_dataset.images), "--llm", str(tiny_llm)]


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_has_one_object_a_record_and_nothing_else(
    arguments: list[str], tiny_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.run([*arguments, "--json"]) == 0
    assert show.run([*arguments, "--json", "--vision-tower", str(tiny_clip)]) == 0
    lines = json_lines(capsys.readouterr().out)
    plain, expanded = lines[:8], lines[8:]
    assert [line["id"] for line in plain] == [record["id"] for record in tiny_records()]
    assert all(set(line) == {"id", "input_ids", "labels", "image_token_id"} for line in lines)
    for one, many in zip(plain, expanded, strict=True):
        pictures = one["input_ids"].count(one["image_token_id"])
        assert len(many["input_ids"]) == len(one["input_ids"]) + (NUM_IMAGE_TOKENS - 1) * pictures
        assert [label for label in one["labels"] if label >= 0] == [label for label in many["labels"] if label >= 0]


def test_limit(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    show.run([*arguments, "--json", "--limit", "2"])
    assert [line["id"] for line in json_lines(capsys.readouterr().out)] == ["wide", "tall"]
    show.run(arguments)
    assert capsys.readouterr().out.count("supervised") == 3


def test_a_person_sees_text_pictures_and_counts(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    show.run(arguments)
    out, err = capsys.readouterr()
    assert "<s><|im_start|>user\n[wide.png: 1 image tokens]\nWhat colour is it?<|im_end|>\n" in out
    assert "8 records, 4 pictures" in err


def test_what_is_cut_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    show.run([*arguments, "--json", "--max-tokens", "60"])
    out, err = capsys.readouterr()
    lengths = [len(line["input_ids"]) for line in json_lines(out)]
    assert max(lengths) == 60
    assert f"records cut to 60 tokens (--max-tokens): {lengths.count(60)}\n" in err


def test_special_strings_that_are_plain_text_are_counted(
    tiny_dataset: TinyDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = str(XTUNER / "tokenizers" / "tiny_llama_spm")
    show.run([str(tiny_dataset.path), "--images", str(tiny_dataset.images), "--llm", llm, "--template", "gemma"])
    warning = capsys.readouterr().err
    assert 'reads 2 special strings of the template "gemma" as plain text' in warning


def test_the_page_shows_what_the_tower_gets(
    arguments: list[str], tiny_clip: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    show.run([*arguments, "--vision-tower", str(tiny_clip), "--out", str(page), "--limit", "8"])
    text = page.read_text(encoding="utf-8")
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", text)]
    assert len(pictures) == 7
    processor = ImageProcessor.from_folder(tiny_clip)
    expected = processor.to_picture(processor(load_image(str(tiny_dataset.images), "wide.png")))
    assert pictures[0].size == (IMAGE_SIZE, IMAGE_SIZE)
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(expected))
    assert '<span class="supervised">It is red.&lt;|im_end|&gt;</span>' in text
    assert f"[wide.png: {NUM_IMAGE_TOKENS} image tokens]" in text


def test_a_page_needs_the_tower(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="--vision-tower"):
        show.run([*arguments, "--out", "page.html"])


def test_errors_are_the_data_paths_own(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='did you mean "internlm2_chat"'):
        show.run([*arguments, "--template", "internlm2_chatt"])
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        show.run(["none.json", *arguments[1:]])
    with pytest.raises(ModelError, match="no such language model folder"):
        show.run([*arguments[:-1], str(tmp_path / "none")])
