"""Which answer stands in which slot: prompts wait until one is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedModel

from dianjing.infer.slots import Choose, Pack, Slots

PACK_POSITIONS = 16384
"""Most positions of the prompts that are read together, unless one is longer."""
REFILL = 8
"""Prompts are read when an eighth of the slots is free: few at a time would leave a GPU idle."""

Written = tuple[int, int | None]
"""(prompt, token) when a token is chosen, (prompt, None) when the answer is complete."""


class Writing:
    """Answers to prompts of known lengths; `pack` reads some of them by number."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        pack: Callable[[Sequence[int]], Pack],
        lengths: Sequence[int],
        max_new_tokens: int,
        choose: Choose,
        stops: Sequence[tuple[int, ...]],
        at_once: int,
    ) -> None:
        self._slots = Slots(model, at_once, max(lengths) + max_new_tokens)
        self._pack, self._choose = pack, choose
        self._lengths, self._limit, self._stops = lengths, max_new_tokens, stops
        self._waiting = list(range(len(lengths)))
        self._at_once = at_once
        self._answers: list[_Answer] = []
        """By slot; a complete one leaves its slot free."""

    def run(self, steps: int) -> Iterator[Written]:
        """Write all answers; tokens are read back from the device after every `steps` of them."""
        while True:
            live = sum(answer.left > 0 for answer in self._answers)
            if self._waiting and self._at_once - live >= max(1, self._at_once // REFILL):
                yield from self._fill()
            elif live:
                self._close_up(live)
                yield from self._step(steps)
            else:
                return

    def _fill(self) -> Iterator[Written]:
        """Read waiting prompts into free slots, as many as a pack takes."""
        free = [slot for slot, answer in enumerate(self._answers) if not answer.left]
        free += range(len(self._answers), self._at_once)
        count = positions = 0
        while count < min(len(free), len(self._waiting)):
            positions += self._lengths[self._waiting[count]]
            if count and positions > PACK_POSITIONS:
                break
            count += 1
        prompts, self._waiting = self._waiting[:count], self._waiting[count:]
        tokens = self._slots.fill(free[:count], self._pack(prompts), self._choose)
        for slot, prompt, token in zip(free, prompts, tokens, strict=False):
            answer = _Answer(prompt, self._lengths[prompt], self._limit)
            self._answers[slot : slot + 1] = [answer]
            yield from answer.take([token], self._stops)

    def _close_up(self, live: int) -> None:
        """Move answers from the last slots to free ones, where that saves work."""
        if self._slots.rows_of(live) == self._slots.rows_of(len(self._answers)):
            return
        free = [slot for slot, answer in enumerate(self._answers[:live]) if not answer.left]
        from_ = [slot for slot, answer in enumerate(self._answers) if answer.left and slot >= live]
        if free:
            self._slots.move(from_, free)
        for source, target in zip(from_, free, strict=True):
            self._answers[target] = self._answers[source]
        del self._answers[live:]

    def _step(self, steps: int) -> Iterator[Written]:
        live = [answer for answer in self._answers if answer.left]
        rows = self._slots.rows_of(len(self._answers))
        longest = max(answer.cached for answer in live)
        tokens = self._slots.steps(rows, longest, min(steps, max(answer.left for answer in live)), self._choose)
        for slot, answer in enumerate(self._answers):
            answer.cached += len(tokens)
            yield from answer.take([row[slot] for row in tokens], self._stops)


class _Answer:
    """An answer under way."""

    def __init__(self, prompt: int, length: int, limit: int) -> None:
        self.left = limit
        """Tokens it may still get; 0 when it is complete."""
        self.cached = length
        """Positions in the cache before the next step."""
        self._prompt = prompt
        self._tail: tuple[int, ...] = ()

    def take(self, tokens: Sequence[int], stops: Sequence[tuple[int, ...]]) -> Iterator[Written]:
        """Yield those that belong to it; what was written behind its end is left out."""
        for token in tokens:
            if not self.left:
                return
            yield self._prompt, token
            self._tail = (*self._tail, token)[-max(map(len, stops), default=1) :]
            ended = any(self._tail[-len(stop) :] == stop for stop in stops)
            self.left = 0 if ended else self.left - 1
            if not self.left:
                yield self._prompt, None
