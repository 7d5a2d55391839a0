#!/usr/bin/env bash
# transformers 5.23.0: a LLaVA with a DINOv2-with-registers or DINOv3 tower passes its register tokens to the LLM as if
# they were patches of the picture.
#
# Seen: vision_feature_select_strategy "default" drops one token, the class token. The four registers behind it stay, so
# that a picture of 16 patches gives 20 features. If the prompt has 16 picture tokens (the number of patches), the model
# raises ValueError; if it has 20, it answers, and the first four "patches" that the LLM reads are registers, which lie
# nowhere in the picture. The same tower without registers gives 16 features. DINOv3 with registers behaves the same.
# What follows for Dianjing: towers with registers are trained with their patches alone, and are not exported as "hf".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import (
    DINOv3ViTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

torch.manual_seed(0)
shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
text = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)


def features(vision):
    """Return what the LLM would read of one picture of 4 x 4 patches, and what the tower's own output has there."""
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text), image_token_id=99,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        found = model.model.get_image_features(pixel_values=pixels)
        found = getattr(found, "pooler_output", found)[0]
        tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][0]
        asked = torch.full((1, 18), 99)
        asked[0, 0] = asked[0, -1] = 1
        try:
            model(input_ids=asked, pixel_values=pixels)
            error = ""
        except ValueError as caught:
            error = str(caught)
        projected = model.model.multi_modal_projector(tower[1:5])
    return len(found), torch.allclose(found[:4], projected, atol=1e-5), error


count, _, error = features(Dinov2Config(**shape))
print(f"DINOv2: {count} features for 16 patches; 16 picture tokens: {error or 'accepted'}")
assert (count, error) == (16, "")
for name, vision in (
    ("DINOv2 with registers", Dinov2WithRegistersConfig(num_register_tokens=4, **shape)),
    ("DINOv3 with registers", DINOv3ViTConfig(num_register_tokens=4, intermediate_size=64, **shape)),
):
    count, registers_first, error = features(vision)
    print(f"{name}: {count} features for 16 patches, the first four are registers: {registers_first}; 16 tokens: {error}")
    assert count == 20
    assert registers_first
    assert "do not match" in error or "features" in error
PYTHON
echo "seen as described: registers are passed on as patches"
