from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dianjing.config.schema import DataConfig
from dianjing.data import cache as cache_module
from dianjing.data import survey as survey_module
from dianjing.data.cache import cache_folder
from dianjing.data.dataset import Dataset, open_dataset, step_batches
from dianjing.data.encode import load_tokenizer
from dianjing.data.order import epoch_order
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.template import get_template
from dianjing.errors import DataError
from dianjing.pictures.image import ImageProcessor
from tests.tiny import NUM_IMAGE_TOKENS, tiny_records, write_images
from tests.xtuner import make_encoder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a cache of the test's own, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dianjing" / "data"


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each survey that is made."""
    made: list[int] = []
    real = survey_module.survey

    def counted(*given: Any) -> Any:
        made.append(1)
        return real(*given)

    monkeypatch.setattr(survey_module, "survey", counted)
    return made


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Return a list and lines of the tiny records, on pictures of the test's own."""
    write_images(tmp_path / "images")
    (tmp_path / "a.json").write_text(json.dumps(tiny_records()), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, tiny_records()[::-1])), encoding="utf-8")
    paths = (str(tmp_path / "a.json"), str(tmp_path / "b.jsonl"))
    return DataConfig(path=paths, images=str(tmp_path / "images"), pack_tokens=200, turns="both", max_tokens=150)


Open = Callable[..., Dataset]


@pytest.fixture
def opened(tiny_llm: Path, tiny_clip: Path) -> Open:
    """Return what opens a config, with any field of the encoder changed."""

    def open_it(config: DataConfig, llm: Path = tiny_llm, **changed: Any) -> Dataset:
        settings = {"max_tokens": config.max_tokens, "on_long_record": config.on_long_record}
        encoder = make_encoder(load_tokenizer(llm), "internlm2_chat", num_image_tokens=NUM_IMAGE_TOKENS, **settings)
        return open_dataset(config, replace(encoder, **changed), ImageProcessor.from_folder(tiny_clip))

    return open_it


def known(dataset: Dataset) -> dict[str, Any]:
    names = ("lengths", "modality_lengths", "report", "skipped", "fingerprint")
    examples = [dataset.example(number) for number in range(dataset.num_records)]
    return {"examples": examples, **{name: getattr(dataset, name) for name in names}}


def test_a_second_start_knows_the_same(config: DataConfig, opened: Open, surveys: list[int], cache: Path) -> None:
    config = replace(config, on_bad_record="skip", on_long_record="skip", max_tokens=70)
    first, second = opened(config), opened(config)
    assert len(surveys) == 1
    assert known(first) == known(second)
    assert list(first.report) == list(second.report)
    assert {type(number) for number in (*second.report.values(), *second.lengths, *second.modality_lengths)} == {int}
    assert (first.opened, "as at an earlier start" in second.opened) == ("", True)
    for mode in ("shuffle", "length_grouped"):
        orders = [epoch_order(s.num_records, 3, 1, mode, lengths=s.modality_lengths) for s in (first, second)]
        assert orders[0] == orders[1]
    batches = [next(step_batches(dataset, [orders[0]], workers=0)) for dataset in (first, second)]
    assert [batch.ids for batch in batches[0]] == [batch.ids for batch in batches[1]]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(*batches, strict=True))
    assert not list(cache.glob("*.part"))


def test_records_are_not_kept_in_memory(config: DataConfig, opened: Open) -> None:
    dataset = opened(config)
    assert dataset.records[0] is not dataset.records[0]
    kept = [value for value in vars(dataset.records).values() if isinstance(value, list | tuple | dict)]
    assert all(len(value) == len(config.path) for value in kept)


ROOMS: dict[str, Any] = {
    "max_tokens": 149,
    "on_long_record": "truncate",
    "picture_tokens": FixedCount(NUM_IMAGE_TOKENS + 1),
}
FIELDS: dict[str, Any] = {
    "pack_tokens": 199,
    "turns": "together",
    "on_bad_record": "skip",
    "transparency": "drop",
    "profiles": "ignore",
    "white": 4095,
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_recipe_that_decides(config: DataConfig, opened: Open, surveys: list[int], field: str) -> None:
    opened(config)
    opened(replace(config, **{field: FIELDS[field]}))
    assert len(surveys) == 2


def test_fields_of_the_recipe_that_do_not_decide(config: DataConfig, opened: Open, surveys: list[int]) -> None:
    opened(config)
    opened(replace(config, order="length_grouped", workers=3, aspect="crop"))
    assert len(surveys) == 1


@pytest.mark.parametrize("field", [*ROOMS, "template", "image_token_id"])
def test_a_field_of_the_encoder_that_decides(config: DataConfig, opened: Open, surveys: list[int], field: str) -> None:
    ids = opened(config).encoder.image_token_id
    opened(config, **{field: {**ROOMS, "template": get_template("qwen_chat"), "image_token_id": ids + 1}[field]})
    assert len(surveys) == 2


def test_another_tokenizer(
    config: DataConfig, opened: Open, surveys: list[int], tiny_llm: Path, tmp_path: Path
) -> None:
    opened(config)
    other = load_tokenizer(tiny_llm)
    other.add_tokens(["colour"])
    other.save_pretrained(tmp_path / "other")
    assert opened(config, tmp_path / "other").fingerprint != opened(config).fingerprint
    assert len(surveys) == 2


def test_changed_bytes_of_the_same_length_and_time(config: DataConfig, opened: Open, surveys: list[int]) -> None:
    first = opened(config)
    path = Path(config.path[1])
    before = path.stat()
    path.write_text(path.read_text().replace("Green.", "Brown."))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert opened(config).fingerprint != first.fingerprint
    assert len(surveys) == 2


def test_other_files_or_another_order_of_them(config: DataConfig, opened: Open, surveys: list[int]) -> None:
    opened(config)
    opened(replace(config, path=config.path[::-1]))
    opened(replace(config, path=config.path[0]))
    assert len(surveys) == 3


def test_another_version_of_the_program(
    config: DataConfig, opened: Open, surveys: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(config)
    (tmp_path / "encode.py").write_text("other = True")
    monkeypatch.setattr(cache_module, "DECIDING", [*cache_module.DECIDING[1:], str(tmp_path / "encode.py")])
    opened(config)
    assert len(surveys) == 2


def test_the_program_that_decides_is_all_that_is_imported() -> None:
    names = {Path(path).stem for path in cache_module.DECIDING}
    pictures = {"dicom", "kinds", "picture", "profile", "rule", "tiff", "wide"}
    records = {"encode", "picture_tokens", "read", "record", "source", "split", "survey", "template", "cache"}
    assert names == pictures | records


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "other arrays", "pickle", "other data", "a folder"])
def test_a_file_that_is_no_cache(config: DataConfig, opened: Open, surveys: list[int], cache: Path, kind: str) -> None:
    first = opened(config)
    (path,) = cache.glob("*.npz")
    whole = path.read_bytes()
    if kind == "other data":
        opened(replace(config, path=config.path[0]))
        (other,) = (found for found in cache.glob("*.npz") if found != path)
        path.write_bytes(other.read_bytes())
    elif kind == "other arrays":
        np.savez(path, about=np.zeros(3, np.uint8))
    elif kind == "pickle":
        np.savez(path, about=np.array([{"key": "x"}], dtype=object))
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"PK nothing of the kind"}[kind])
    made = len(surveys)
    again = opened(config)
    assert known(again) == known(first)
    assert len(surveys) == made + 1
    assert str(path) in again.opened
    assert "\n" not in again.opened
    if kind != "a folder":
        assert "read again" in again.opened
        assert path.read_bytes() == whole


def test_no_damaged_byte_gives_a_wrong_answer(config: DataConfig, opened: Open, cache: Path) -> None:
    first = known(opened(config))
    (path,) = cache.glob("*.npz")
    whole = path.read_bytes()
    rng = random.Random(0)
    for at in rng.sample(range(len(whole)), 40):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert known(opened(config)) == first
    assert path.read_bytes() == whole or known(opened(config)) == first


def test_a_picture_that_vanished(config: DataConfig, opened: Open, surveys: list[int]) -> None:
    opened(config)
    (Path(config.images) / "tall.jpg").unlink()
    with pytest.raises(DataError) as error:
        opened(config)
    message = str(error.value)
    assert len(surveys) == 1
    for name in ('a.json: record 1 ("tall")', 'a.json: record 4 ("two")', 'b.jsonl: line 4 ("two")'):
        assert f'{name}: picture "tall.jpg": no such file in' in message
    skipping = opened(replace(config, on_bad_record="skip"))
    assert skipping.report["skipped"] == len(skipping.skipped) > 3


def test_a_picture_that_went_bad_at_its_step(config: DataConfig, opened: Open) -> None:
    dataset = opened(config)
    (Path(config.images) / "wide.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r'a\.json: record 0 \("wide"\): picture "wide\.png": cannot be opened'):
        list(step_batches(dataset, [[0]], workers=0))


def test_a_picture_that_was_changed(config: DataConfig, opened: Open, surveys: list[int]) -> None:
    first = opened(config)
    Image.new("RGB", (7, 9)).save(Path(config.images) / "tall.jpg")
    second = opened(config)
    assert second.opened.startswith("1 of 4 pictures were changed")
    assert second.fingerprint != first.fingerprint
    os.utime(Path(config.images) / "wide.png", ns=(1, 1))
    third = opened(config)
    assert len(surveys) == 3
    assert third.fingerprint == second.fingerprint
    opened(config)
    assert len(surveys) == 3


def test_a_picture_that_was_missing_is_there_now(config: DataConfig, opened: Open, surveys: list[int]) -> None:
    config = replace(config, on_bad_record="skip")
    whole = opened(config).num_records
    path = Path(config.images) / "square.png"
    content = path.read_bytes()
    path.unlink()
    assert opened(config).num_records == opened(config).num_records < whole
    assert len(surveys) == 2
    path.write_bytes(content)
    assert opened(config).num_records == whole


def test_a_data_file_that_is_changed_while_it_is_used(config: DataConfig, opened: Open) -> None:
    dataset = opened(config)
    path = Path(config.path[0])
    records = list(dataset.records)
    path.with_name("new").write_text("[]")
    path.with_name("new").replace(path)
    assert list(dataset.records) == records  # the file that was opened is still there
    path = Path(config.path[1])
    path.write_text(path.read_text().replace("Green.", "Brown."))
    with pytest.raises(DataError, match=r"b\.jsonl: it was changed after it was opened"):
        list(dataset.records)


def test_without_a_place_for_the_cache(
    config: DataConfig, opened: Open, surveys: list[int], tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    for _ in range(2):
        assert "not written" in opened(config).opened
    assert len(surveys) == 2


def test_the_surveys_used_last_are_kept(
    config: DataConfig, opened: Open, surveys: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "KEPT", 2)
    sizes = (500, 501, 500, 502, 500, 501)
    for number, size in enumerate(sizes):
        before = set(cache.glob("*.npz"))
        opened(replace(config, pack_tokens=size))
        for path in set(cache.glob("*.npz")) - before:
            os.utime(path, (number, number))
        if number == 2:  # it was used, so it is the newer one
            assert max(path.stat().st_mtime for path in before) > time.time() - 100
    assert len(surveys) == 4
    assert len(list(cache.glob("*.npz"))) == 2
    assert len(list(cache.glob("*.lock"))) == 2


WRITER = """
import time
from dianjing.data import cache

def slow(file, **arrays):
    file.write(b"half of it")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)

cache.np.savez = slow
cache.Entry("k").path.parent.mkdir(parents=True)
cache._packed = lambda found, key: {}
cache.Entry("k").save(None)
"""


def test_killed_while_it_writes(cache: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    entry = cache_module.Entry("k")
    assert entry.load() is None
    assert entry.path.with_suffix(".part").exists()  # the next one writes over it


def _hold(key: str, ready: Any, done: Any) -> None:
    with cache_module.Entry(key).locked(lambda *_: None):
        ready.set()
        done.wait(30)


def test_two_processes_make_it_once(
    config: DataConfig, opened: Open, surveys: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(config)
    (path,) = cache.glob("*.npz")
    hidden = path.replace(path.with_suffix(".hidden"))
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(path.stem, ready, done))
    holder.start()
    assert ready.wait(30)
    waited: list[str] = []

    def watch(doing: str, at: int, total: int) -> None:
        if doing.startswith("waiting"):  # now the other one is done with it
            waited.append(doing)
            hidden.replace(path)
            done.set()

    encoder = first.encoder
    second = open_dataset(config, encoder, None, watch)
    holder.join()
    assert (len(waited), len(surveys)) == (1, 1)
    assert second.fingerprint == first.fingerprint


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder("data") == tmp_path / "cache/dianjing/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("data") == Path.home() / ".cache/dianjing/data"


def test_relative_paths_from_another_folder(
    config: DataConfig,
    opened: Open,
    surveys: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [{**record, "image": "a.bmp"} for record in tiny_records()[:1]]
    for folder, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        Path("data.json").write_text(json.dumps(records))
        Image.new("RGB", (4, 4), colour).save("a.bmp")
        os.utime("a.bmp", ns=(1, 1))
        opened(DataConfig(path="data.json"))
    assert len(surveys) == 2
