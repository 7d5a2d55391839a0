from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from dianjing.errors import ExportError
from dianjing.export.layout import EMBEDDING, HEAD, hub_config, hub_name, hub_state, with_image_row


@pytest.mark.parametrize(
    ("live", "written"),
    [
        ("lm_head.weight", HEAD),
        ("model.language_model.embed_tokens.weight", EMBEDDING),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        (
            "model.vision_tower.embeddings.class_embedding",
            "vision_tower.vision_model.embeddings.class_embedding",
        ),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
    ],
)
def test_hub_name(live: str, written: str) -> None:
    assert hub_name(live) == written


def test_a_weight_of_no_part_is_refused() -> None:
    with pytest.raises(ExportError, match="of no part of a LLaVA"):
        hub_name("model.audio_tower.weight")


def state(rows: int, *, tied: bool) -> dict[str, torch.Tensor]:
    embedding = torch.arange(rows * 2.0).reshape(rows, 2)
    head = embedding if tied else embedding + 100
    return {"model.language_model.embed_tokens.weight": embedding, "lm_head.weight": head}


@pytest.mark.parametrize(("rows", "image", "padded"), [(320, 320, 384), (63, 63, 64), (384, 320, 384)])
def test_the_image_token_gets_a_row_and_never_a_say(rows: int, image: int, padded: int) -> None:
    written = hub_state(with_image_row(state(rows, tied=False), image, 1), torch.float32)
    for name, first in ((EMBEDDING, 2.0), (HEAD, 102.0)):
        assert written[name].shape == (padded, 2)
        assert torch.equal(
            written[name][:rows],
            state(rows, tied=False)[
                {EMBEDDING: "model.language_model.embed_tokens.weight", HEAD: "lm_head.weight"}[name]
            ],
        )
        assert (written[name][rows:] == torch.tensor([first, first + 1])).all()
    logits = torch.randn(50, 2) @ written[HEAD].T
    assert (logits.argmax(-1) < rows).all()


def test_a_tied_head_is_written_once() -> None:
    assert set(hub_state(with_image_row(state(4, tied=True), 4, 1), torch.float32)) == {EMBEDDING}


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, 5e5, None),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            1e4,
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_rope_is_written_as_both_readers_know_it(rope: dict, theta: float, scaling: dict | None) -> None:
    config = LlavaConfig(
        text_config=LlamaConfig(rope_parameters=rope, dtype="bfloat16"),
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14),
        image_seq_length=4,
    )
    written = hub_config(config, vocab_size=384, tied=False, image_token_id=320, dtype=torch.float32)
    text = written["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]) == (theta, scaling)
    assert "rope_parameters" not in text
    assert text["vocab_size"] == 384
    assert written["torch_dtype"] == text["torch_dtype"] == written["vision_config"]["torch_dtype"] == "float32"
    assert "dtype" not in text
    assert written["image_token_index"] == written["image_token_id"] == 320
    assert written["image_seq_length"] == 4
    again = LlavaConfig(**written)
    assert again.text_config.rope_parameters == rope
