"""GPU memory: planned activation checkpointing, and the retry of a step that runs out of memory.

Such a step is repeated from its first pack: gradients are dropped, the same seed is set, and the passes take less
memory than before. Its loss is a mean over all its tokens, so its gradient stays the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import Recipe
from dianjing.data.collate import Batch
from dianjing.data.dataset import Dataset
from dianjing.data.pack import pack
from dianjing.errors import TrainError
from dianjing.model.stage import checkpoint_activations
from dianjing.plan.lengths import lengths_of
from dianjing.plan.memory import CONTEXT_BYTES, memory
from dianjing.plan.weights import weights_of

ADVICE = (
    'hold the LLM in four bits (language_model.quantization = "nf4"), lower language_model.lora_rank or '
    "data.max_tokens, or take more GPUs (--gpus N --engine fsdp2); `dianjing plan` says what each of them saves"
)


def plan_checkpointing(
    model: LlavaForConditionalGeneration, recipe: Recipe, dataset: Dataset, accelerator: Accelerator, *, compiled: bool
) -> tuple[bool, str]:
    """Return whether activations are checkpointed, and one line that says why, "" on a CPU.

    If the recipe leaves it open, it is decided and switched on here, the same on all ranks.
    """
    said, on_gpu = recipe.train.gradient_checkpointing, accelerator.device.type == "cuda"
    if said != "auto" or not on_gpu:
        return said == "on", f"activation checkpointing: {said}, as the recipe says" if on_gpu else ""
    weights, lengths = weights_of(model), lengths_of(dataset)
    plain, saving = (
        memory(weights, recipe, lengths, checkpointing=on, compiled=compiled, gpus=accelerator.num_processes).total
        - CONTEXT_BYTES  # taken by now
        for on in (False, True)
    )
    free = _free_bytes(accelerator)
    if plain <= free:
        return False, f"activation checkpointing: off, {_gib(plain)} of {_gib(free)} GiB needed (predicted)"
    checkpoint_activations(model)
    line = (
        f"activation checkpointing: on, {_gib(saving)} of {_gib(free)} GiB needed (predicted), {_gib(plain)} without it"
    )
    return True, line if saving <= free else f"{line}. It may not fit: {ADVICE}"


def _free_bytes(accelerator: Accelerator) -> int:
    """Return what tensors may take, those that are there already included; of the rank with least."""
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    own = torch.tensor([free + torch.cuda.memory_reserved(accelerator.device)], device=accelerator.device)
    return int(torch.as_tensor(accelerator.gather(own)).min())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


class WithinMemory:
    """Runs the packs of a step; after running out of memory, in smaller passes."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        recipe: Recipe,
        accelerator: Accelerator,
        *,
        checkpointing: bool,
        warn: Callable[[str], None],
    ) -> None:
        self._model = model
        self._accelerator = accelerator
        self._repeats = accelerator.num_processes == 1 and recipe.train.engine == "ddp"
        self._checkpointing = checkpointing
        self._warn = warn
        self._most_tokens: int | None = None
        """Largest pack from now on; None: as they come."""
        self.notes: list[str] = []
        """Changes made in this step, for its line in the log."""

    def run(
        self, step: int, batches: Sequence[Batch], attempt: Callable[[Sequence[Batch]], Tensor]
    ) -> tuple[Sequence[Batch], Tensor]:
        """Return what `attempt` returns for the packs of a step, and the packs it was given in the end.

        `attempt` must set its own seed, and leave nothing behind but gradients.

        Raises:
            TrainError: memory is not enough for one record at a time.
        """
        self.notes = []
        packs = self._split(batches)
        while True:
            try:
                return packs, attempt(packs)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0].partition("\n")[0]
            # Only here are the frames of the failed pass gone, and with them what they held.
            self._relieve(step, packs, reason)
            packs = self._split(packs)

    def _relieve(self, step: int, packs: Sequence[Batch], reason: str) -> None:
        """Make the next attempt take less memory.

        Raises:
            TrainError: nothing is left to try.
        """
        if not self._repeats:  # a pass that ended in the middle leaves the ranks waiting for one another
            raise TrainError(
                f"step {step}: out of GPU memory ({reason}), and ranks that share their work cannot take a step again. "
                'Earlier checkpoints are intact: set train.gradient_checkpointing = "on" or a smaller data.pack_tokens '
                f"and go on with --resume; or {ADVICE}"
            )
        self._model.zero_grad(set_to_none=True)
        gc.collect()
        if self._accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = max(batch.num_tokens for batch in packs)
        if not self._checkpointing:
            checkpoint_activations(self._model)
            self._checkpointing, change = True, "activation checkpointing is on from here"
        elif any(len(batch.ids) > 1 for batch in packs):
            shared = max(batch.num_tokens for batch in packs if len(batch.ids) > 1)
            self._most_tokens = shared // 2
            change = f"packs have at most {self._most_tokens:,} positions from here"
        else:
            raise TrainError(
                f"step {step}: out of GPU memory ({reason}), with activation checkpointing and one record a pass "
                f"(the longest has {largest:,} positions). Earlier checkpoints are intact, --resume goes on from them: "
                f"{ADVICE}"
            )
        note = f"step {step} ran out of GPU memory ({reason}) and is taken again, nothing is lost: {change}"
        self.notes.append(note)
        self._warn(note)

    def _split(self, batches: Sequence[Batch]) -> list[Batch]:
        if self._most_tokens is None:
            return [*batches]
        return [part for batch in batches for part in split(batch, self._most_tokens)]


def split(batch: Batch, most_tokens: int) -> list[Batch]:
    """Return packs of the same records with at most `most_tokens` positions; a longer record has its own pack."""
    if batch.num_tokens <= most_tokens or len(batch.ids) < 2:
        return [batch]
    bounds = pairwise(batch.cu_seqlens.tolist())
    members = pack([min(end - start, most_tokens) for start, end in bounds], most_tokens)
    return [batch.select(group) for group in members]


@contextmanager
def out_of_memory_explained() -> Generator[None]:
    """Turn running out of memory outside a step into an error that says what to do.

    Raises:
        TrainError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0].partition("\n")[0]
        raise TrainError(f"out of GPU memory ({reason}). Earlier checkpoints are intact: {ADVICE}") from None
