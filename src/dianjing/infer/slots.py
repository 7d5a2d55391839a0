"""Answers written side by side, each in a slot of its own: the keys and values of all tokens, and one more token each.

A slot has room for a prompt and its answer. Prompts are read as one pack, without padding; then each step adds a token
to every slot. A slot whose answer is complete takes the next prompt. On a GPU steps are captured as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from dianjing.infer.answering import answering
from dianjing.layers.attention import UNREAD_MASK
from dianjing.layers.cuda_graphs import capture
from dianjing.layers.fused.decoder import CachedTokens
from dianjing.model.forward import FUSED, fused_states, language_parts

REACH = 64
"""The cached positions that a step reads are a multiple of this."""
GRAPH_REACH = 128
"""The same for CUDA graphs: one is captured for each such number."""

Choose = Callable[[Float[Tensor, "rows vocab"]], Int[Tensor, " rows"]]
"""Logits -> the tokens chosen."""


class Pack(NamedTuple):
    """Prompts one behind the other, as the decoder reads them."""

    embeddings: Float[Tensor, "tokens hidden"]
    lengths: Sequence[int]

    @property
    def arguments(self) -> dict[str, Any]:
        """Return what a decoder is called with."""
        device = self.embeddings.device
        positions = torch.cat([torch.arange(length, device=device) for length in self.lengths])
        return {
            "inputs_embeds": self.embeddings[None],
            "position_ids": positions[None],
            "attention_mask": UNREAD_MASK,
            "cu_seqlens": torch.tensor([0, *self.lengths], device=device).cumsum(0).to(torch.int32),
            "max_seqlen": max(self.lengths),
        }


class Slots:
    """The answers under way, `count` at most, each of at most `room` positions with its prompt."""

    def __init__(self, model: PreTrainedModel, count: int, room: int) -> None:
        self._model = model
        self._decoder, self._head = language_parts(model)
        self._room = -(-room // REACH) * REACH
        with answering(model):
            self._ids = torch.zeros(count, dtype=torch.long, device=model.device)
            self._positions = torch.zeros_like(self._ids)
            self._cache = _SlotCache(count, self._room, model)
        self._graphs = _Graphs(self._logits) if model.device.type == "cuda" and not _rope_grows(model) else None

    def rows_of(self, live: int) -> int:
        """Return how many slots a step computes so that `live` ones are among them."""
        count = len(self._ids)
        return min(1 << (live - 1).bit_length(), count) if self._graphs and live else live

    def fill(self, slots: Sequence[int], pack: Pack, choose: Choose) -> list[int]:
        """Read prompts into slots; return the first token of each answer."""
        device = self._ids.device
        taken, lengths = (torch.tensor(values, device=device) for values in (slots, pack.lengths))
        with answering(self._model):
            arguments = pack.arguments
            self._cache.write_to(taken.repeat_interleave(lengths), arguments["position_ids"][0])
            last = lengths.cumsum(0) - 1
            if hasattr(self._decoder, FUSED):
                spans = arguments["cu_seqlens"], arguments["max_seqlen"], None
                cached = CachedTokens(self._cache, len(pack.embeddings), None)
                hidden = fused_states(
                    self._decoder, pack.embeddings, arguments["position_ids"][0], last, spans, cached
                )[: len(last)]
            else:
                hidden = self._decoder(**arguments, past_key_values=self._cache, use_cache=True).last_hidden_state
                hidden = hidden[0, last]
            chosen = choose(self._head(hidden).float())
            self._ids[taken], self._positions[taken] = chosen, lengths
        return chosen.tolist()

    def steps(self, rows: int, longest: int, count: int, choose: Choose) -> list[list[int]]:
        """Return the next `count` tokens of the first `rows` slots, a list a step.

        `longest` is the most positions that an answer under way takes, prompt included, before them.
        """
        written = []
        with answering(self._model):
            for _ in range(count):
                longest += 1
                chosen = choose(self._next(rows, longest))
                self._ids[:rows] = chosen
                # A slot whose answer is complete may be stepped on until it is filled again; its last place is reused.
                self._positions[:rows] = (self._positions[:rows] + 1).clamp(max=self._room - 1)
                written.append(chosen)
            return torch.stack(written).tolist()

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move answers under way to other slots."""
        with answering(self._model):
            one, other = (torch.tensor(slots, device=self._ids.device) for slots in (sources, targets))
            self._ids[other], self._positions[other] = self._ids[one], self._positions[one]
            self._cache.move(one, other)

    def _next(self, rows: int, longest: int) -> Tensor:
        unit = GRAPH_REACH if self._graphs else REACH
        reach = min(-(-longest // unit) * unit, self._room)
        return self._graphs(rows, reach) if self._graphs else self._logits(rows, reach)

    def _logits(self, rows: int, reach: int) -> Float[Tensor, "rows vocab"]:
        positions = self._positions[:rows]
        self._cache.write_to(torch.arange(rows, device=positions.device), positions, reach)
        embeddings = self._model.get_input_embeddings()(self._ids[:rows])
        if hasattr(self._decoder, FUSED):
            cached = CachedTokens(self._cache, rows, positions)
            every = torch.arange(rows, device=positions.device)
            spans = torch.arange(rows + 1, dtype=torch.int32, device=positions.device), 1, None
            hidden = fused_states(self._decoder, embeddings, positions, every, spans, cached)[:rows]
        else:
            hidden = self._decoder(
                inputs_embeds=embeddings[:, None],
                position_ids=positions[:, None],
                attention_mask=UNREAD_MASK,
                past_key_values=self._cache,
                use_cache=True,
                query_positions=positions,
                max_seqlen=reach,
            ).last_hidden_state[:, 0]
        return self._head(hidden).float()


class _SlotCache(Cache):
    """Keys and values, (slots, kv_heads, room, size) a layer, written where `write_to` says."""

    def __init__(self, count: int, room: int, model: PreTrainedModel) -> None:
        super().__init__(layers=[])
        self._count, self._room = count, room
        self._dtype: Any = model.config.dtype
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._slots = self._places = torch.zeros(0)
        self._reach: int | None = None

    def write_to(self, slots: Int[Tensor, " tokens"], places: Int[Tensor, " tokens"], reach: int | None = None) -> None:
        """Set where the next forward pass writes its tokens, and how many places of these slots it reads.

        None = it reads its own tokens alone: prompts.
        """
        self._slots, self._places, self._reach = slots, places, reach

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; return those that it reads."""
        states = key_states, value_states
        if layer_idx not in self._kept:
            keys, values = (
                part.new_zeros(self._count, part.shape[1], self._room, part.shape[-1], dtype=self._dtype)
                for part in states
            )
            self._kept[layer_idx] = keys, values
        kept = self._kept[layer_idx]
        for part, new in zip(kept, states, strict=True):
            part[self._slots, :, self._places] = new.transpose(1, 2).flatten(0, 1).to(part.dtype)
        if self._reach is None:
            return states
        rows = len(self._slots)
        return kept[0][:rows, :, : self._reach], kept[1][:rows, :, : self._reach]

    def move(self, sources: Int[Tensor, " moved"], targets: Int[Tensor, " moved"]) -> None:
        """Copy slots to others."""
        for keys, values in self._kept.values():
            keys[targets], values[targets] = keys[sources], values[sources]


class _Graphs:
    """Steps as CUDA graphs, one for each number of rows and reach; the first of a kind runs without one."""

    def __init__(self, run: Callable[[int, int], Tensor]) -> None:
        self._run = run
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, rows: int, reach: int) -> Tensor:
        key = rows, reach
        if key not in self._graphs:
            self._graphs[key] = None
            return self._run(rows, reach)
        if self._graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            with capture(graph, self._pool, self._stream):
                logits = self._run(rows, reach)
            self._graphs[key] = graph, logits
        captured = self._graphs[key]
        assert captured is not None
        captured[0].replay()
        return captured[1]


def _rope_grows(model: PreTrainedModel) -> bool:
    """Return whether rotary embeddings depend on the longest position, which is then read back at each step."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return any(
        one.get("rope_type") in ("dynamic", "longrope") for one in (rope, *rope.values()) if isinstance(one, dict)
    )
