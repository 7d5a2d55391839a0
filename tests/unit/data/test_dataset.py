from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dianjing.config.schema import DataConfig
from dianjing.data.collate import Batch
from dianjing.data.dataset import Dataset, open_dataset, step_batches
from dianjing.data.encode import load_tokenizer
from dianjing.data.order import run_indices
from dianjing.errors import DataError
from dianjing.pictures.image import ImageProcessor, load_image
from tests.tiny import NUM_IMAGE_TOKENS, TinyDataset, tiny_records
from tests.xtuner import make_encoder


def config_of(data: TinyDataset, **settings: Any) -> DataConfig:
    return DataConfig(**{"path": str(data.path), "images": str(data.images), "pack_tokens": 120, **settings})


def opened(llm: Path, clip: Path, config: DataConfig) -> Dataset:
    encoder = make_encoder(
        load_tokenizer(llm),
        "internlm2_chat",
        num_image_tokens=NUM_IMAGE_TOKENS,
        max_tokens=config.max_tokens,
        on_long_record=config.on_long_record,
    )
    return open_dataset(config, encoder, ImageProcessor.from_folder(clip, config.aspect))


@pytest.fixture
def dataset(tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset) -> Dataset:
    return opened(tiny_llm, tiny_clip, config_of(tiny_dataset))


def changed(tmp_path: Path, data: TinyDataset, change: Any) -> TinyDataset:
    """Write the tiny records again, some of them changed."""
    records = tiny_records()
    change(records)
    (tmp_path / "data.json").write_text(json.dumps(records))
    return replace(data, path=tmp_path / "data.json")


def same(first: Batch, second: Batch) -> bool:
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_what_is_reported(dataset: Dataset) -> None:
    examples = [dataset.example(i) for i in range(dataset.num_records)]
    assert [example.id for example in examples] == [record["id"] for record in tiny_records()]
    assert dataset.lengths == tuple(len(example.input_ids) for example in examples)
    assert dataset.report == {
        "records": 8,
        "pictures": 7,
        "text-only": 2,
        "turns": 12,
        "positions": sum(dataset.lengths),
        "supervised tokens": sum(label >= 0 for example in examples for label in example.labels),
        "truncated": 0,
        "skipped": 0,
    }


def test_a_batch_holds_its_records_and_their_pictures(dataset: Dataset, tiny_dataset: TinyDataset) -> None:
    batch = dataset.batch([4, 2, 0])
    assert batch.ids == ("two", "text", "wide")
    assert batch.input_ids.tolist() == [token for i in (4, 2, 0) for token in dataset.example(i).input_ids]
    processor = dataset.image_processor
    assert processor
    for pixels, name in zip(batch.pixel_values, ["wide.png", "tall.jpg", "wide.png"], strict=True):
        assert torch.equal(pixels, processor(load_image(str(tiny_dataset.images), name)))
    assert len(batch.image_positions) == 3 * NUM_IMAGE_TOKENS


def test_packs_hold_the_records_of_a_step(dataset: Dataset) -> None:
    packs = dataset.packs([7, 0, 3, 4])
    assert sorted(i for members in packs for i in members) == [0, 3, 4, 7]
    assert len(packs) > 1
    assert all(sum(dataset.lengths[i] for i in members) <= 120 for members in packs)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(dataset: Dataset, workers: int) -> None:
    plan = list(run_indices(8, seed=5, mode="shuffle", global_batch_size=3, rank=0, world_size=1, steps=range(1, 5)))
    alone = list(step_batches(dataset, plan, workers=0))
    shared = list(step_batches(dataset, plan, workers=workers))
    assert [Counter(id for batch in step for id in batch.ids) for step in alone] == [
        Counter(dataset.records[i].id for i in indices) for indices in plan
    ]
    assert [len(step) for step in alone] == [len(step) for step in shared]
    assert all(same(a, b) for pair in zip(alone, shared, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_went_bad_is_a_clear_error(
    tiny_llm: Path, tiny_clip: Path, tmp_path: Path, workers: int
) -> None:
    conversation = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "x", "image": "a.png", "conversations": conversation}))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    dataset = opened(tiny_llm, tiny_clip, DataConfig(path=str(tmp_path / "data.jsonl")))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError) as error:
        list(step_batches(dataset, [[0]], workers=workers))
    assert str(error.value).startswith(f'{tmp_path}/data.jsonl: line 1 ("x"): picture "a.png": no such file')
    assert "Traceback" not in str(error.value)


def break_records(records: list[dict[str, Any]]) -> None:
    records[0]["image"] = "none.png"
    records[2]["conversations"][0]["from"] = "system"
    records[3]["conversations"] = []
    records[5]["image"] = "../data.json"


def test_all_problems_are_listed_at_once(
    tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    data = changed(tmp_path, tiny_dataset, break_records)
    with pytest.raises(DataError) as error:
        opened(tiny_llm, tiny_clip, config_of(data, max_tokens=60))
    message = str(error.value)
    for name, problem in {
        'record 0 ("wide")': 'picture "none.png": no such file',
        'record 2 ("text")': 'is from "system"',
        'record 3 ("square")': "conversations is empty",
        'record 5 ("small")': "leads out of the image folder",
        'record 6 ("again")': "max_tokens is 60",
    }.items():
        assert any(f"{data.path}: {name}: " in line and problem in line for line in message.split("\n"))
    assert "records cannot be used:\n" in message


def test_bad_records_are_skipped_and_counted_when_told_so(
    tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    data = changed(tmp_path, tiny_dataset, break_records)
    dataset = opened(tiny_llm, tiny_clip, config_of(data, on_bad_record="skip"))
    assert [record.id for record in dataset.records] == ["tall", "two", "again", "chat"]
    assert (dataset.report["skipped"], len(dataset.skipped)) == (4, 4)
    assert dataset.batch([1]).ids == ("two",)


def test_long_records_have_a_rule_of_their_own(tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset) -> None:
    short = config_of(tiny_dataset, max_tokens=60, on_long_record="skip")
    dataset = opened(tiny_llm, tiny_clip, short)
    assert "again" not in [record.id for record in dataset.records]
    assert dataset.report["skipped"] == len(dataset.skipped) > 0
    for on_bad_record in ("error", "skip"):
        with pytest.raises(DataError, match="max_tokens is 60"):
            opened(tiny_llm, tiny_clip, replace(short, on_long_record="error", on_bad_record=on_bad_record))
    cut = opened(tiny_llm, tiny_clip, replace(short, on_long_record="truncate"))
    assert (cut.num_records, cut.report["truncated"]) == (8, dataset.report["skipped"])
    assert {type(number) for number in cut.report.values()} == {int}


def test_no_record_left(tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset) -> None:
    with pytest.raises(DataError, match="no record is left to use; skipped:"):
        opened(tiny_llm, tiny_clip, config_of(tiny_dataset, max_tokens=3, on_long_record="skip"))


def test_a_record_longer_than_a_pack_is_named(tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset) -> None:
    with pytest.raises(DataError, match=r'record \d \("\w+"\): \d+ positions with its pictures, but data\.pack_tokens'):
        opened(tiny_llm, tiny_clip, config_of(tiny_dataset, pack_tokens=40))


def test_a_missing_image_folder_is_said_once(tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset) -> None:
    with pytest.raises(DataError, match=r"^nowhere: there is no such image folder"):
        opened(tiny_llm, tiny_clip, config_of(tiny_dataset, images="nowhere"))


def test_the_fingerprint_changes_with_text_order_and_pictures(
    tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    def fingerprint(change: Any, **settings: Any) -> str:
        data = changed(tmp_path, tiny_dataset, change)
        return opened(tiny_llm, tiny_clip, config_of(data, **settings)).fingerprint

    def other_answer(records: list[dict[str, Any]]) -> None:
        records[0]["conversations"][1]["value"] = "It is rad."

    def other_picture(records: list[dict[str, Any]]) -> None:
        records[0]["image"] = "square.png"

    same = fingerprint(lambda records: None)
    assert fingerprint(lambda records: [record.update(extra=1) for record in records]) == same
    others = [
        fingerprint(other_answer),
        fingerprint(other_picture),
        fingerprint(lambda records: records.reverse()),
        fingerprint(lambda records: records.pop()),
        fingerprint(lambda records: None, max_tokens=60, on_long_record="truncate"),
    ]
    assert len({same, *others}) == 6


def test_the_fingerprint_changes_with_a_picture_file(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    conversation = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}]
    found = set()
    for name, side in (("a.bmp", 4), ("a.bmp", 5), ("b.bmp", 5)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
        (tmp_path / "data.json").write_text(json.dumps([{"image": name, "conversations": conversation}]))
        found.add(opened(tiny_llm, tiny_clip, DataConfig(path=str(tmp_path / "data.json"))).fingerprint)
    assert len(found) == 3


def test_the_door_is_fast(tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    data = changed(tmp_path, tiny_dataset, lambda records: records.extend(tiny_records() * 249))
    began = time.perf_counter()
    dataset = opened(tiny_llm, tiny_clip, config_of(data))
    assert dataset.num_records == 2000
    assert time.perf_counter() - began < 10
