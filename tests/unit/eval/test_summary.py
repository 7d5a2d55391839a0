from __future__ import annotations

import random
import statistics

import pytest

from dianjing.eval.score import METRICS
from dianjing.eval.summary import (
    NAMES,
    NO_PICTURE,
    OTHER_PICTURE,
    RIGHT,
    Scored,
    Summary,
    interval,
    score,
    summarise,
    summarise_by_type,
)


def scored(right: str, reference: str, other: str | None = None, none: str | None = None, type_: str = "t") -> Scored:
    return score(type_, reference, {RIGHT: right, OTHER_PICTURE: other, NO_PICTURE: none})


def test_every_metric_has_a_mean_for_each_way_of_asking() -> None:
    written = summarise([scored("red", "red", "blue", "red"), scored("blue", "red", "blue", "blue")]).to_json()
    for metric in METRICS:
        assert [written[metric + way] for way in ("", "_other_picture", "_no_picture")] == [0.5, 0, 0.5]
    losses = {"loss", "loss_other_picture", "loss_no_picture", "loss_sight"}
    assert {name for name in written if written[name] is None} == {"captions", "same_answer", *losses}


def test_old_names_mean_what_they_meant() -> None:
    names = ("n", "accuracy", "f1", "accuracy_other_picture", "accuracy_no_picture", "sight")
    written = summarise([scored("It is red", "red", "blue", "red"), scored("red", "red")]).to_json()
    assert [written[name] for name in names] == [2, 0.5, pytest.approx((2 / 4 + 1) / 2), 0, 1, 0]


def test_sight_is_paired_over_the_same_questions() -> None:
    summary = summarise(
        [scored("red", "red", "blue", "red"), scored("blue", "red", "blue", "blue"), scored("red", "red")]
    )
    assert summary.n == 3
    assert summary.mean("accuracy") == pytest.approx(2 / 3)
    assert summary.mean("accuracy_other_picture") == 0
    assert summary.mean("accuracy_no_picture") == 0.5
    assert summary.mean("sight") == 0.5  # 1 of the 2 questions that have another picture, minus 0


def test_text_has_no_sight() -> None:
    summary = summarise([scored("four", "four")])
    assert summary.mean("accuracy") == 1
    assert summary.to_json()["sight"] is None
    assert "sight" not in summary.to_json()["intervals"]
    assert dict(summary.table())["exact"][1:] == [None, None, None]


def test_summaries_come_by_type_in_order() -> None:
    by_type = summarise_by_type([scored("x", y, type_=name) for name, y in (("b", "x"), ("a", "y"), ("b", "y"))])
    assert {name: (one.n, one.mean("accuracy")) for name, one in by_type.items()} == {"b": (2, 0.5), "a": (1, 0.0)}
    assert list(by_type) == ["b", "a"]


def test_the_table_holds_every_figure() -> None:
    summary = Summary(n=1, figures={name: summarise([scored("a", "a")]).figures["accuracy"] for name in NAMES})
    assert sum(figure is not None for _, row in summary.table() for figure in row) == len(NAMES)


@pytest.mark.parametrize(("right", "n"), [(30, 60), (180, 200), (3, 40)])
def test_the_interval_of_a_share_is_the_binomial_one(right: int, n: int) -> None:
    """Resampling shares of 0 and 1 draws from a binomial: two standard deviations to each side."""
    low, high = interval([1.0] * right + [0.0] * (n - right))
    share = right / n
    width = 2 * 1.96 * (share * (1 - share) / n) ** 0.5
    assert low < share < high
    assert high - low == pytest.approx(width, rel=0.12)


def test_an_interval_holds_the_truth_19_times_of_20() -> None:
    draw = random.Random(3)
    held = 0
    for _ in range(200):
        low, high = interval([float(draw.random() < 0.4) for _ in range(100)])
        held += low <= 0.4 <= high
    assert 180 <= held <= 199


def test_an_interval_is_the_same_each_time_and_of_the_order_and_size_it_should_be() -> None:
    values = [0.1 * (i % 7) for i in range(90)]
    assert interval(values) == interval(list(values))
    assert interval([0.25] * 50) == (0.25, 0.25)
    low, high = interval(values * 9)
    assert high - low == pytest.approx((interval(values)[1] - interval(values)[0]) / 3, rel=0.15)


def test_sight_is_resampled_in_pairs() -> None:
    """Questions that differ much but gain the same from the picture leave no doubt about the gain."""
    summary = summarise([scored("red blue", "red blue", "red x") for _ in range(20)] + [scored("", "a", "b")] * 20)
    each = statistics.NormalDist(0.5, 0.5 / 40**0.5)
    figure = summary.figures["accuracy"]
    assert figure.high - figure.low == pytest.approx(each.inv_cdf(0.975) - each.inv_cdf(0.025), rel=0.15)
    same = summarise([scored("x", "x" if i % 2 else "y", "x") for i in range(40)]).figures
    assert same["accuracy"].high - same["accuracy"].low > 0.2
    assert same["sight"] == (0, 0, 0)


def test_large_sets_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i % 3) for i in range(50)]
    whole = interval(values)
    monkeypatch.setattr("dianjing.eval.summary.CHUNK", 400)
    assert interval(values) == whole


def test_the_sight_of_losses_is_paired_and_positive_where_the_picture_helps() -> None:
    losses = [{RIGHT: 1.0, OTHER_PICTURE: 3.0, NO_PICTURE: 2.0}, {RIGHT: 5.0, OTHER_PICTURE: 5.5, NO_PICTURE: None}]
    summary = summarise([score("t", "red", {RIGHT: "blue"}, losses=one) for one in [*losses, {RIGHT: 9.0}]])
    means = [summary.mean(name) for name in ("loss", "loss_other_picture", "loss_no_picture", "loss_sight")]
    assert means == [5.0, 4.25, 2.0, 1.25]
    figure = summary.figures["loss_sight"]
    assert 0.5 <= figure.low < figure.high <= 2.0


@pytest.mark.parametrize(("exact", "says"), [(0, False), (4, False), (5, True), (100, True)])
def test_exact_match_says_nothing_where_hardly_an_answer_is_exact(exact: int, says: bool) -> None:
    summary = summarise([scored("a b" if i < exact else "a", "a b") for i in range(100)])
    assert summary.exact_says_something == says


def test_a_blind_guess_that_is_exact_counts_too() -> None:
    assert summarise([scored("no", "yes", other="yes", none="no")]).exact_says_something
