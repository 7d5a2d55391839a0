"""Ids and labels, piece by piece; equality with XTuner's own output is tested in test_xtuner_cases.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dianjing.constants import IGNORE_INDEX
from dianjing.data.encode import Encoder, LongRecordError, image_token_id, load_tokenizer
from dianjing.data.record import Place, Record, Turn, parse_record
from dianjing.errors import DataError, ModelError
from tests.xtuner import XTUNER, make_encoder, small_tokenizer

SPM = small_tokenizer("tiny_llama_spm")
QWEN = small_tokenizer("tiny_bbpe_qwen")
IMAGE = 700
"""The id after the last one of both tokenizers."""


def record_of(*turns: tuple[str, str], images: int = 0) -> Record:
    return Record(
        id="a",
        images=tuple(f"{i}.png" for i in range(images)),
        turns=tuple(Turn(question=question, answer=answer) for question, answer in turns),
        types=(),
        source="data.json",
        index=4,
    )


def pieces(encoder: Encoder, *parts: str | int | tuple[str | int, ...]) -> tuple[list[int], list[int]]:
    """Return ids and labels of parts that are tokenised alone; a tuple is supervised, an int is an id."""
    input_ids: list[int] = []
    labels: list[int] = []
    for part in parts:
        for piece in part if isinstance(part, tuple) else (part,):
            ids = [piece] if isinstance(piece, int) else encoder.tokenizer.encode(piece, add_special_tokens=False)
            input_ids += ids
            labels += ids if isinstance(part, tuple) else [IGNORE_INDEX] * len(ids)
    return input_ids, labels


Parts = tuple[str | int | tuple[str | int, ...], ...]
BOS, EOS, IM_END = 1, 2, 697

CASES: list[tuple[str, Any, Parts]] = [
    (
        "vicuna",
        SPM,
        (
            *(BOS, "USER: ", IMAGE, "\nQ {x} ASSISTANT:", ("A", EOS), "\n"),
            *(BOS, "USER: 图 ASSISTANT:", ("B ", EOS), "\n"),
        ),
    ),
    (
        "gemma",
        SPM,
        (
            *(BOS, "<start_of_turn>user\n", IMAGE, "\nQ {x}<end_of_turn>\n<start_of_turn>model\n"),
            *(("A<end_of_turn>", EOS), "\n"),
            *(BOS, "<start_of_turn>user\n图<end_of_turn>\n<start_of_turn>model\n", ("B <end_of_turn>", EOS), "\n"),
        ),
    ),
    (
        "llama3_chat",
        SPM,
        (
            *(BOS, "<|start_header_id|>user<|end_header_id|>\n\n", IMAGE),
            "\nQ {x}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ("A<|eot_id|>",),
            "<|start_header_id|>user<|end_header_id|>\n\n图<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ("B <|eot_id|>",),
        ),
    ),
    (
        "chatglm3",
        SPM,
        (
            *(BOS, "<|user|>\n", IMAGE, "\nQ {x}<|assistant|>\n", ("A", EOS), "\n"),
            *(BOS, "<|user|>\n图<|assistant|>\n", ("B ", EOS), "\n"),
        ),
    ),
    (
        "vicuna",
        QWEN,
        (
            *("USER: ", IMAGE, "\nQ {x} ASSISTANT:", ("A", IM_END), "\n"),
            *("USER: 图 ASSISTANT:", ("B ", IM_END), "\n"),
        ),
    ),
    (
        "phi3_chat",
        SPM,
        (
            *(BOS, "<|user|>\n", IMAGE, "\nQ {x}<|end|>\n<|assistant|>\n", ("A<|end|>",), "\n"),
            *("<|user|>\n图<|end|>\n<|assistant|>\n", ("B <|end|>",), "\n"),
        ),
    ),
]


@pytest.mark.parametrize(("template", "tokenizer", "parts"), CASES)
def test_ids_and_labels(template: str, tokenizer: Any, parts: Parts) -> None:
    encoder = make_encoder(tokenizer, template)
    example = encoder.encode(record_of(("<image>\nQ {x}", "A"), ("图", "B "), images=1))
    assert (example.input_ids, example.labels) == pieces(encoder, *parts)


def test_an_empty_question_is_still_wrapped() -> None:
    encoder = make_encoder(QWEN, "qwen_chat")
    example = encoder.encode(record_of(("Q", "A"), ("", "B")))
    ask, answer = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>"
    parts = ask.format("Q"), (answer.format("A"),), "\n", ask.format(""), (answer.format("B"),), "\n"
    assert (example.input_ids, example.labels) == pieces(encoder, *parts)


def test_each_picture_becomes_its_run_of_image_tokens() -> None:
    encoder = make_encoder(SPM, "vicuna", num_image_tokens=3)
    example = encoder.encode(record_of(("Is <image> like <image>?", "No."), images=2))
    run = (IMAGE, IMAGE, IMAGE)
    parts = BOS, "USER: Is ", *run, " like ", *run, "? ASSISTANT:", ("No.", EOS), "\n"
    assert (example.input_ids, example.labels) == pieces(encoder, *parts)
    assert (example.num_images, example.images, example.truncated) == (2, ("0.png", "1.png"), 0)


def test_a_marker_in_an_answer_is_text() -> None:
    encoder = make_encoder(SPM, "vicuna")
    example = encoder.encode(record_of(("Q", "the <image> tag")))
    assert (example.input_ids, example.labels) == pieces(
        encoder, BOS, "USER: Q ASSISTANT:", ("the <image> tag", EOS), "\n"
    )
    assert IMAGE not in example.input_ids


def test_a_cut_is_before_pictures_are_expanded() -> None:
    record = record_of(("<image>\nQ", "A long answer."), images=1)
    whole = make_encoder(SPM, "vicuna").encode(record)
    limit = len(whole.input_ids) - 3
    cut = make_encoder(SPM, "vicuna", num_image_tokens=5, max_tokens=limit, on_long_record="truncate").encode(record)
    place = whole.input_ids.index(IMAGE)
    for name in ("input_ids", "labels"):
        ids = getattr(whole, name)[:limit]
        assert getattr(cut, name) == ids[:place] + ids[place : place + 1] * 5 + ids[place + 1 :]
    assert cut.truncated == 3


def test_the_longest_record_is_not_cut() -> None:
    record = record_of(("<image>\nQ", "A"), images=1)
    limit = len(make_encoder(SPM, "vicuna").encode(record).input_ids)
    assert make_encoder(SPM, "vicuna", num_image_tokens=9, max_tokens=limit).encode(record).truncated == 0


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_long_record_is_named_with_its_length_and_the_limit(policy: str) -> None:
    encoder = make_encoder(SPM, "vicuna", max_tokens=5, on_long_record=policy)
    length = len(make_encoder(SPM, "vicuna").encode(record_of(("Q", "A"))).input_ids)
    with pytest.raises(LongRecordError, match=rf'data\.json: record 4 \("a"\): {length} tokens, .* is 5; shorten'):
        encoder.encode(record_of(("Q", "A")))


def test_a_cut_that_takes_a_picture_or_all_answers_is_refused() -> None:
    encoder = make_encoder(SPM, "vicuna", max_tokens=30, on_long_record="truncate")
    with pytest.raises(DataError, match=r"a picture lies beyond the cut; raise data\.max_tokens \(30\)"):
        encoder.encode(record_of(("Q", "A"), ("word " * 40 + "<image>", "A"), images=1))
    with pytest.raises(DataError, match=r"no answer is left to learn from; raise data\.max_tokens \(30\)"):
        encoder.encode(record_of(("word " * 40, "A")))


def test_a_prompt_is_what_training_shows_before_the_answer() -> None:
    turns = [("<image>\nQ {x}", "A"), ("图", "B "), ("", "C")]
    for tokenizer, template in ((SPM, "vicuna"), (SPM, "gemma"), (QWEN, "qwen_chat"), (SPM, "llama3_chat")):
        encoder = make_encoder(tokenizer, template, num_image_tokens=4)
        example = encoder.encode(record_of(*turns, images=1))
        begins = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX and example.labels[i - 1] < 0]
        assert len(begins) == len(turns)
        for i, begin in enumerate(begins):
            assert encoder.prompt(turns[:i], turns[i][0]) == (example.input_ids[:begin], 1)


def test_a_template_with_eos_needs_one(tmp_path: Path) -> None:
    folder = changed(tmp_path, "tiny_llama_spm", lambda config: config.update(eos_token=None))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ModelError, match='"vicuna" ends an answer with EOS, which this tokenizer has not'):
        make_encoder(tokenizer, "vicuna")
    make_encoder(tokenizer, "llama3_chat")


def changed(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a tokenizer with another tokenizer_config.json."""
    folder = tmp_path / name
    shutil.copytree(XTUNER / "tokenizers" / name, folder)
    (folder / "special_tokens_map.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    change(config)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("declared", "bos"), [("Qwen2Tokenizer", []), ("QWenTokenizer", []), ("LlamaTokenizer", [1])])
def test_a_qwen_tokenizer_has_no_bos_whatever_it_says(tmp_path: Path, declared: str, bos: list[int]) -> None:
    folder = changed(tmp_path, "tiny_llama_spm", lambda config: config.update(tokenizer_class=declared))
    encoder = make_encoder(load_tokenizer(folder), "vicuna")
    example = encoder.encode(record_of(("Q", "A")))
    assert (example.input_ids, example.labels) == pieces(encoder, *bos, "USER: Q ASSISTANT:", ("A", EOS), "\n")


def with_image_token(tmp_path: Path) -> Path:
    tokenizer = load_tokenizer(XTUNER / "tokenizers" / "tiny_llama_spm")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<pad>", "<image>", "<other>"]})
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_tokenizer_with_an_image_token_lends_its_id(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_image_token(tmp_path))
    assert image_token_id(SPM) == len(SPM) == 700
    assert image_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<image>") == 701
    encoder = make_encoder(tokenizer, "vicuna", num_image_tokens=2)
    example = encoder.encode(record_of(("<image>\nQ", "the <image> tag, <image>"), images=1))
    assert example.input_ids.count(701) == 2
    answer = [label for label in example.labels if label != IGNORE_INDEX][:-1]
    assert tokenizer.decode(answer).replace("< image", "<image") == "the <image> tag, <image>"


def test_ids_with_a_hole_give_an_image_token_of_its_own() -> None:
    class Holes:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 9}

    assert image_token_id(Holes()) == 10


def test_text_of_the_record_reaches_the_encoder_as_it_is() -> None:
    value = {"conversations": [{"from": "human", "value": " Q \n"}, {"from": "gpt", "value": " A "}]}
    record, _ = parse_record(value, Place("data.json", 0, 0))
    encoder = make_encoder(SPM, "vicuna")
    example = encoder.encode(record)
    assert (example.input_ids, example.labels) == pieces(encoder, BOS, "USER:  Q \n ASSISTANT:", (" A ", EOS), "\n")


def test_loading_changes_nothing_and_runs_no_code(tmp_path: Path) -> None:
    folder = changed(
        tmp_path, "tiny_llama_spm", lambda config: config.update(auto_map={"AutoTokenizer": ["x.X", None]})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "internlm2", "auto_map": {"AutoConfig": "x.X"}}))
    (folder / "x.py").write_text("raise SystemExit('code of a model folder was run')")
    assert load_tokenizer(folder).get_vocab() == SPM.get_vocab()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match=r"tokenizer\.model: damaged, or no sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match="its tokenizer cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be read: Expecting"):
        load_tokenizer(tmp_path)
