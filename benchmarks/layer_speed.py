"""Milliseconds of single layers, forwards and backwards: attention, decoder and tower, compiled, fused and replayed.

    python benchmarks/layer_speed.py [--only attention,decoder,tower] [--kinds compiled,fused,replayed]
        [--dropout 0.05] [--profile] [--tiny]

Shapes of InternLM2-Chat-1.8B and CLIP ViT-L/14-336, random weights, bf16, packs of train_speed.py's lengths. Prints the
clock and how long the CPU took to start the work: where the two are equal, the CPU is what is waited for.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from dianjing.layers.attention import PACKED, UNREAD_MASK, packed_attention
from dianjing.layers.cuda_graphs import CudaGraphs
from dianjing.layers.fp8 import Fp8Linear, quantize_layers_to_fp8
from dianjing.layers.fused import tower as fused_tower
from dianjing.layers.fused.decoder import States, fuse_decoder_layers, pack_layout, total
from dianjing.layers.lora import LoraLinear
from dianjing.layers.padded import padded_layout
from dianjing.model.compile import compile_layers

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PROFILED = False
"""Whether the kernels of each measured thing are printed, with their milliseconds."""
DROPOUT = 0.0
"""Of adapters."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="attention,decoder,tower")
    parser.add_argument("--kinds", default="compiled,fused,replayed", help="replayed: a tower on a GPU")
    parser.add_argument("--dropout", type=float, default=0.0, help="of adapters")
    parser.add_argument("--profile", action="store_true", help="print the kernels of each, and their milliseconds")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script itself")
    chosen = parser.parse_args()
    global PROFILED, DROPOUT
    PROFILED, DROPOUT = chosen.profile, chosen.dropout
    for name in chosen.only.split(","):
        if name == "attention":
            attention(tiny=chosen.tiny)
        else:
            {"decoder": decoder, "tower": tower}[name](chosen.kinds.split(","), tiny=chosen.tiny)


def packs(*, tiny: bool) -> dict[str, list[int]]:
    """Return the lengths of a pack of each stage."""
    rng = random.Random(0)
    if tiny:
        return {"stage 1": [60, 61], "stage 2": [80, 70, 33]}
    longer = sorted((638 + rng.randint(0, 354) for _ in range(128)), reverse=True)
    return {"stage 1": [592 + rng.randint(0, 12) for _ in range(26)], "stage 2": longer[40:58]}


def layout(lengths: list[int]) -> dict[str, Any]:
    """Return the layout of a pack as attention takes it, the padded one included."""
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    position_ids = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
    shape = len(lengths), -(-max(lengths) // 64) * 64
    return {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max(lengths),
        "padded": padded_layout(cu_seqlens, position_ids, shape),
        "position_ids": position_ids[None],
    }


def attention(*, tiny: bool) -> None:
    """Compare variable lengths with padded documents."""
    heads, kv_heads, size = (4, 2, 16) if tiny else (16, 8, 128)
    module: Any = nn.Module()
    for stage, lengths in packs(tiny=tiny).items():
        spans = layout(lengths)
        states = [random_states(1, count, sum(lengths), size) for count in (heads, kv_heads, kv_heads)]
        gradient = torch.randn(1, sum(lengths), heads, size, device=DEVICE, dtype=torch.bfloat16)
        for kind in ("variable lengths", "padded"):
            given: Any = {**spans, "padded": spans["padded"] if kind == "padded" else None}

            def step(states: Any = states, gradient: Tensor = gradient, spans: Any = given) -> None:
                output, _ = packed_attention(module, *states, None, scaling=size**-0.5, **spans)
                output.backward(gradient)

            report(f"attention, {stage}, {kind}", step)


def decoder(kinds: list[str], *, tiny: bool) -> None:
    """Time decoder layers: bf16 and FP8, frozen and with adapters."""
    for stage, lengths in packs(tiny=tiny).items():
        spans = layout(lengths)
        for frozen in ("bf16", "fp8") if GPU else ("bf16",):
            for kind in [kind for kind in kinds if kind != "replayed"]:
                torch._dynamo.reset()
                model = decoder_layers(frozen == "fp8", 512 if stage == "stage 2" else 0, tiny=tiny)
                x = random_states(1, sum(lengths), model.config.hidden_size)
                for padded in (spans["padded"], None) if kind == "fused" else (spans["padded"],):
                    given = {**spans, "padded": padded}
                    run = fused_decoder(model, given) if kind == "fused" else compiled_decoder(model, given)

                    def step(run: Any = run, x: Tensor = x) -> None:
                        output = run(x)
                        output.backward(output.detach())

                    how = "variable lengths" if padded is None else "padded"
                    name = f"decoder layer, {stage}, {sum(lengths)} tokens, {frozen}, {kind}, {how}"
                    report(name, step, model.config.num_hidden_layers)


def compiled_decoder(model: Any, spans: Any) -> Callable[[Tensor], Tensor]:
    compile_layers(model.layers)
    settings: Any = {"attention_mask": UNREAD_MASK, "use_cache": False, **spans}
    return lambda x: model(inputs_embeds=x, **settings).last_hidden_state


def fused_decoder(model: Any, spans: Any) -> Callable[[Tensor], Tensor]:
    layers: Any = fuse_decoder_layers(model.layers)
    cos, sin = model.rotary_emb(torch.zeros(1, device=DEVICE, dtype=torch.bfloat16), spans["position_ids"])
    pack = pack_layout(spans["cu_seqlens"], spans["max_seqlen"], spans["padded"])

    def through(x: Tensor) -> Tensor:
        states: States = x[0], None
        for layer in layers:
            states = layer(states, cos[0], sin[0], pack)
        return total(states)

    return through


def decoder_layers(fp8: bool, rank: int, *, tiny: bool) -> Any:
    """Return a few compiled layers."""
    sizes = (64, 96, 2, 4, 2) if tiny else (2048, 8192, 4, 16, 8)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=32768, **dict(zip(names, sizes, strict=True)))
    llm = made(partial(LlamaForCausalLM, config))
    llm.set_attn_implementation(PACKED)
    if fp8:
        quantize_layers_to_fp8(llm, DEVICE)
    if rank:
        add_adapters(llm, r".*layers.*_proj", rank)
    return llm.model.train()


def tower(kinds: list[str], *, tiny: bool) -> None:
    """Time a tower's layers, read only and with adapters."""
    width, mlp, layers, heads, pictures = (32, 64, 2, 4, 2) if tiny else (1024, 4096, 23, 16, 18)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=336,
        patch_size=14,
    )
    x = torch.randn(pictures, 577, width, device=DEVICE, dtype=torch.bfloat16)
    for rank in (0, 64):
        for kind in [kind for kind in kinds if kind != "replayed" or (rank and GPU)]:
            torch._dynamo.reset()
            clip = made(partial(CLIPVisionModel, config)).train()
            if rank:
                add_adapters(clip, r".*layers.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)", rank)
            stack: Any = next(module for name, module in clip.named_modules() if name.endswith("encoder")).layers
            run = through_tower(stack, kind)

            def step(run: Any = run, rank: int = rank) -> None:
                with torch.set_grad_enabled(rank > 0):
                    output = run(x)
                if rank:
                    output.backward(x)

            what = f"adapters of rank {rank}" if rank else "read only"
            report(f"tower layer, {pictures} pictures, {what}, {kind}", step, layers)


def through_tower(stack: Any, kind: str) -> Callable[[Tensor], Tensor]:
    fused: Any = None if kind == "compiled" else fused_tower.fuse_tower_layers(stack)
    if fused is None:
        compile_layers(stack)

    def through(x: Tensor) -> Tensor:
        if fused:
            return fused_tower.through_tower(fused, x)
        for layer in stack:
            x = layer(x, None)
        return x

    if kind == "replayed":
        weights = [weight for weight in stack.parameters() if weight.requires_grad]
        return CudaGraphs(through, weights, lambda: [layer.refresh(torch.bfloat16) for layer in fused])
    return through


def made(build: Callable[[], Any]) -> Any:
    """Return a frozen model in bf16, random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = build()
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def add_adapters(model: nn.Module, targets: str, rank: int) -> None:
    config = LoraConfig(r=rank, lora_alpha=rank // 2, lora_dropout=DROPOUT, target_modules=targets)
    config._register_custom_module({nn.Linear: LoraLinear, Fp8Linear: LoraLinear})
    inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(DEVICE, torch.float32)
            weight.requires_grad_(True)


def random_states(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()


def report(name: str, step: Callable[[], Any], layers: int = 1, times: int = 10) -> None:
    for _ in range(4):
        step()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        step()
    started = time.perf_counter() - began
    wait()
    clock = time.perf_counter() - began
    each = 1e3 / times / layers
    print(f"{name}: {clock * each:.3f} ms, the CPU {started * each:.3f}", flush=True)
    if PROFILED and GPU:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            wait()
        kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
        for kernel in kernels[:40]:
            taken = kernel.self_device_time_total / 1e3 / layers
            print(f"    {taken:8.4f}  {kernel.count / layers:5.1f}  {kernel.key[:110]}", flush=True)


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
