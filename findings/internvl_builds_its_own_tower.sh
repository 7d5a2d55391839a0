#!/usr/bin/env bash
# transformers 5.23.0: an InternVL configuration whose vision_config says "siglip_vision_model" is built with InternVL's
# own tower, without an error or a warning.
#
# Seen: the configuration keeps saying model_type "siglip_vision_model", while the tower is an InternVLVisionModel with
# names (cls_token, lambda_1) that no SigLIP has. Weights of a SigLIP put into such a folder would be reported as missing
# at best. LlavaForConditionalGeneration, given the same vision_config, builds the SigLIP that was asked for.
# What follows for Dianjing: InternVL's layout is not offered as an export for SigLIP towers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig, SiglipVisionConfig
from transformers import LlavaConfig, LlavaForConditionalGeneration

sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
text = LlamaConfig(vocab_size=100, num_key_value_heads=4, **sizes)
tower = dict(model_type="siglip_vision_model", image_size=32, patch_size=8, **sizes)
with warnings.catch_warnings(record=True) as caught, torch.device("meta"):
    warnings.simplefilter("always")
    intern = InternVLForConditionalGeneration(InternVLConfig(vision_config=dict(tower), text_config=text))
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=SiglipVisionConfig(**sizes), text_config=text))
built = type(intern.model.vision_tower).__name__
said = intern.config.vision_config.model_type
names = [name for name, _ in intern.model.vision_tower.named_parameters()]
own = any("cls_token" in name for name in names) and any("lambda_1" in name for name in names)
print(f"InternVL: configuration says {said!r}, built {built}; names of InternVL's own tower: {own}")
print(f"LLaVA: built {type(llava.model.vision_tower).__name__}; warnings: {len(caught)}")
assert built == "InternVLVisionModel"
assert own
assert type(llava.model.vision_tower).__name__ == "SiglipVisionModel"
PYTHON
echo "seen as described: InternVL builds its own tower whatever vision_config names"
