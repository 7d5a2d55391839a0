"""Read an export with whatever transformers runs this file, and print how it answers.

    python read_export.py FOLDER CASES.json

Imports nothing of the project: it stands for a stranger's program. CASES.json is a list of
{"content": [...], "images": [path, ...]}; one JSON object a case is printed: input_ids, pixel_values (flat),
logits of the prompt's last position, answer (greedy ids).
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

ANSWER_TOKENS = 16


def main(folder: str, cases: str) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    print(json.dumps({"transformers": transformers.__version__}))
    with open(cases, encoding="utf-8") as file:
        for case in json.load(file):
            print(json.dumps(answer(model.eval(), processor, case)))


@torch.inference_mode()
def answer(model, processor, case: dict) -> dict:
    text = processor.apply_chat_template(case["messages"], add_generation_prompt=True)
    images = [Image.open(path).convert("RGB") for path in case["images"]] or None
    inputs = processor(text=text, images=images, return_tensors="pt")
    logits = model(**inputs).logits[0, -1]
    written = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    pixels = inputs.get("pixel_values")
    return {
        "input_ids": inputs["input_ids"][0].tolist(),
        "pixel_values": [] if pixels is None else pixels.flatten().tolist(),
        "logits": logits.tolist(),
        "answer": written[0, inputs["input_ids"].shape[1] :].tolist(),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
