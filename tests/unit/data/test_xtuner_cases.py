"""The same ids and labels as XTuner, through the encoder and through `dianjing show --json`."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dianjing.cli import show
from dianjing.data.encode import load_tokenizer
from dianjing.data.record import Place, parse_record
from dianjing.data.template import check_template, choose_template
from dianjing.errors import DataError
from tests.xtuner import CASES, IMAGES, XTUNER, as_xtuner, make_encoder

Folders = dict[str, Path]

each_case = pytest.mark.parametrize("case", [case for case in CASES if not case["quirk"]], ids=lambda case: case["id"])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Tokenizer name -> its folder; InternLM2's is unpacked."""
    packed, unpacked = XTUNER / "internlm2_tokenizer", tmp_path_factory.mktemp("internlm2")
    shutil.copytree(packed, unpacked, dirs_exist_ok=True)
    with gzip.open(unpacked / "tokenizer.json.gz") as compressed:
        (unpacked / "tokenizer.json").write_bytes(compressed.read())
    return {
        "internlm2": unpacked,
        **{name: XTUNER / "tokenizers" / name for name in ("tiny_llama_spm", "tiny_bbpe_qwen")},
    }


@pytest.fixture(scope="session")
def tokenizers(folders: Folders) -> dict[str, PreTrainedTokenizerFast]:
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@each_case
@pytest.mark.parametrize("num_image_tokens", [1, 3])
def test_ids_and_labels_equal_xtuners(
    case: dict[str, Any], tokenizers: dict[str, PreTrainedTokenizerFast], num_image_tokens: int
) -> None:
    encoder = make_encoder(
        tokenizers[case["tokenizer"]],
        case["template"],
        num_image_tokens=num_image_tokens,
        max_tokens=case["max_tokens"],
        on_long_record="truncate",
    )
    record, _ = parse_record(case["record"], Place("cases.json", 0, 0))
    example = encoder.encode(record)
    assert as_xtuner(example.input_ids, encoder.image_token_id, num_image_tokens) == case["input_ids"]
    if num_image_tokens == 1:
        assert example.labels == case["labels"]


@each_case
def test_show_prints_xtuners_ids_and_labels(
    case: dict[str, Any], folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([case["record"]]), encoding="utf-8")
    options = {
        "--images": IMAGES,
        "--llm": folders[case["tokenizer"]],
        "--template": case["template"],
        "--max-tokens": case["max_tokens"],
    }
    assert show.run([str(data), "--json", *(str(part) for pair in options.items() for part in pair)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["id"] == case["record"]["id"]
    assert as_xtuner(shown["input_ids"], shown["image_token_id"], 1) == case["input_ids"]
    assert shown["labels"] == case["labels"]


def test_a_quirk_is_refused() -> None:
    quirks = [case["record"] for case in CASES if case["quirk"]]
    assert quirks
    for record in quirks:
        with pytest.raises(DataError, match="1 <image> marker but 0 images"):
            parse_record(record, Place("cases.json", 0, 0))


def test_internlm2s_tokenizer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["internlm2"]
    encode: Callable[..., list[int]] = tokenizer.encode
    assert encode("<|im_start|>assistant\n", add_special_tokens=False) == [92543, 525, 11353, 364]
    assert encode("<|im_end|>", add_special_tokens=False) == [92542]
    assert len(tokenizer) == make_encoder(tokenizer, "internlm2_chat").image_token_id == 92544


@pytest.mark.parametrize(("name", "template"), [("internlm2", "internlm2_chat"), ("tiny_bbpe_qwen", "qwen_chat")])
def test_the_template_is_found(name: str, template: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    assert choose_template(tokenizers[name]) == template
    for case in CASES:
        if case["tokenizer"] == name:
            check_template(make_encoder(tokenizers[name], case["template"]).template, tokenizers[name])
