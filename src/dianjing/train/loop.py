"""The training loop: from a recipe to a run, told from top to bottom."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from safetensors.torch import load_file

from dianjing.config.load import save_recipe
from dianjing.config.schema import SHARDS_WEIGHTS, Recipe
from dianjing.data.collate import Batch
from dianjing.data.dataset import open_dataset, step_batches
from dianjing.data.order import run_indices
from dianjing.errors import ConfigError
from dianjing.model.build import build
from dianjing.model.compile import speed_up
from dianjing.model.stage import apply_stage
from dianjing.model.weights import load_trainable_state
from dianjing.progress import watched
from dianjing.run.checkpoint import OPTIMIZER, TRAINABLE, checkpoints, newest, read_state, require_space, save
from dianjing.run.state import TrainState, require_same_run, state_at
from dianjing.train.interrupt import Interrupt, Stopped
from dianjing.train.log import Log
from dianjing.train.memory import WithinMemory, explained, plan_checkpointing
from dianjing.train.ranks import SILENCE_MINUTES, one_voice
from dianjing.train.samples import Samples
from dianjing.train.shards import require_engine, start_engine
from dianjing.train.step import Parts, over_ranks, take_step
from dianjing.train.watch import Watch, require_pictures

MOST_WORKERS = 16
"""Processes that make packs for one rank, when the recipe leaves it open."""

BYTES_PER_PARAMETER = 12
"""What a checkpoint holds of each: the weight and AdamW's two means, in fp32."""


def train(recipe: Recipe, *, resume: bool = False, quiet: bool = False) -> Path:
    """Train as the recipe says and return the run's folder; `resume` goes on from its newest checkpoint.

    Raises:
        DianjingError: the recipe, a model, the data or the folder cannot be used, or the run went wrong.
        Stopped: SIGINT or SIGTERM came; the checkpoint is written.
    """
    require_engine(recipe)
    # torch says so once, of the thread of the backward pass, which then sets the context up.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    accelerator = _start_accelerator(recipe)
    with one_voice(), explained():
        return _train(recipe, accelerator, resume=resume, quiet=quiet)


def _train(recipe: Recipe, accelerator: Accelerator, *, resume: bool, quiet: bool) -> Path:
    run = Path(recipe.output).expanduser()
    log = Log(run, quiet=quiet or not accelerator.is_main_process, write=accelerator.is_main_process)
    checkpoint = newest(run, log.show) if resume else _require_new(run)

    with log.busy("loading the models"):
        move = recipe.train.engine not in SHARDS_WEIGHTS
        built = build(recipe, accelerator.device, fresh_projector=resume, move=move)
    log.show(str(built.report))
    if recipe.stage == "finetune" and not recipe.projector.init_from and not resume:
        log.warn("the projector starts from nothing; projector.init_from takes it from a pretrain run")
    stage = apply_stage(built.model, recipe)
    log.show(stage)
    if compiled := _compiles(recipe, accelerator):
        # Recorded work has been proved with one process alone.
        alone = accelerator.num_processes == 1 and recipe.train.engine == "ddp"
        log.show(speed_up(built.model, fuse=recipe.train.engine not in SHARDS_WEIGHTS, cuda_graphs=alone))
    with watched(log.console) as watch:
        dataset = open_dataset(recipe.data, built.encoder, built.image_processor, watch)
    log.data(dataset)
    require_pictures(dataset, recipe.stage)

    state = state_at(0, recipe, dataset)
    if checkpoint:
        start, state = state, read_state(checkpoint)
        require_same_run(state, start, checkpoint)
        load_trainable_state(built.model, load_file(checkpoint / TRAINABLE))
    checkpointing, why = plan_checkpointing(built.model, recipe, dataset, accelerator, compiled=compiled)
    log.show(*([why] if why else []))
    engine = start_engine(recipe, accelerator, built.model)
    if checkpoint:
        engine.load_memory(load_file(checkpoint / OPTIMIZER))
        log.show(f"resumed from {checkpoint}, step {state.step} of {state.total_steps}")
    samples = Samples(recipe, built, run, state.step)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _prepare_folder(run, recipe, stage.trainable)

    parts = Parts(
        recipe=recipe,
        accelerator=accelerator,
        model=built.model.train(),
        engine=engine,
        dataset=dataset,
        watch=Watch(),
        within_memory=WithinMemory(built.model, recipe, accelerator, checkpointing=checkpointing, warn=log.warn),
    )
    _take_all_steps(parts, state, log, samples, run)
    log.peak_memory(accelerator.device)
    log.show(f"done: {run} holds the checkpoint, loss.png and train.jsonl; try: dianjing chat {run} --image PICTURE")
    return run


def _take_all_steps(parts: Parts, state: TrainState, log: Log, samples: Samples, run: Path) -> None:
    recipe, accelerator = parts.recipe, parts.accelerator
    with (
        Interrupt(quiet=not accelerator.is_main_process) as interrupt,
        log.steps(state.step, state.total_steps, recipe.train.log_every) as step_log,
    ):
        if accelerator.is_main_process and state.step == 0:
            samples.answer(0)
        for step, (batches, data_wait) in enumerate(_batches(parts, state), start=state.step + 1):
            step_log.step(take_step(parts, step, state.total_steps, batches, data_wait))
            last = step == state.total_steps
            stopped_by = _on_any_rank(accelerator, interrupt.number)
            if last or stopped_by or step % recipe.train.save_every == 0:
                _save(parts, step, run)
                step_log.curve()
            if accelerator.is_main_process and samples.due(step, last):
                samples.answer(step)
            accelerator.wait_for_everyone()
            if stopped_by and not last:
                raise Stopped(stopped_by, f"stopped after step {step} of {state.total_steps}, with a checkpoint")


def _save(parts: Parts, step: int, run: Path) -> None:
    trained, memory = parts.engine.weights(), parts.engine.memory()
    if parts.accelerator.is_main_process:
        save(run, trained, memory, state_at(step, parts.recipe, parts.dataset), parts.recipe.train.keep)


def _batches(parts: Parts, state: TrainState) -> Iterator[tuple[list[Batch], float]]:
    """Yield this rank's packs of each step to come, and the seconds they were waited for."""
    plan = run_indices(
        parts.dataset.num_records,
        seed=parts.recipe.seed,
        mode=parts.recipe.data.order,
        lengths=parts.dataset.modality_lengths,
        global_batch_size=parts.recipe.train.global_batch_size,
        rank=parts.accelerator.process_index,
        world_size=parts.accelerator.num_processes,
        first_step=state.step,
        last_step=state.total_steps,
    )
    began = time.perf_counter()
    pinned = parts.accelerator.device.type == "cuda"
    workers = _workers(parts.recipe, parts.accelerator)
    for batches in step_batches(parts.dataset, plan, workers, pinned=pinned):
        yield batches, time.perf_counter() - began
        began = time.perf_counter()


def _compiles(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Return whether layers are compiled; where ranks share weights, each layer's come and go around its call."""
    if recipe.train.compile == "auto":
        return accelerator.device.type == "cuda" and recipe.train.engine not in SHARDS_WEIGHTS
    return recipe.train.compile == "on"


def _workers(recipe: Recipe, accelerator: Accelerator) -> int:
    """Return how many processes make this rank's packs."""
    if recipe.data.workers >= 0:
        return recipe.data.workers
    if accelerator.device.type != "cuda":
        return 0
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or accelerator.num_processes
    return min(len(os.sched_getaffinity(0)) // ranks_here, MOST_WORKERS)


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


def _require_new(run: Path) -> None:
    """Refuse to write over a run.

    Raises:
        ConfigError: the folder has checkpoints.
    """
    if found := checkpoints(run):
        raise ConfigError(
            f"{run}: it already holds a run, up to {found[-1].name}; give --resume to go on with it, or choose "
            "another output"
        )


def _prepare_folder(run: Path, recipe: Recipe, trainable: int) -> None:
    """Make the run's folder and write the recipe there, if there is room for the checkpoints to come.

    Raises:
        ConfigError: the folder cannot be written to.
        CheckpointError: there is too little room.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        to_come = recipe.train.keep + 1 - len(checkpoints(run))
        require_space(run, to_come * trainable * BYTES_PER_PARAMETER)
        save_recipe(recipe, run / "recipe.toml")
    except OSError as error:
        raise ConfigError(f"{run}: a run cannot be written there: {error.strerror}; choose another output") from None


def _on_any_rank(accelerator: Accelerator, number: int) -> int:
    """Return the signal this rank has had, or SIGTERM when only another has."""
    (heard,) = over_ranks(accelerator, float(number))
    return (number or signal.SIGTERM) if heard else 0
