"""Engines: are weights, gradients and optimizer state whole on each rank, or sharded?

    ddp               each rank holds everything; gradients are summed in a step's last backward pass
    fsdp2             all is sharded; a layer's weights are gathered while it computes        (torch)
    deepspeed_zero2   gradients and the optimizer state are sharded                           (DeepSpeed)

If weights are sharded, the ranks communicate in each forward and backward pass: all ranks must make the same number of
passes, and each pass must use all weights, with pictures or without.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import SHARDS_WEIGHTS, Recipe
from dianjing.data.collate import Batch
from dianjing.errors import ConfigError
from dianjing.extras import install
from dianjing.model.towers.families import layers_of
from dianjing.train.engine import Engine, PendingOutcome, StepOutcome, count_change
from dianjing.train.optim import load_optimizer_state, make_optimizer, require_state_of, steps_of


class ShardedEngine(Engine):
    """Base of the engines whose backward passes communicate."""

    def num_packs(self, own: int) -> int:
        """Return the largest number of packs that any rank has."""
        most = torch.tensor([max(own, 1)], device=self._accelerator.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most.item())

    def weights(self) -> Mapping[str, Tensor]:
        """Gather what trains, one parameter at a time."""
        return self._on_main((name, self._whole(weight, "")) for name, weight in self._trained().items())

    def optimizer_state(self) -> Mapping[str, Tensor]:
        """Gather the optimizer state, one parameter at a time."""
        return self._on_main(
            (f"{name}/{kind}", self._whole(weight, kind))
            for name, weight in self._trained().items()
            for kind in ("step", "exp_avg", "exp_avg_sq")
        )

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self._model.named_parameters() if weight.requires_grad}

    def _on_main(self, gathered: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Keep gathered tensors in CPU memory on the main rank; the other ranks only take part."""
        kept = {}
        for name, value in gathered:
            if self._accelerator.is_main_process:
                kept[name] = value.detach().cpu()
        return kept

    def _whole(self, weight: nn.Parameter, kind: str) -> Tensor:
        """Return a weight, or with `kind` the optimizer state of it."""
        raise NotImplementedError


class Fsdp2(ShardedEngine):
    """torch's fully_shard: each layer of tower and LLM is gathered by itself, all else with the whole."""

    def _distribute(self, recipe: Recipe, losses: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(self._accelerator.device.type, (dist.get_world_size(),))
        for module in (*layers(self._model), losses):
            fully_shard(module, mesh=mesh)
        assert isinstance(losses, FSDPModule)
        for module in losses.modules():
            if isinstance(module, FSDPModule):  # shares are parts of a mean already: their sum is wanted
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._losses = losses
        self.optimizer = make_optimizer(self._model, recipe)

    def backward(self, batch: Batch, tokens: int, *, last: bool) -> Tensor:
        """Add the gradient of a pack's share, to the shards of it that the ranks hold."""
        share = self._losses(batch) / tokens
        share.backward()
        return share.detach()

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss of a batch; what was gathered for it is given up, since no backward pass follows."""
        loss = super().loss(batch)
        for module in self._losses.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return loss

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back this rank's shards of what `optimizer_state` returned."""
        from torch.distributed.tensor import distribute_tensor

        def shard(value: Tensor, weight: Any) -> Tensor:
            value = value.to(weight.device)
            if value.shape != weight.shape:  # the count of steps
                return value
            return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)

        load_optimizer_state(self.optimizer, state, shard)

    def _norm(self, weights: Iterable[nn.Parameter]) -> Tensor:
        return _full(super()._norm(weights))

    def _whole(self, weight: nn.Parameter, kind: str) -> Tensor:
        return _full(self.optimizer.state[weight][kind] if kind else weight)


class Zero2(ShardedEngine):
    """DeepSpeed's ZeRO, stage 2."""

    def _distribute(self, recipe: Recipe, losses: nn.Module) -> None:
        os.environ.setdefault("DS_ACCELERATOR", self._accelerator.device.type)
        os.environ.setdefault("LOCAL_RANK", "0")  # it insists; a process that no launcher started has none
        deepspeed: Any = importlib.import_module("deepspeed")  # slow to import, and an extra

        # On a CPU it would compile its own collectives when first used; gloo's do.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It calls collectives by names that torch 2.13 calls old, in each step.
        warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.optimizer = make_optimizer(self._model, recipe)
        # No section names a dtype: weights stay as the recipe has them, those that train in fp32.
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 2},
        }
        self._losses, *_ = deepspeed.initialize(
            model=losses, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self._fragments = deepspeed.utils

    def backward(self, batch: Batch, tokens: int, *, last: bool) -> Tensor:
        """Add the gradient of a pack's share, to the partitions of it that the ranks hold."""
        share = self._losses(batch) / tokens
        self._losses.set_gradient_accumulation_boundary(last)
        self._losses.backward(share * self._accelerator.num_processes, scale_wrt_gas=False)
        return share.detach()

    def step(self, loss: Tensor, probe: nn.Module | None = None) -> StepOutcome:
        """Let DeepSpeed clip and step; it does not step if the norm is not finite.

        Only the smallest weight of `probe` is looked at, since its gradient has to be gathered.
        """
        found = torch.ones(())
        if probe is not None:
            smallest = min(probe.parameters(), key=lambda weight: weight.numel())
            found = self._fragments.safe_get_full_grad(smallest).count_nonzero()
        outcome = PendingOutcome(loss, torch.full((), math.nan), found).wait()
        if math.isfinite(outcome.loss):
            self._losses.step()
            count_change(self._model)
            overflow = self._losses.optimizer.overflow
            outcome = outcome._replace(norm=math.inf if overflow else float(self._losses.get_global_grad_norm()))
        return outcome

    def optimizer_state(self) -> Mapping[str, Tensor]:
        """Gather the optimizer state, one parameter at a time."""
        self._link()
        return super().optimizer_state()

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back this rank's partitions of what `optimizer_state` returned."""
        trained = self._trained()
        require_state_of(trained, state)
        steps = steps_of(state)
        for flat in self._flat_weights():
            self.optimizer.state[flat] = {
                "step": torch.tensor(steps, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._link()
        for name, weight in trained.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                value = state[f"{name}/{kind}"].to(weight.device)
                self._fragments.safe_set_full_optimizer_state(weight, value, kind)

    def _link(self) -> None:
        """Let DeepSpeed find the state of each weight: its 0.19 does so only when the first group has any."""
        self._losses.optimizer._hp_optimizer_states_linked = False
        self._losses.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_weights(self) -> list[Tensor]:
        """Return the fp32 partitions that the optimizer sees in place of the weights."""
        return self._losses.optimizer.single_partition_of_fp32_groups

    def _whole(self, weight: nn.Parameter, kind: str) -> Tensor:
        if kind == "step":
            return self.optimizer.state[self._flat_weights()[0]]["step"].clone()
        if kind:
            return self._fragments.safe_get_full_optimizer_state(weight, kind)
        return self._fragments.safe_get_full_fp32_param(weight)


ENGINES: dict[str, type[Engine]] = {"ddp": Engine, "fsdp2": Fsdp2, "deepspeed_zero2": Zero2}


def require_engine(recipe: Recipe) -> None:
    """Refuse what an engine cannot do, before anything is loaded.

    Raises:
        ConfigError: DeepSpeed is not there, or the recipe asks for what needs whole weights on one rank.
    """
    engine = recipe.train.engine
    if engine.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"train.engine is {engine}, but DeepSpeed is not installed: {install('deepspeed')}; or use fsdp2"
        )
    if engine not in SHARDS_WEIGHTS:
        return
    if recipe.train.sample_every:
        raise ConfigError(
            f"train.sample_every: {engine} leaves no rank with a whole model that could answer; set it to 0, or use "
            "ddp or deepspeed_zero2"
        )
    if recipe.language_model.quantization:
        raise ConfigError(
            f"language_model.quantization: quantized weights cannot be sharded by {engine}; use ddp or "
            'deepspeed_zero2, or leave it ""'
        )


def start_engine(recipe: Recipe, accelerator: Accelerator, model: LlavaForConditionalGeneration) -> Engine:
    """Return the recipe's engine, the model and what it has learned divided among the ranks."""
    engine = ENGINES[recipe.train.engine]
    if issubclass(engine, ShardedEngine) and not dist.is_initialized():
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] (torch documents it)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return engine(recipe, accelerator, model)


def layers(model: LlavaForConditionalGeneration) -> Iterator[nn.Module]:
    """Yield the layers of tower and LLM, nearly all of a model's weights."""
    tower: Any = model.model.vision_tower
    decoder: Any = model.model.language_model
    yield from layers_of(tower)
    yield from decoder.layers


def _full(value: Any) -> Tensor:
    """Return a tensor whose shards lie on several ranks; another tensor as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
