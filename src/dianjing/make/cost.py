"""Tokens and money: what calls will take, and whether another one may be made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dianjing.make.journal import Totals, Usage
from dianjing.make.pictures import sent_size
from dianjing.make.requests import Parameters, Request

PIXELS_PER_TOKEN = 28 * 28
"""Of a picture: what the Qwen-VL family takes; others are of the same order."""
BYTES_PER_TOKEN = 3.5
"""Of a message in UTF-8."""
REPLY_TOKENS = {"text": 120, "pairs": 400}
"""Of a reply, before any was seen."""
MILLION = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Prices:
    """The price of a million tokens, in any currency."""

    tokens_in: float
    tokens_out: float

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the price of these numbers of tokens."""
        return (prompt_tokens * self.tokens_in + completion_tokens * self.tokens_out) / MILLION


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The tokens and money that the remaining requests will take."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    measured: int
    """How many of the requests are judged by replies that the journal holds to their prompt."""
    cost: float | None
    """None without prices."""


def prompt_tokens(request: Request, parameters: Parameters) -> int:
    """Return about how many tokens a request has."""
    width, height = sent_size(request.picture.size, parameters.long_edge) if request.picture else (0, 0)
    return round(width * height / PIXELS_PER_TOKEN + len(request.text.encode()) / BYTES_PER_TOKEN)


def estimate(
    requests: Iterable[Request], parameters: Parameters, usage: dict[str, Usage], prices: Prices | None
) -> Estimate:
    """Return what requests will take: as much as the replies to their prompt so far, or a rule of thumb."""
    number = measured = 0
    tokens_in = tokens_out = 0.0
    for request in requests:
        seen = usage.get(request.prompt)
        number += 1
        measured += seen is not None
        tokens_in += seen.prompt_tokens / seen.replies if seen else prompt_tokens(request, parameters)
        guess = min(REPLY_TOKENS[request.reply], parameters.max_tokens)
        tokens_out += seen.completion_tokens / seen.replies if seen else guess
    return Estimate(
        requests=number,
        prompt_tokens=round(tokens_in),
        completion_tokens=round(tokens_out),
        measured=measured,
        cost=prices.of(tokens_in, tokens_out) if prices else None,
    )


@dataclass(kw_only=True)
class Budget:
    """The hard limits of a journal: no call is made that could lead past them."""

    parameters: Parameters
    totals: Totals
    prices: Prices | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    under_way: int = 0
    """Calls of this run that wait for their answer."""

    def spent(self) -> float:
        """Return what the replies in the journal have cost."""
        unpriced = self.totals.unpriced
        later = self.prices.of(unpriced.prompt_tokens, unpriced.completion_tokens) if self.prices else 0.0
        return self.totals.cost + later

    def cost(self, request: Request, usage: dict[str, int] | None) -> float | None:
        """Return what a reply has cost: at worst, if the endpoint does not count tokens; None without prices."""
        if self.prices is None:
            return None
        if usage is None:
            return self.worst(request)
        return self.prices.of(usage["prompt_tokens"], usage["completion_tokens"])

    def worst(self, request: Request) -> float:
        """Return the most that a call is expected to cost: the longest reply, to the longest message so far."""
        if self.prices is None:
            return 0.0
        seen = self.totals.usage.get(request.prompt, Usage()).most_prompt_tokens
        return self.prices.of(max(seen, prompt_tokens(request, self.parameters)), self.parameters.max_tokens)

    def refuses(self, request: Request) -> str:
        """Return which limit one more call could break, "" if none.

        A call without an answer, under way or lost, counts at its worst.
        """
        if self.max_requests is not None and self.totals.calls >= self.max_requests:
            return f"--max-requests {self.max_requests} is reached ({self.totals.calls} calls in all runs)"
        if self.max_cost is not None:
            worst = (self.totals.unanswered + 1) * self.worst(request)
            if self.spent() + worst > self.max_cost:
                return f"--max-cost {self.max_cost:g} could be passed by the next call ({self.spent():.4f} spent)"
        return ""
