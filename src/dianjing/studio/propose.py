"""The shown picture -> a proposed conversation: `dianjing make`'s own asking, journal and rules, for one picture."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dianjing.errors import DataError
from dianjing.make.build import Made, build
from dianjing.make.cost import Budget
from dianjing.make.journal import Journal
from dianjing.make.pictures import Pictures, look_at
from dianjing.make.prompts import choose_prompts
from dianjing.make.requests import Parameters, plan
from dianjing.make.run import AskOutcome, Job, ask
from dianjing.studio.records import Message

PAIRS = 5


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A conversation that nobody has accepted yet."""

    conversations: list[Message]
    model: str
    calls: int
    """0: the journal had the answer, and nobody was asked."""
    dropped: dict[str, int]
    """Reason -> how many turns were left out for it."""


class Proposer:
    """Asks an endpoint about single pictures; one call at a time."""

    def __init__(
        self,
        *,
        root: str,
        journal: Path,
        base_url: str,
        model: str,
        max_tokens: int,
        timeout_seconds: float,
        white: int = 0,
    ) -> None:
        self._root, self._journal, self._base_url = root, journal, base_url
        self._parameters = Parameters(model=model, max_tokens=max_tokens, white=white)
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()

    def propose(self, name: str, prompt: str) -> Proposal:
        """Return what the endpoint says about the picture `name`, asked with a shipped prompt.

        Raises:
            DataError: the picture cannot be opened, or no answer is usable.
        """
        picture = look_at(self._root, name, self._parameters.white)
        if isinstance(picture, str):
            raise DataError(picture)
        language: Literal["en", "zh"] = "zh" if prompt.endswith("_zh") else "en"
        prompts = choose_prompts([prompt], language, PAIRS)
        requests = plan([picture], prompts, self._parameters)
        job = Job(
            pictures=Pictures(root=self._root, kept=(picture,), refused={}, duplicates={}, other_files=Counter()),
            prompts=prompts,
            requests=requests,
            parameters=self._parameters,
            blind_check=False,
            held_out=0.0,
            seed=0,
            out=self._journal,
        )
        with self._lock, Journal(self._journal) as journal:
            before = journal.totals.calls
            budget = Budget(parameters=self._parameters, totals=journal.totals)
            asked = ask(job, journal, budget, self._base_url, self._timeout_seconds, 1, lambda work, line: None)
            made = build(requests, prompts, journal, self._parameters, problems=asked.problems)
            calls = journal.totals.calls - before
        if not made.records:
            raise DataError(_why_nothing(made, asked))
        return Proposal(
            conversations=made.records[0]["conversations"],
            model=self._parameters.model,
            calls=calls,
            dropped=made.drops,
        )


def _why_nothing(made: Made, asked: AskOutcome) -> str:
    if asked.stopped:
        return asked.stopped
    if made.failed:
        return made.failed[0].reason
    if made.dropped:
        one = made.dropped[0]
        return f"nothing usable in the reply ({one.reason}: {one.answer or one.question})"
    return "there is no answer; try again"
