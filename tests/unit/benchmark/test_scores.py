"""Files in their makers' layouts, answers of all sorts: the figures are those of lmms-eval 0.7's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dianjing.benchmark.item import Benchmark, Item, first_groups
from dianjing.benchmark.table import BENCHMARKS
from tests import benchmark_files as made


def answers_to(name: str, items: Sequence[Item]) -> list[str]:
    """Return an answer for each question, one of every sort in turn."""
    if name in ("pope", "mme"):
        return [made.YES_NO[i * 5 % 13] for i in range(len(items))]
    if name == "chartqa":
        return [made.CHART_ANSWERS[i * 7 % 12] for i in range(len(items))]
    if name == "refcoco":
        boxes = ["{<0><0><20><30>}", "[12, 40, 32, 70]", "none", "<5><10><25>", "{<11><46><31><76>}", ""]
        return [boxes[i % 6] for i in range(len(items))]
    if name in ("vqav2", "textvqa", "vizwiz", "gqa"):
        words = [made.COLOURS[i % 4] if i % 5 else "two" for i in range(len(items))]
        return [made.WORD_ANSWERS[i % 11](word) for i, word in enumerate(words)]
    rights = [str(item.row["answer"]) for item in items]
    return made.letters_for([(right, made.COLOURS["ABCD".index(right)]) for right in rights])


def write(name: str, folder: Path) -> Path:
    if name == "mmbench":
        return made.write_tsv(folder / "mmbench.tsv", made.mmbench_rows())
    if name == "mmmu":
        import pyarrow
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(made.mmmu_rows()), folder / "validation.parquet")
        return folder
    writer = getattr(made, f"write_{name}")
    return writer(folder / "files" if name in ("pope", "mme", "ai2d") else folder)


def read(name: str, folder: Path) -> tuple[Benchmark, list[Item]]:
    return BENCHMARKS[name], BENCHMARKS[name].read(write(name, folder))


EXPECTED: dict[str, dict[str, float]] = {
    "pope": {
        "accuracy": 0.1111111111111111,
        "precision": 0.45454545454545453,
        "recall": 0.625,
        "f1": 0.5263157894736842,
    },
    "mme": {"perception": 81.25, "cognition": 50.0},
    "textvqa": {"accuracy": 0.5916666666666667},
    "vizwiz": {"accuracy": 0.5916666666666667},
    "vqav2": {"accuracy": 0.5916666666666667},
    "gqa": {"accuracy": 0.375},
    "chartqa": {"accuracy": 0.3333333333333333},
    "scienceqa": {"accuracy": 0.3333333333333333},
    "seed": {"accuracy": 0.4166666666666667},
    "ai2d": {"accuracy": 0.4166666666666667},
    "mmmu": {"accuracy": 0.625},
    "mmbench": {"accuracy": 0.5, "plain": 0.6666666666666666},
    "refcoco": {"accuracy": 0.125},
}
"""Measured with lmms-eval 0.7.2's functions on these answers (RefCOCO: XTuner 0.1.23's eval_iou)."""


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "choices"])
def test_figures_are_lmms_evals(name: str, tmp_path: Path) -> None:
    benchmark, items = read(name, tmp_path)
    assert len(items) >= 20
    judged = benchmark.judge(items, answers_to(name, items))
    assert {figure: judged.figures[figure] for figure in EXPECTED[name]} == EXPECTED[name]
    assert 0 < judged.figures["accuracy"] < 1


def test_an_open_answer_of_mmmu_holds_the_reference() -> None:
    """As MMMU's own program counts; lmms-eval 0.7 counts no open answer as right."""
    item = Item(id="validation_Math_1", text="", pictures=(), type="Math", row={"answer": "24", "options": {}})
    said = ["24", "It is 24.", "x = 24.0", "so the result is 25", "", "二十四"]
    assert [BENCHMARKS["mmmu"].judge([item], [answer]).figures["accuracy"] for answer in said] == [1, 1, 1, 0, 0, 0]


def test_a_file_without_copies_is_asked_in_every_order(tmp_path: Path) -> None:
    rows = made.mmbench_rows(turned=False)
    items = BENCHMARKS["mmbench"].read(made.write_tsv(tmp_path / "dev.tsv", rows))
    assert len(items) == 4 * made.NUMBER
    for item in items:
        assert item.row["options"][item.row["answer"]] == made.COLOURS[int(item.id) % 4 * 2 % 4]
    always_a = BENCHMARKS["mmbench"].judge(items, ["A"] * len(items)).figures
    assert always_a == {"accuracy": 0.0, "plain": 0.25}


def test_the_first_questions_keep_their_copies(tmp_path: Path) -> None:
    _, items = read("mmbench", tmp_path)
    assert [item.id for item in first_groups(items, 2)] == ["0", "1", "1000000"]


PROMPTS = {
    "mmbench": "Look well.\nWhich colour is thing 0?\nA. red\nB. green\nC. blue\nD. white\n"
    "Answer with the option's letter from the given choices directly.",
    "pope": "Is there a thing 0?\nAnswer the question using a single word or phrase.",
    "mme": "Is it 0?\nAnswer the question using a single word or phrase.",
    "refcoco": "[refer] give me the location of thing 0",
    "vizwiz": "What is this 0?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_llavas(name: str, tmp_path: Path) -> None:
    assert read(name, tmp_path)[1][0].text == PROMPTS[name]
