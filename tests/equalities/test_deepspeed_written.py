"""What DeepSpeed itself writes is read as what it holds: its fp32 weights and AdamW's state of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from dianjing.formats.source import open_foreign
from tests.equalities.test_ranks import finish, start_ranks

NEVER_RUN = 'raise SystemExit("a file of the checkpoint was run")\n'
WRITE = """
import json, os, sys
import deepspeed, torch
from torch import nn

rank, world, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]
deepspeed.init_distributed(dist_backend="gloo")
for stage, dtype in json.loads(sys.argv[2]):
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "llm": nn.ModuleDict({"model": nn.ModuleDict({"norm": nn.LayerNorm(7, bias=False), "q": nn.Linear(7, 5)})}),
        "projector": nn.ModuleDict({"model": nn.Sequential(nn.Linear(7, 3), nn.GELU(), nn.Linear(3, 7))}),
    })
    def run(self, x):
        return self["llm"]["model"]["q"](self["llm"]["model"]["norm"](self["projector"]["model"](x))).square().mean()
    Model = type("Model", (nn.ModuleDict,), {"forward": run})
    model.__class__ = Model
    model["llm"]["model"]["q"].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, dtype: {"enabled": True},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        x = torch.randn(2, 7, generator=generator).to(torch.bfloat16)
        loss = engine(x)
        engine.backward(loss)
        engine.step()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    expected = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            expected[name] = {
                "weight": safe_get_full_fp32_param(p).clone(),
                **{kind: safe_get_full_optimizer_state(p, kind).clone() for kind in ("exp_avg", "exp_avg_sq")},
            }
    tag = f"zero{stage}"
    client = {"meta": {"iter": 4, "cfg": "x = 1", "seed": 3}, "message_hub": {}, "param_schedulers": []}
    engine.save_checkpoint(folder, tag=tag, client_state=client, exclude_frozen_parameters=True)
    if rank == 0:
        torch.save(expected, f"{folder}/expected-{tag}.pth")
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_deepspeed_wrote_holds_its_weights_and_its_memory(tmp_path: Path, ranks: int) -> None:
    if not importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed: its own checkpoints go unread")
    stages = '[[1, "bf16"], [2, "bf16"], [3, "bf16"]]'
    processes = start_ranks("-c", WRITE, str(tmp_path), stages, ranks=ranks)
    results = finish(processes)
    assert [code for code, _ in results] == [0] * ranks, results
    for stage in (1, 2, 3):
        folder = tmp_path / f"zero{stage}"
        (folder / "zero_to_fp32.py").write_text(NEVER_RUN)
        found = open_foreign(folder)
        expected = torch.load(tmp_path / f"expected-zero{stage}.pth")
        assert found.weights.keys() == expected.keys()
        for name, held in expected.items():
            assert torch.equal(found.weights[name], held["weight"]), (stage, name)
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(found.moments[name][kind], held[kind]), (stage, name, kind)
            assert found.moments[name]["step"] == 4
        assert (found.ranks, found.iteration, found.seed, found.config) == (ranks, 4, 3, "x = 1")
    # `latest`, which DeepSpeed writes beside its folders, names the newest.
    name = "projector.model.0.weight"
    assert torch.equal(open_foreign(tmp_path).weights[name], expected[name]["weight"])
