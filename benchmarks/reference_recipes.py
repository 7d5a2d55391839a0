"""XTuner's two reference recipes, trained for a few steps at their true sizes: does the loss fall, what do they take?

    python benchmarks/reference_recipes.py [--steps 30] [--batch 16] [--out reference_recipes] [--tiny]

The models have random weights in the layouts that InternLM2-Chat-1.8B and CLIP ViT-L/14-336 come in, so this measures
sizes and speed and no skill. The data are 64 drawn scenes, repeated; nothing but folders, number of steps and batch
differs from the shipped recipes. The finetune starts from the projector that the pretrain has learned. --tiny does
the same on a CPU in a minute with small shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from dianjing.config.load import load_recipe
from dianjing.run.journal import read_journal
from dianjing.tinyworld.records import Sizes, write_demo_data
from dianjing.train.loop import train

PRETRAIN = "llava_internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain"
FINETUNE = "llava_internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
SCENES = 64
WARM_STEPS = 5
"""Left out of the seconds per step: layers are compiled, memory is first taken."""
SPECIALS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
"""The last ids of InternLM2's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The numbers of one pair of models."""

    vocab: int = 92544
    hidden: int = 2048
    layers: int = 24
    heads: int = 16
    key_value_heads: int = 8
    ffn: int = 8192
    tower_hidden: int = 1024
    tower_layers: int = 24
    tower_heads: int = 16
    tower_ffn: int = 4096
    image_size: int = 336


TINY = Shapes(
    vocab=512,
    hidden=64,
    layers=2,
    heads=4,
    key_value_heads=2,
    ffn=128,
    tower_hidden=64,
    tower_layers=3,
    tower_heads=2,
    tower_ffn=128,
    image_size=56,
)


def write_llm(folder: Path, shapes: Shapes, device: str) -> None:
    """Save a random LLM in InternLM2's own layout, and its tokenizer."""
    folder.mkdir(parents=True)
    write_tokenizer(folder, shapes.vocab)
    config = {
        "model_type": "internlm2",
        "vocab_size": shapes.vocab,
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.ffn,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    torch.manual_seed(0)
    save_file(dict(llm_weights(shapes, device)), folder / "model.safetensors", {"format": "pt"})


def llm_weights(shapes: Shapes, device: str) -> Iterator[tuple[str, Tensor]]:
    """Yield InternLM2's tensors by name: q, k and v in one, norms of ones, all else random."""
    wide = (shapes.heads + 2 * shapes.key_value_heads) * (shapes.hidden // shapes.heads)
    matrices = {
        "attention.wqkv": (wide, shapes.hidden),
        "attention.wo": (shapes.hidden, shapes.hidden),
        "feed_forward.w1": (shapes.ffn, shapes.hidden),
        "feed_forward.w3": (shapes.ffn, shapes.hidden),
        "feed_forward.w2": (shapes.hidden, shapes.ffn),
    }
    named = {"model.tok_embeddings": (shapes.vocab, shapes.hidden), "output": (shapes.vocab, shapes.hidden)}
    for layer in range(shapes.layers):
        named |= {f"model.layers.{layer}.{name}": size for name, size in matrices.items()}
    for name, size in named.items():
        weight = torch.empty(size, dtype=torch.bfloat16, device=device)
        yield f"{name}.weight", weight.normal_(std=shapes.hidden**-0.5).cpu()
    norms = [f"model.layers.{layer}.{kind}_norm" for layer in range(shapes.layers) for kind in ("attention", "ffn")]
    for name in [*norms, "model.norm"]:
        yield f"{name}.weight", torch.ones(shapes.hidden, dtype=torch.bfloat16)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Save a tokenizer of single bytes whose special tokens have InternLM2's ids when `vocab` is InternLM2's."""
    pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    unused = [f"[UNUSED_{number}]" for number in range(vocab - len(pieces) - len(SPECIALS))]
    ids = {piece: number for number, piece in enumerate([*pieces, *unused, *SPECIALS])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    assert fast.convert_tokens_to_ids("<|im_start|>") == vocab - 1
    fast.save_pretrained(folder)


def write_tower(folder: Path, shapes: Shapes, device: str) -> None:
    """Save a random CLIP vision tower and its preprocessing."""
    config = CLIPVisionConfig(
        hidden_size=shapes.tower_hidden,
        intermediate_size=shapes.tower_ffn,
        num_hidden_layers=shapes.tower_layers,
        num_attention_heads=shapes.tower_heads,
        image_size=shapes.image_size,
        patch_size=14,
        projection_dim=768,
    )
    torch.manual_seed(1)
    with torch.device(device):
        tower = CLIPVisionModel(config)
    tower.save_pretrained(folder)
    side = shapes.image_size
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    } | {f"do_{action}": True for action in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing), encoding="utf-8")


def write_data(folder: Path, records: int) -> dict[str, Path]:
    """Draw the scenes and return a file of `records` for each stage: the same few, repeated."""
    sizes = Sizes(pretrain=SCENES, finetune=SCENES, questions_per_scene=3, held_out=1, held_out_pairs=1, captions=1)
    drawn = write_demo_data(folder, sizes)
    for path in (drawn.pretrain, drawn.finetune):
        few = json.loads(path.read_text(encoding="utf-8"))
        repeated = [{**few[i % SCENES], "id": f"{i:05d}"} for i in range(records)]
        path.write_text(json.dumps(repeated, ensure_ascii=False), encoding="utf-8")
    return {PRETRAIN: drawn.pretrain, FINETUNE: drawn.finetune}


def run_recipe(name: str, overrides: dict[str, object], batch: int) -> dict[str, Any]:
    """Train a recipe and return what it was like; the loss must fall."""
    gc.collect()
    torch._dynamo.reset()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    rows = read_journal(train(load_recipe(name, overrides)))
    seconds = [batch / row["samples_per_second"] for row in rows]
    losses = [row["loss"] for row in rows]
    for row, taken in zip(rows, seconds, strict=True):
        print(f"step {int(row['step']):3}  loss {row['loss']:8.4f}  {taken:7.3f} s")
    first, last = statistics.mean(losses[:WARM_STEPS]), statistics.mean(losses[-WARM_STEPS:])
    print(f"{name}: loss {first:.4f} (first {WARM_STEPS}) -> {last:.4f} (last {WARM_STEPS})")
    assert last < first, "the loss did not fall"
    found = {
        "recipe": name,
        "losses": losses,
        "seconds": seconds,
        "seconds_per_step": statistics.median(seconds[WARM_STEPS:]),
        "whole_run_seconds": time.perf_counter() - began,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    peak = f", peak {found['peak_gpu_bytes'] / 2**30:.1f} GiB on the GPU" if on_gpu else ""
    print(f"{found['seconds_per_step']:.3f} s a step (median after {WARM_STEPS}){peak}\n")
    return found


class Tee:
    """A stream that writes to a file too."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._streams = (stream, file)

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def isatty(self) -> bool:
        return False


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make models and data in a folder, train both recipes there and return all figures."""
    shapes = TINY if options.tiny else Shapes()
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    began = time.perf_counter()
    write_llm(folder / "llm", shapes, device)
    write_tower(folder / "tower", shapes, device)
    data = write_data(folder / "data", options.steps * options.batch)
    made = time.perf_counter() - began
    print(f"models and data made in {made:.1f} s; torch {torch.__version__}, {device}")
    places = {
        "language_model.folder": str(folder / "llm"),
        "vision_tower.folder": str(folder / "tower"),
        "data.images": str(folder / "data" / "images"),
        "train.max_steps": options.steps,
        "train.global_batch_size": options.batch,
        "train.log_every": 1,
    }
    runs = []
    for name, path in data.items():
        own = {"data.path": str(path), "output": str(folder / name)}
        if name == FINETUNE:
            own["projector.init_from"] = str(folder / PRETRAIN)
        runs.append(run_recipe(name, places | own, options.batch))
        shutil.copyfile(folder / name / "train.jsonl", options.out / f"{name}.jsonl")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "shapes": vars(shapes), "made_seconds": made, "runs": runs}


def main() -> None:
    """Measure, print, and write figures and log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="global batch size")
    parser.add_argument("--out", type=Path, default=Path("reference_recipes"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, (options.out / "log.txt").open("w", encoding="utf-8") as file:
        out: Any = Tee(sys.stdout, file)
        err: Any = Tee(sys.stderr, file)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            figures = measure(Path(folder), options)
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(f"{options.out} holds figures.json, log.txt and both train.jsonl")


if __name__ == "__main__":
    main()
