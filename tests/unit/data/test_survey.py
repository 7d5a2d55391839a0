from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dianjing.config.schema import DataConfig
from dianjing.constants import IGNORE_INDEX
from dianjing.data import read as read_module
from dianjing.data import split as split_module
from dianjing.data import survey as survey_module
from dianjing.data.dataset import Dataset, open_dataset
from dianjing.data.encode import Encoder, load_tokenizer, prepared
from dianjing.data.read import Place
from dianjing.data.record import Record, load_records, parse_record, turns_alone
from dianjing.data.template import TEMPLATES
from dianjing.errors import DataError
from dianjing.pictures.picture import check_image
from tests.tiny import NUM_IMAGE_TOKENS, TinyDataset, tiny_records
from tests.xtuner import make_encoder


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_record_too_large_is_never_parsed(
    suffix: str, tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (read_module, survey_module):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 2000)
    small = [record for record in tiny_records() if "image" not in record]
    huge = {"id": "huge", "conversations": [{"from": "human", "value": "x" * 5000}, {"from": "gpt", "value": "y"}]}
    records = [small[0], huge, small[1]]
    lines = [json.dumps(record) for record in records]
    path = tmp_path / f"data{suffix}"
    path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{', '.join(lines)}]", encoding="utf-8")
    config = DataConfig(path=str(path))
    encoder, loads = encoder_for(tiny_llm, config), json.loads
    monkeypatch.setattr("json.loads", lambda text: pytest.fail("parsed") if len(text) > 5000 else loads(text))
    with pytest.raises(DataError, match=r"0 MB in one record; more than 0 are not parsed"):
        open_dataset(config, encoder, None)
    dataset = open_dataset(replace(config, on_bad_record="skip"), encoder, None)
    assert [record.id for record in dataset.records] == ["text", "chat"]
    assert dataset.report["skipped"] == 1
    with pytest.raises(DataError, match=r"record 1: 0 MB in one record"):
        load_records(str(path))


def encoder_for(llm: Path, config: DataConfig) -> Encoder:
    settings = {"max_tokens": config.max_tokens, "on_long_record": config.on_long_record}
    return make_encoder(load_tokenizer(llm), "internlm2_chat", num_image_tokens=NUM_IMAGE_TOKENS, **settings)


def mixed_records() -> list[Any]:
    """Return good records and bad ones of many kinds, some more than once."""
    records: list[Any] = [{**record, "id": f"{record['id']}{copy}"} for copy in range(5) for record in tiny_records()]
    records[3] = {**records[3], "image": "none.png"}
    records[7]["conversations"] = []
    records[11] = "no record"
    records[13].pop("id")
    records[16]["image"] = "../data.json"
    records[18]["conversations"].insert(0, {"from": "gpt", "value": "Dropped."})
    records[22]["conversation"] = records[22].pop("conversations")
    records[25]["conversations"][0]["value"] += " and so on" * 30
    records[30]["image"] = "a\0b"
    return records


def write(path: Path, records: Sequence[Any], text: str = "") -> str:
    if path.suffix == ".jsonl":
        path.write_text("\ufeff" + text + "\n\r\n".join(json.dumps(record) for record in records), encoding="utf-8")
    else:
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    return str(path)


def turns_of(records: Sequence[Record], config: DataConfig) -> Iterator[Record]:
    for record in records:
        yield record
        if config.turns == "both" and len(record.turns) > 1:
            yield from turns_alone(record)


def expected(config: DataConfig, encoder: Encoder) -> dict[str, Any]:
    """Read everything whole, in one process and one record after another."""
    loaded = load_records(config.path, on_bad_record="skip")
    kept, lengths, problems, too_long, supervised, truncated = [], [], list(loaded.skipped), [], 0, 0
    digest = hashlib.sha256()
    for record in turns_of(loaded.records, config):
        try:
            example = encoder.encode(record)
            sizes = [check_image(config.images, name) for name in record.images]
        except DataError as error:
            named = str(error) if str(error).startswith(record.where) else f"{record.where}: {error}"
            (too_long if "but max_tokens" in named else problems).append(named)
            continue
        kept.append(record)
        lengths.append(len(example.input_ids))
        supervised += sum(label != IGNORE_INDEX for label in example.labels)
        truncated += example.truncated > 0
        digest.update(
            array("q", [*example.input_ids, *example.labels, *sizes]).tobytes() + repr(record.images).encode()
        )
    return {
        "records": kept,
        "lengths": tuple(lengths),
        "skipped": (*problems, *too_long),
        "fingerprint": digest.hexdigest(),
        "report": {
            "records": len(kept),
            "pictures": sum(len(record.images) for record in kept),
            "text-only": sum(not record.images for record in kept),
            "turns": sum(len(record.turns) for record in kept),
            "positions": sum(lengths),
            "supervised tokens": supervised,
            "truncated": truncated,
            "skipped": len(problems) + len(too_long),
            **loaded.notices,
        },
    }


def found(dataset: Dataset) -> dict[str, Any]:
    names = ("lengths", "skipped", "fingerprint", "report")
    return {"records": list(dataset.records), **{name: getattr(dataset, name) for name in names}}


@pytest.fixture
def mixed(tmp_path: Path, tiny_dataset: TinyDataset) -> DataConfig:
    """Return two files of mixed records, a list and lines, one of which is no JSON."""
    listed = write(tmp_path / "a.json", mixed_records())
    lined = write(tmp_path / "b.jsonl", mixed_records(), "{\n\n")
    return DataConfig(
        path=(listed, lined),
        images=str(tiny_dataset.images),
        on_bad_record="skip",
        on_long_record="skip",
        max_tokens=90,
    )


@pytest.mark.parametrize("turns", ["together", "both"])
@pytest.mark.parametrize(("records_in_a_chunk", "on_long_record"), [(3, "skip"), (512, "truncate")])
def test_it_finds_what_reading_one_after_another_finds(
    mixed: DataConfig,
    tiny_llm: Path,
    turns: Any,
    records_in_a_chunk: int,
    on_long_record: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(split_module, "CHUNK_RECORDS", records_in_a_chunk)
    config = replace(mixed, turns=turns, on_long_record=on_long_record)
    encoder = encoder_for(tiny_llm, config)
    dataset = open_dataset(config, encoder, None)
    wanted = expected(config, encoder)
    assert found(dataset) == wanted
    assert list(dataset.report) == list(wanted["report"])
    assert len(dataset.skipped) > 10
    assert [dataset.records[number] for number in (0, -1)] == [wanted["records"][0], wanted["records"][-1]]


def test_several_processes_find_the_same(mixed: DataConfig, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_for(tiny_llm, mixed)
    monkeypatch.setattr(split_module, "CHUNK_RECORDS", 7)
    monkeypatch.setattr(survey_module, "ALONE_BYTES", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    assert found(open_dataset(mixed, encoder, None)) == expected(mixed, encoder)


def test_how_far_it_is(mixed: DataConfig, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "CHUNK_RECORDS", 8)
    told: list[tuple[str, int, int]] = []
    open_dataset(mixed, encoder_for(tiny_llm, mixed), None, lambda *said: told.append(said))
    total = sum(Path(path).stat().st_size for path in mixed.path)
    assert {said[::2] for said in told} == {("records and pictures", total)}
    assert [said[1] for said in told] == sorted(said[1] for said in told)
    assert len(told) > 8


WHOLE = {
    "not closed": '[{"id": "x"}',
    "trailing comma": "[1, 2,]",
    "a comment": "[1, /* two */ 2]",
    "not a list": '{"id": "x"}',
    "more after the list": "[1] 2",
    "not JSON inside": '[{"id": x}]',
    "too deep": "[" * 100_000,
    "empty list": " [ ] ",
    "empty": "",
    "UTF-16": "[1]".encode("utf-16"),
    "not UTF-8": b'[{"id": "\xff"}]',
}


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_refused_whole(tmp_path: Path, tiny_llm: Path, name: str, ending: str) -> None:
    text = WHOLE[name]
    path = tmp_path / f"data{ending}"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    config = DataConfig(path=str(path), on_bad_record="skip")
    try:
        wanted = load_records(str(path), on_bad_record="skip").skipped[0]
    except DataError as error:
        wanted = str(error)
    with pytest.raises(DataError) as refused:
        open_dataset(config, encoder_for(tiny_llm, config), None)
    assert wanted in str(refused.value)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_an_encoder_that_is_prepared_gives_the_same(tiny_llm: Path, template: str) -> None:
    encoder = make_encoder(load_tokenizer(tiny_llm), template, num_image_tokens=NUM_IMAGE_TOKENS)
    for variant in (encoder, replace(encoder, template=replace(encoder.template, joined=True))):
        places = (Place("data.json", number, 0) for number in range(100))
        records = [parse_record(*pair)[0] for pair in zip(tiny_records(), places, strict=False)]
        quick = prepared(variant, records)
        assert [quick.encode(record) for record in records] == [variant.encode(record) for record in records]
