"""XTuner's names of what a LLaVA learns <-> the names in the live model.

llm.base_model.model.model.layers.0.attention.wqkv.lora_B.default.weight       a LoRA on InternLM2's fused q, k, v
llm.model.layers.0.self_attn.q_proj.weight                                     an LLM that is tuned in full
visual_encoder.base_model.model.vision_model.encoder.layers.0.mlp.fc1.lora_A.default.weight
projector.model.0.weight, .0.bias, .2.weight, .2.bias                          depth 2
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dianjing.errors import ModelError
from dianjing.formats.internlm2 import FUSED_QKV, INTERNLM2_TO_LLAMA, internlm2_to_llama

PEFT = "base_model.model."
PROJECTOR = "projector.model."
LIVE_PROJECTOR = "model.multi_modal_projector."
LIVE_TOWER = "model.vision_tower."
LINEARS = {"0": "linear_1", "2": "linear_2"}
TOWER_LAYER = re.compile(r"^encoder\.layers\.(\d+)\.")
QKV = re.compile(r"\.self_attn\.([qkv])_proj\.")
NO_WEIGHT = re.compile(r"(\.rotary_emb\.inv_freq|\.position_ids)$")
"""Tables that old versions of transformers saved; each version computes them."""


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Tensors under the names of the live model, and what became of the others."""

    live: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> XTuner's names."""
    unknown: list[str] = field(default_factory=list)


def to_live(weights: Mapping[str, Tensor], text_config: Any, tower_layers: int) -> Translation:
    """Return XTuner's tensors under the live model's names; `tower_layers` of the tower's layers reach the loss."""
    found = Translation()
    for name, weight in weights.items():
        if reason := _needless(name, weights, tower_layers):
            found.dropped.setdefault(reason, []).append(name)
        elif parts := live_parts(name, weight, text_config):
            found.live.update(parts)
        else:
            found.unknown.append(name)
    return found


def live_parts(name: str, weight: Tensor, text_config: Any) -> dict[str, Tensor]:
    """Return one tensor of XTuner's as the tensors it is in the live model; none for a name it does not know."""
    part, _, rest = name.partition(".")
    rest = rest.removeprefix(PEFT)
    if name.startswith(PROJECTOR):
        number, _, kind = name.removeprefix(PROJECTOR).partition(".")
        return {f"{LIVE_PROJECTOR}{LINEARS[number]}.{kind}": weight} if number in LINEARS else {}
    if part == "visual_encoder":
        return {LIVE_TOWER + rest.removeprefix("vision_model."): weight}
    if part != "llm":
        return {}
    if FUSED_QKV + "lora_A" in rest:  # q, k and v share it
        named = {rest.replace(FUSED_QKV, ".self_attn.q_proj."): weight}
    else:
        named = internlm2_to_llama(rest, weight, text_config)
    if not all(name.startswith(("model.", "lm_head.")) for name in named):
        return {}
    return {
        "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name: tensor
        for name, tensor in named.items()
    }


def _needless(name: str, weights: Mapping[str, Tensor], tower_layers: int) -> str:
    """Return why a tensor is of no use, "" when it is of use."""
    if NO_WEIGHT.search(name):
        return "a table that is computed"
    inside = _in_tower(name)
    layer = TOWER_LAYER.match(inside)
    if inside.startswith("post_layernorm.") or (layer and int(layer[1]) >= tower_layers):
        return "behind the layer of the tower that the projector reads"
    if name in tied_heads(weights):
        return "the head, which is the embedding itself"
    return ""


def tied_heads(weights: Mapping[str, Tensor]) -> set[str]:
    """Return the names of an LLM's head that is the same tensor as its embedding."""
    pairs = (
        ("llm.lm_head.weight", "llm.model.embed_tokens.weight"),
        ("llm.output.weight", "llm.model.tok_embeddings.weight"),
    )
    return {
        head
        for head, embedding in pairs
        if head in weights and embedding in weights and weights[head].data_ptr() == weights[embedding].data_ptr()
    }


def parameters_in_order(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of the parameters of XTuner's model: LLM, tower, projector.

    The file may have them in another order; within a part the order is the file's.
    """
    heads = tied_heads(weights)
    named = [name for name, weight in weights.items() if weight.is_floating_point() and not NO_WEIGHT.search(name)]
    return [
        name
        for part in ("llm.", "visual_encoder.", "projector.")
        for name in named
        if name.startswith(part) and name not in heads
    ]


def moments_by_name(
    optimizer: Mapping[str, Any], weights: Mapping[str, Tensor], where: object
) -> dict[str, dict[str, Tensor]]:
    """Return AdamW's state of each weight; torch keeps it by number, frozen parameters counted too.

    What had no gradient has no memory: layers of the tower behind the one that the projector reads.

    Raises:
        ModelError: the state cannot be assigned to the weights.
    """
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    states = [optimizer["state"][number] for number in numbers if number in optimizer["state"]]
    names = parameters_in_order(weights)
    layers = sorted({int(match[1]) for name in names if (match := TOWER_LAYER.match(_in_tower(name)))}, reverse=True)
    candidates = [[name for name in names if not _is_behind(name, layer)] for layer in (None, *layers)]
    moved = next((candidate for candidate in candidates if len(candidate) == len(states)), [])
    shapes = [tuple(state["exp_avg"].shape) if "exp_avg" in state else None for state in states]
    if shapes != [tuple(weights[name].shape) for name in moved]:
        raise ModelError(
            f"{where}: its optimizer's state is of {len(states)} parameters, which are not its {len(names)} weights, "
            "or is not AdamW's; give --weights-only to leave it out: the run can be asked, but not trained on"
        )
    return {
        name: {
            "step": torch.tensor(float(state["step"]), dtype=torch.float32),
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
        }
        for name, state in zip(moved, states, strict=True)
    }


def _in_tower(name: str) -> str:
    """Return a name within the tower, "" for one that is not of the tower."""
    part, _, rest = name.partition(".")
    return rest.removeprefix(PEFT).removeprefix("vision_model.") if part == "visual_encoder" else ""


def _is_behind(name: str, layer: int | None) -> bool:
    """Return whether a tensor is of the tower's layer of that number or of what comes after it; None = nothing is."""
    if layer is None:
        return False
    match = TOWER_LAYER.match(_in_tower(name))
    return _in_tower(name).startswith("post_layernorm.") or bool(match and int(match[1]) >= layer)


def require_two_layers(names: Iterable[str], where: object) -> None:
    """Refuse weights whose projector is not ours.

    Raises:
        ModelError: there is no projector, or it has another number of linear layers.
    """
    layers = {name.removeprefix(PROJECTOR).partition(".")[0] for name in names if name.startswith(PROJECTOR)}
    if len(layers) != len(LINEARS):
        raise ModelError(
            f"{where}: its projector has {len(layers)} linear layers; only those of 2 can be read (XTuner's projector "
            "depth 2, LLaVA's mlp2x_gelu)"
        )


def from_live(state: Mapping[str, Tensor], text_config: Any, *, internlm2: bool) -> dict[str, Tensor]:
    """Return what a model has learned, by its live names, under XTuner's names.

    With `internlm2` the LLM's are InternLM2's own: q, k and v, and their LoRA, are one again.

    Raises:
        ModelError: q, k and v have a lora_A each, which InternLM2's one wqkv cannot have.
    """
    adapted = {_part(name) for name in state if ".lora_" in name}
    found: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for name, weight in state.items():
        written = _xtuner_name(name, peft=_part(name) in adapted, internlm2=internlm2)
        match = QKV.search(written) if internlm2 and written.startswith("llm.") else None
        if match:
            written = written.replace(match[0], FUSED_QKV)
            fused.setdefault(written, {})[match[1]] = weight
        found[written] = weight  # the fused ones: their place in the order, the tensor follows
    return found | {name: _fuse(parts, text_config, name) for name, parts in fused.items()}


def _xtuner_name(live: str, *, peft: bool, internlm2: bool) -> str:
    part = _part(live)
    if part == "projector":
        layer, _, kind = live.removeprefix(LIVE_PROJECTOR).partition(".")
        number = next(number for number, linear in LINEARS.items() if linear == layer)
        return f"{PROJECTOR}{number}.{kind}"
    if part == "visual_encoder":
        inside = f"vision_model.{live.removeprefix(LIVE_TOWER)}"
    else:
        inside = live.replace("model.language_model.", "model.", 1)
        for theirs, llama in INTERNLM2_TO_LLAMA.items() if internlm2 else ():
            inside = inside.replace(llama, theirs)
    return f"{part}.{PEFT if peft else ''}{inside}"


def _fuse(parts: Mapping[str, Tensor], config: Any, name: str) -> Tensor:
    """Return wqkv, its bias or its lora_B, from the rows of q, k and v: the inverse of `internlm2_to_llama`."""
    if "lora_A" in name:
        if any(part.data_ptr() != parts["q"].data_ptr() for part in parts.values()):
            raise ModelError("q, k and v have a lora_A each, InternLM2's wqkv has one (language_model.lora_share_qkv)")
        return parts["q"]
    heads = config.num_key_value_heads
    queries = config.num_attention_heads // heads
    groups = {part: rows.unflatten(0, (heads, queries if part == "q" else 1, -1)) for part, rows in parts.items()}
    return torch.cat([groups["q"], groups["k"], groups["v"]], dim=1).flatten(0, 2).contiguous()


def _part(live: str) -> str:
    if live.startswith(LIVE_PROJECTOR):
        return "projector"
    return "visual_encoder" if live.startswith(LIVE_TOWER) else "llm"
