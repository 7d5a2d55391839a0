"""Estimates and limits."""

from __future__ import annotations

import pytest

from dianjing.make.cost import Budget, Prices, estimate, prompt_tokens
from dianjing.make.journal import Totals, Usage
from dianjing.make.pictures import Picture
from dianjing.make.prompts import Prompt
from dianjing.make.requests import Parameters, Request, plan

PARAMETERS = Parameters(model="m", max_tokens=200, long_edge=280)
PRICES = Prices(tokens_in=2_000_000, tokens_out=3_000_000)


def requests(number: int, text: str = "x" * 35, size: tuple[int, int] = (560, 280)) -> list[Request]:
    prompt = Prompt(name="p", kind="k", language="en", reply="text", texts=(text,), sha256="1")
    pictures = [Picture(name=str(i), sha256=str(i), dhash=i, size=size) for i in range(number)]
    return plan(pictures, [prompt], PARAMETERS)


def test_a_prompts_tokens_are_the_sent_pixels_and_the_text() -> None:
    # 280 x 140 pixels are 10 x 5 squares of 28.
    assert prompt_tokens(requests(1)[0], PARAMETERS) == 50 + 10


def test_an_estimate_follows_what_was_measured() -> None:
    rough = estimate(requests(4), PARAMETERS, {}, PRICES)
    assert (rough.requests, rough.prompt_tokens, rough.completion_tokens, rough.measured) == (4, 240, 480, 0)
    assert rough.cost == pytest.approx(2 * 240 + 3 * 480)
    usage = {"p": Usage(replies=2, prompt_tokens=200, completion_tokens=10)}
    close = estimate(requests(4), PARAMETERS, usage, None)
    assert (close.prompt_tokens, close.completion_tokens, close.measured, close.cost) == (400, 20, 4, None)


def test_a_call_counts_at_its_worst_until_it_is_answered() -> None:
    (request,) = requests(1)
    totals = Totals()
    budget = Budget(parameters=PARAMETERS, totals=totals, prices=PRICES, max_cost=1500.0)
    assert budget.worst(request) == 2 * 60 + 3 * 200
    assert not budget.refuses(request)
    totals.unanswered = 1
    assert not budget.refuses(request)
    totals.unanswered = 2
    assert "--max-cost 1500" in budget.refuses(request)
    totals.unanswered, totals.cost = 0, 800.0
    assert "800.0000 spent" in budget.refuses(request)


def test_longer_messages_than_thought_make_the_worst_worse() -> None:
    (request,) = requests(1)
    usage = {"p": Usage(replies=1, prompt_tokens=90, most_prompt_tokens=90)}
    budget = Budget(parameters=PARAMETERS, totals=Totals(usage=usage), prices=PRICES)
    assert budget.worst(request) == 2 * 90 + 3 * 200


def test_replies_without_a_price_get_the_one_of_today() -> None:
    unpriced = Usage(replies=1, prompt_tokens=5, completion_tokens=7)
    budget = Budget(parameters=PARAMETERS, totals=Totals(cost=1.0, unpriced=unpriced), prices=PRICES)
    assert budget.spent() == pytest.approx(1 + 10 + 21)
    assert budget.cost(requests(1)[0], {"prompt_tokens": 1, "completion_tokens": 1}) == pytest.approx(5)
    assert budget.cost(requests(1)[0], None) == budget.worst(requests(1)[0])
