"""How far each format equals its run: the table of docs/export.md, measured.

    python benchmarks/export_matrix.py [--print]

Every cell is an export of a tiny random model after a few real training steps, with the figure of its own receipt, or
the reason why the format refuses the run. Anything else that goes wrong ends the program: no cell is made up.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import track
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests make the tiny models

from dianjing.config.schema import (  # noqa: E402
    DataConfig,
    LanguageModelConfig,
    Recipe,
    TrainConfig,
    VisionTowerConfig,
)
from dianjing.errors import ExportError  # noqa: E402
from dianjing.export.export import export  # noqa: E402
from dianjing.export.formats import FORMATS  # noqa: E402
from dianjing.infer.load import load_for_use  # noqa: E402
from dianjing.train.loop import train  # noqa: E402
from tests.recipe_models import write_family  # noqa: E402
from tests.tiny import TinyDataset, write_clip, write_dataset, write_siglip  # noqa: E402

LLMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("llama", "llama3_chat", {}),
    # As XTuner trains InternLM2: a LoRA on its fused wqkv, and on the head.
    "InternLM2": ("internlm2", "internlm2_chat", {"lora_share_qkv": True, "lora_head": True}),
    "Qwen2": ("qwen2", "internlm2_chat", {}),
}
"""Name -> its kind, its chat template, and settings of its LoRA."""
TOWERS: dict[str, Callable[..., Path]] = {"CLIP": write_clip, "SigLIP": write_siglip}
TUNINGS: dict[str, dict[str, Any]] = {
    "LoRA": {"tuning": "lora"},
    "QLoRA": {"tuning": "lora", "quantization": "nf4"},
    "full": {"tuning": "full"},
}
DOCUMENTS = ("docs/export.md", "docs/export_zh.md")
BEGIN, END = "<!-- export_matrix.py writes from here -->", "<!-- to here -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the table instead of writing it to the documents")
    given = parser.parse_args()
    disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        text = table(Path(folder))
    if given.print:
        print(text)
        return
    for name in DOCUMENTS:
        path = ROOT / name
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def table(folder: Path) -> str:
    """Return the Markdown of all runs and formats, and of the reasons for what is refused."""
    data = write_dataset(folder / "data")
    reasons: dict[str, int] = {}
    lines = [
        f"| LLM | tower | tuning | {' | '.join(f'`{name}`' for name in FORMATS)} |",
        f"|---|---|---|{'---:|' * len(FORMATS)}",
    ]
    combinations = list(itertools.product(LLMS, TOWERS, TUNINGS))
    for number, names in enumerate(track(combinations, "training and exporting")):
        run = make_run(folder / str(number), data, *names)
        cells = [cell(run, run.with_name(format), format, reasons) for format in FORMATS]
        lines.append(f"| {' | '.join([*names, *cells])} |")
    return "\n".join([*lines, *_footnotes(reasons)])


def make_run(folder: Path, data: TinyDataset, llm: str, tower: str, tuning: str) -> Path:
    """Train a new model a few steps and return the run."""
    kind, template, lora = LLMS[llm]
    llm_folder = write_family(folder / "llm", kind)
    settings = TUNINGS[tuning]
    recipe = Recipe(
        stage="finetune",
        output=str(folder / "run"),
        language_model=LanguageModelConfig(
            folder=str(llm_folder), template=template, lora_rank=4, lora_alpha=8.0, **{**lora, **settings}
        ),
        vision_tower=VisionTowerConfig(
            folder=str(TOWERS[tower](folder / "tower")), tuning=settings["tuning"], lora_rank=2, lora_alpha=4.0
        ),
        data=DataConfig(path=str(data.path), images=str(data.images), pack_tokens=256),
        train=TrainConfig(global_batch_size=4, epochs=2, precision="fp32", learning_rate=2e-3),
    )
    return train(recipe, quiet=True)


def cell(run: Path, out: Path, format: str, reasons: dict[str, int]) -> str:
    """Return what the receipt of an export says, or the number of the reason why there is none."""
    try:
        proof = export(load_for_use(str(run), "cpu"), out, format=format)
    except ExportError as error:
        return _number(str(error).replace(f"{run.parent}/", ""), reasons)
    cost = proof.max_rounding_difference
    return f"{proof.max_logit_difference:.1e}" + (f" ({cost:.1e})" if cost is not None else "")


def _number(reason: str, reasons: dict[str, int]) -> str:
    return f"[{reasons.setdefault(reason, len(reasons) + 1)}]"


def _footnotes(reasons: dict[str, int]) -> Iterator[str]:
    for reason, number in reasons.items():
        yield f"\n[{number}] {reason}"


if __name__ == "__main__":
    main()
