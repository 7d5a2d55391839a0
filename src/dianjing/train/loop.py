"""The training loop, from a recipe to a finished run."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from safetensors.torch import load_file

from dianjing.config.load import save_recipe
from dianjing.config.schema import Recipe
from dianjing.config.steps import few_steps
from dianjing.data.collate import Batch
from dianjing.data.dataset import open_dataset, step_batches
from dianjing.data.order import run_indices
from dianjing.data.workers import lost_workers_explained
from dianjing.errors import ConfigError
from dianjing.language import say
from dianjing.model.build import build
from dianjing.model.compile import speed_up
from dianjing.model.folders import base_folders
from dianjing.model.stage import PARTS, apply_stage, learning_rate
from dianjing.model.weights import load_start, load_trainable_state
from dianjing.progress import watched
from dianjing.run.checkpoint import newest, require_space, save, state_to_resume
from dianjing.run.fingerprints import PROJECTOR_START, fingerprints, weights_fingerprint
from dianjing.run.journal import read_journal
from dianjing.run.layout import OPTIMIZER, RECIPE, TRAINABLE, checkpoints
from dianjing.run.lock import locked
from dianjing.run.state import TrainState, state_at
from dianjing.train.interrupt import Interrupt, Stopped
from dianjing.train.log import Log
from dianjing.train.memory import WithinMemory, out_of_memory_explained, plan_checkpointing
from dianjing.train.places import require_new
from dianjing.train.precision import settle_precision
from dianjing.train.probe import Probes, probes_of, verdict
from dianjing.train.ranks import SILENCE_MINUTES, one_error
from dianjing.train.samples import Samples
from dianjing.train.shards import require_engine, start_engine
from dianjing.train.silent_failures import STILL_STEPS, SilentFailures, WeightWatch
from dianjing.train.start_checks import require_learning, require_pictures, require_same_eyes
from dianjing.train.step import Parts, over_ranks, take_step
from dianjing.train.strategy import Strategy, strategy_of

BYTES_PER_PARAMETER = 12
"""In a checkpoint: the weight and AdamW's two moments, in fp32."""


def train(recipe: Recipe, *, resume: bool = False, quiet: bool = False, allow_changed: Sequence[str] = ()) -> Path:
    """Train as the recipe says and return the run's folder; `resume` goes on from its newest whole checkpoint.

    `allow_changed` names inputs that may differ from those of the checkpoint, or of the projector's own run.

    Raises:
        DianjingError: the recipe, a model, the data or the folder cannot be used, or training failed.
        Stopped: SIGINT, SIGTERM or SIGHUP came; the checkpoint is written.
    """
    require_engine(recipe)
    # A warning about the thread of the backward pass, which then sets the context up itself.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    accelerator = _start_accelerator(recipe)
    main = accelerator.is_main_process
    run = Path(recipe.output).expanduser()
    log = Log(run, quiet=quiet or not main, write=main)
    with (
        one_error(),
        out_of_memory_explained(),
        lost_workers_explained(),
        locked(run, log.warn) if main else nullcontext(),
    ):
        _train(recipe, accelerator, log, run, resume=resume, allowed=allow_changed)
    return run


def _train(
    recipe: Recipe, accelerator: Accelerator, log: Log, run: Path, *, resume: bool, allowed: Sequence[str]
) -> None:
    checkpoint = newest(run, log.warn) if resume else require_new(run)
    recipe, precision = settle_precision(recipe, accelerator, checkpoint)
    strategy = strategy_of(recipe, accelerator)

    with log.busy(say("loading the models")):
        built = build(recipe, accelerator.device, fresh_projector=resume, move=strategy.whole)
    log.show("\n".join([str(built.report), *([precision] if precision else [])]))
    if recipe.stage == "finetune" and not recipe.projector.init_from and not resume:
        log.warn(say("the projector starts untrained; projector.init_from takes one from a pretrain run"))
    stage = apply_stage(built.model, recipe)
    if not resume:
        load_start(built.model, recipe)
    log.show(stage)
    if strategy.compiled:
        log.show(speed_up(built.model, fuse=strategy.whole, cuda_graphs=strategy.cuda_graphs))
    with watched(log.console) as watch:
        dataset = open_dataset(recipe.data, built.encoder, built.image_processor, watch)
    log.data(dataset)
    if text := few_steps(recipe, dataset.num_records):
        log.warn(text)
    require_pictures(dataset, recipe.stage)
    found = fingerprints(*base_folders(recipe), dataset)
    origin = [] if checkpoint else require_same_eyes(recipe, built.model, found, allowed, log.warn)
    if not checkpoint:
        found[PROJECTOR_START] = weights_fingerprint(built.model.model.multi_modal_projector.state_dict())
    state = state_at(0, recipe, dataset, found, origin)
    require_learning(recipe, stage, state.total_steps, log.warn)
    if checkpoint:
        state = state_to_resume(checkpoint, state, log.warn, allowed)
        load_trainable_state(built.model, load_file(checkpoint / TRAINABLE))
    checkpointing, why = plan_checkpointing(built.model, recipe, dataset, accelerator, compiled=strategy.compiled)
    log.show(*([why] if why else []))
    engine = start_engine(recipe, accelerator, built.model)
    if checkpoint:
        engine.load_optimizer_state(load_file(checkpoint / OPTIMIZER))
        steps = {"step": state.step, "total": state.total_steps}
        log.show(say("resumed from {checkpoint}, step {step} of {total}", checkpoint=checkpoint, **steps))
    samples = Samples(recipe, built, run, state.step, log.warn)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _prepare_folder(run, recipe, stage.trainable)
    parts = Parts(
        recipe=recipe,
        accelerator=accelerator,
        model=built.model.train(),
        engine=engine,
        dataset=dataset,
        silent_failures=SilentFailures(),
        probes=Probes(recipe, dataset, state.total_steps, _measured(run, state.step), log.warn),
        within_memory=WithinMemory(built.model, recipe, accelerator, checkpointing=checkpointing, warn=log.warn),
    )
    _take_all_steps(parts, strategy, state, log, samples, run)
    log.show(*verdict(parts.probes.history))
    log.peak_memory(accelerator.device)
    log.closing(run)


def _take_all_steps(parts: Parts, strategy: Strategy, state: TrainState, log: Log, samples: Samples, run: Path) -> None:
    recipe, accelerator = parts.recipe, parts.accelerator
    with (
        Interrupt(quiet=not accelerator.is_main_process) as interrupt,
        log.steps(state.step, state.total_steps, recipe.train.log_every) as step_log,
    ):
        if accelerator.is_main_process and state.step == 0:
            samples.answer(0)
        if state.step == 0 and parts.probes.due(0):
            step_log.probe(_probe(parts, 0))
        weights = (
            None if state.step else WeightWatch(parts.model, {part: learning_rate(recipe, part) for part in PARTS})
        )
        for step, (batches, data_wait) in enumerate(_batches(parts, strategy, state), start=state.step + 1):
            result = take_step(parts, step, state.total_steps, batches, data_wait)
            if weights and step == min(STILL_STEPS, state.total_steps):
                seen = parts.silent_failures.steps_with_pictures > 0
                weights.require_movement(step, seen, partial(over_ranks, accelerator))
                weights = None
            if parts.probes.due(step):
                step_log.probe(_probe(parts, step))
            enough = bool(recipe.train.stop_when) and _on_any_rank(accelerator, parts.probes.worn_out(step)) != 0
            last = enough or step == state.total_steps
            step_log.step(result, last=last)
            stopped_by = _on_any_rank(accelerator, interrupt.number)
            if last or stopped_by or step % recipe.train.save_every == 0:
                _save(parts, _state_after(parts, step, state), run)
                step_log.curve()
            if accelerator.is_main_process and samples.due(step, last):
                samples.answer(step)
            accelerator.wait_for_everyone()
            if stopped_by and not last:
                raise Stopped(stopped_by, f"stopped after step {step} of {state.total_steps}, with a checkpoint")
            if enough:
                log.show(f"ended after step {step} of {state.total_steps}: {recipe.train.stop_when}")
                return


def _state_after(parts: Parts, step: int, start: TrainState) -> TrainState:
    """Return the state to save after a step."""
    now = state_at(step, parts.recipe, parts.dataset, start.fingerprints, start.allowed_changes)
    return replace(now, held_out_loss=parts.probes.held_out_loss(step))


def _probe(parts: Parts, step: int) -> dict[str, Any]:
    return parts.probes.measure(step, parts.model, parts.engine.loss, parts.accelerator.device)


def _measured(run: Path, step: int) -> list[dict[str, Any]]:
    """Return what the probes of a run have measured up to a step."""
    return [found for found in probes_of(read_journal(run)) if step and found["step"] <= step]


def _save(parts: Parts, state: TrainState, run: Path) -> None:
    trained, optimizer = parts.engine.weights(), parts.engine.optimizer_state()
    if parts.accelerator.is_main_process:
        save(run, trained, optimizer, state, parts.recipe.train.keep)


def _batches(parts: Parts, strategy: Strategy, state: TrainState) -> Iterator[tuple[list[Batch], float]]:
    """Yield this rank's packs of each remaining step, and the seconds spent waiting for them."""
    plan = run_indices(
        parts.dataset.num_records,
        seed=parts.recipe.seed,
        mode=parts.recipe.data.order,
        lengths=parts.dataset.modality_lengths,
        global_batch_size=parts.recipe.train.global_batch_size,
        rank=parts.accelerator.process_index,
        world_size=parts.accelerator.num_processes,
        steps=range(state.step, state.total_steps),
    )
    began = time.perf_counter()
    for batches in step_batches(parts.dataset, plan, strategy.workers, pinned=strategy.pinned):
        yield batches, time.perf_counter() - began
        began = time.perf_counter()


def _start_accelerator(recipe: Recipe) -> Accelerator:
    """Meet the other ranks.

    Raises:
        ConfigError: the launcher's configuration chooses an engine by itself.
    """
    for name, kind in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"the launch asks for {kind}; launch plainly, the recipe chooses: train.engine is {recipe.train.engine}"
            )
    accelerator = Accelerator(
        mixed_precision="no",  # forward_loss chooses the arithmetic itself
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(backend=None, timeout=timedelta(minutes=SILENCE_MINUTES)),
        ],
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(f"the launch asks for {kind.value}; only CUDA GPUs and CPUs are supported")
    return accelerator


def _prepare_folder(run: Path, recipe: Recipe, trainable: int) -> None:
    """Write the recipe to the run's folder, if there is room for the checkpoints to come.

    Raises:
        ConfigError: the folder cannot be written to.
        CheckpointError: there is too little room.
    """
    try:
        to_come = recipe.train.keep + 1 - len(checkpoints(run))
        require_space(run, to_come * trainable * BYTES_PER_PARAMETER)
        save_recipe(recipe, run / RECIPE)
    except OSError as error:
        raise ConfigError(f"{run}: a run cannot be written there: {error.strerror}; choose another output") from None


def _on_any_rank(accelerator: Accelerator, number: int) -> int:
    """Return the signal that this rank got, SIGTERM if only another rank got one, else 0."""
    (heard,) = over_ranks(accelerator, float(number))
    return (number or signal.SIGTERM) if heard else 0
