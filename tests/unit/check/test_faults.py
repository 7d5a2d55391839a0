"""Each fault planted alone gives its own code and no other; all of them together give all."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dianjing.check.check import Result, Settings, check
from dianjing.check.codes import CODES
from dianjing.check.fix import fix
from dianjing.check.tokens import Reading
from dianjing.config.schema import DataConfig
from dianjing.data.dataset import Dataset, open_dataset
from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.template import choose_template, get_template
from dianjing.errors import DataError
from dianjing.model.folders import resolve
from dianjing.tinyworld.records import Sizes, write_demo_data
from tests.faults import DataSet, copy_of, everything_under
from tests.faults_of_texts import FAULTS

ALONE_ONLY = ("encoding", "json_syntax", "json_comment", "json_trailing_comma")
"""Each refuses the file whole, which `open_dataset` can show for one at a time."""
FOUND_BY_CHECK_ALONE = ("picture_broken",)
"""An error that training meets only on the way."""
SETTINGS = {"max_tokens": 5000, "pack_tokens": 10_000, "on_long_record": "truncate"}
NUM_IMAGE_TOKENS = 4


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a clean set: data.json, held_out.json and images."""
    folder = tmp_path_factory.mktemp("clean")
    sizes = Sizes(pretrain=1, finetune=150, questions_per_scene=4, held_out=4, held_out_pairs=1, captions=1)
    written = write_demo_data(folder, sizes)
    written.finetune.rename(folder / "data.json")
    return folder


@pytest.fixture(scope="module")
def reading() -> Reading:
    folder = resolve("tinyworld", "language_model")
    template = choose_template(load_tokenizer(folder))
    data: Any = DataConfig(path="", **SETTINGS)
    return Reading(
        tokenizer_folder=str(folder), template=template, picture_tokens=FixedCount(NUM_IMAGE_TOKENS), data=data
    )


@pytest.fixture
def data(clean: Path, tmp_path: Path) -> DataSet:
    return copy_of(clean, tmp_path / "set")


def checked(data: DataSet, reading: Reading | None, path: Path | None = None, **settings: Any) -> Result:
    return check(
        Settings(
            paths=(str(path or data.path),),
            images=str(data.images),
            held_out=str(data.folder / "held_out.json"),
            reading=reading,
            workers=1,
            **settings,
        ),
        lambda *_: None,
    )


def opened(data: DataSet, reading: Reading, on_bad: Any = "error") -> Dataset:
    """Open the set as training does."""
    tokenizer = load_tokenizer(reading.tokenizer_folder)
    config: Any = dataclasses.replace(reading.data, path=str(data.path), images=str(data.images), on_bad_record=on_bad)
    encoder = Encoder(
        tokenizer=tokenizer,
        template=get_template(reading.template),
        picture_tokens=reading.picture_tokens,
        max_tokens=config.max_tokens,
        on_long_record=config.on_long_record,
        image_token_id=image_token_id(tokenizer),
    )
    return open_dataset(config, encoder, None)


def refuses(data: DataSet, reading: Reading) -> bool:
    try:
        opened(data, reading)
    except DataError:
        return True
    return False


def test_nothing_is_found_in_a_clean_set(data: DataSet, reading: Reading) -> None:
    data.write()
    result = checked(data, reading)
    assert dict(result.findings.counts) == {}
    assert (result.records, result.refused) == (150, [])


@pytest.mark.parametrize("code", FAULTS)
def test_a_fault_alone_gives_its_own_code(data: DataSet, reading: Reading, code: str) -> None:
    FAULTS[code](data)
    data.write()
    result = checked(data, reading)
    assert set(result.findings.counts) == {code}
    finding = result.findings.of(code)[0]
    assert finding.file == str(data.path)
    assert finding.record is not None or code in ("bom", "json_trailing_comma", "yes_no_skew")
    assert finding.text
    assert CODES[code].fix
    errs = CODES[code].severity == "error" and code not in FOUND_BY_CHECK_ALONE
    assert refuses(data, reading) == errs, "an error is what training refuses, and nothing else"


@pytest.mark.parametrize(("records", "pictures", "found"), [(6, 1, 1), (30, 9, 1), (30, 10, 0), (4, 1, 0)])
def test_few_pictures(data: DataSet, records: int, pictures: int, found: int) -> None:
    names = [record["image"] for record in data.records[:pictures]]
    data.records = [{**one, "image": names[i % pictures]} for i, one in enumerate(data.records[:records])]
    data.write()
    assert checked(data, None).findings.counts["few_pictures"] == found


def test_all_faults_together_give_all_codes(data: DataSet, reading: Reading) -> None:
    for plant in FAULTS.values():
        plant(data)
    data.write()
    before = everything_under(data.folder)
    found = set(checked(data, reading).findings.counts)
    assert found == set(FAULTS)
    assert len(found) >= 30
    assert everything_under(data.folder) == before


def test_a_run_would_use_what_check_says(data: DataSet, reading: Reading) -> None:
    for code, plant in FAULTS.items():
        if code not in ALONE_ONLY:
            plant(data)
    random.Random(0).shuffle(data.records)
    data.write()
    said, done = checked(data, reading).run, opened(data, reading, "skip")
    assert said
    assert said.lengths == done.lengths
    assert said.records == done.report["records"]
    assert said.skipped == done.report["skipped"]
    assert said.truncated == done.report["truncated"]
    assert said.supervised == done.report["supervised tokens"]


@pytest.mark.parametrize("changes", [{"turns": "both"}, {"on_long_record": "skip"}, {"pack_tokens": 120}])
def test_whatever_the_recipe_does(data: DataSet, reading: Reading, changes: dict[str, Any]) -> None:
    for code in ("truncated", "cut_too_deep", "picture_missing", "answer_empty"):
        FAULTS[code](data)
    two = data.one()
    two["image"] = [two["image"], "lost.png"]
    two["conversations"][2]["value"] += " <image>"
    data.write()
    reading = dataclasses.replace(reading, data=dataclasses.replace(reading.data, **changes))
    said, done = checked(data, reading).run, opened(data, reading, "skip")
    assert said
    assert said.lengths == done.lengths
    assert said.skipped == done.report["skipped"] > 0


def test_the_fixed_copy_has_none_of_the_fixed_codes(data: DataSet, reading: Reading, tmp_path: Path) -> None:
    fixable = [code for code in FAULTS if CODES[code].fixed]
    for code in fixable:
        FAULTS[code](data)
    data.write()
    before = everything_under(data.folder)
    result = checked(data, reading)
    assert set(result.findings.counts) == set(fixable)
    out = tmp_path / "fixed.json"
    fixed = fix(str(data.path), str(out), result.names)
    assert everything_under(data.folder) == before
    assert dict(checked(data, reading, out).findings.counts) == {}
    assert fixed.left_out == 0
    changes = [json.loads(line) for line in (tmp_path / "fixed.changes.jsonl").read_text().splitlines()]
    assert {change["code"] for change in changes} == set(fixable)
    assert sum(fixed.changes.values()) == len(changes)


def test_only_what_is_certain_is_changed(data: DataSet, reading: Reading, tmp_path: Path) -> None:
    """A record without a fault is the same record in the copy, and one that cannot be put right too."""
    for code in FAULTS:
        if not CODES[code].fixed and code not in ("encoding", "json_syntax"):
            FAULTS[code](data)
    data.write()
    fix(str(data.path), str(tmp_path / "copy.json"), checked(data, reading).names)
    assert json.loads((tmp_path / "copy.json").read_text("utf-8")) == json.loads(data.path.read_text("utf-8"))
    assert (tmp_path / "copy.changes.jsonl").read_text() == ""
