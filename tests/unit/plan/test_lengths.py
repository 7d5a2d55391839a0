"""Lengths of records: measured as a run finds them, or assumed and said so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dianjing.data.picture_tokens import FixedCount
from dianjing.errors import DataError
from dianjing.plan import lengths as lengths_module
from dianjing.plan.lengths import lengths_of, measured_lengths, step_records
from tests.conftest import MakeRecipe
from tests.packs import prepare


@pytest.mark.parametrize("turns", ["together", "both"])
def test_as_the_opened_data_set_has_them(make_recipe: MakeRecipe, tiny_llm: Path, turns: str) -> None:
    recipe = make_recipe("pretrain", data={"turns": turns})
    _, dataset = prepare(recipe)
    found = measured_lengths(recipe, tiny_llm, dataset.encoder.picture_tokens)
    assert vars(found) == pytest.approx(vars(lengths_of(dataset)))
    assert found.records == dataset.num_records
    most = max(len(record.images) / length for record, length in zip(dataset.records, dataset.lengths, strict=True))
    assert 0 < found.picture_share <= most


def test_of_many_records_some_are_measured(
    make_recipe: MakeRecipe, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths_module, "SAMPLE", 4)
    found = measured_lengths(make_recipe(), tiny_llm, FixedCount(4))
    assert (found.records, found.source) == (8, "8 records, 4 of them measured")


def test_without_data_or_tokenizer_they_are_assumed(make_recipe: MakeRecipe, tiny_llm: Path, tmp_path: Path) -> None:
    recipe = make_recipe("finetune", data={"path": str(tmp_path / "later.json"), "pack_tokens": 4096})
    found = measured_lengths(recipe, tiny_llm, FixedCount(576))
    assert found.source.startswith(
        f"assumed ({tmp_path / 'later.json'} is not there): 300 text tokens and 0.94 pictures"
    )
    assert (found.records, found.longest) == (0, 1472 + 575)
    assert found.tokens == pytest.approx(300 + 0.94 * 576)
    (tmp_path / "config.json").write_bytes((tiny_llm / "config.json").read_bytes())
    found = measured_lengths(make_recipe("pretrain"), tmp_path, FixedCount(576))
    assert f"assumed ({tmp_path} has no tokenizer that can be read)" in found.source


def test_records_that_no_run_could_use(make_recipe: MakeRecipe, tiny_llm: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{"id": "1", "conversations": []}]))
    with pytest.raises(DataError, match=r"no record there can be used; `dianjing check"):
        measured_lengths(make_recipe(data={"path": str(path)}), tiny_llm, FixedCount(4))


def test_a_step_has_no_more_records_than_there_are(make_recipe: MakeRecipe, tiny_llm: Path) -> None:
    recipe = make_recipe(train={"global_batch_size": 100})
    found = measured_lengths(recipe, tiny_llm, FixedCount(4))
    assert step_records(recipe, found) == 8
    assert step_records(recipe, replace(found, records=0)) == 100
