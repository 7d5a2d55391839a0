"""The cases of XTuner's own ids and labels, and the tokenizers they were made with."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.template import get_template

XTUNER = Path(__file__).parent / "data" / "xtuner"
IMAGES = XTUNER / "images"
CASES: list[dict[str, Any]] = json.loads((XTUNER / "cases.json").read_text(encoding="utf-8"))
XTUNER_IMAGE_ID = -200


@lru_cache
def small_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return "tiny_llama_spm" (BOS, EOS, a dummy prefix) or "tiny_bbpe_qwen" (no BOS)."""
    return load_tokenizer(XTUNER / "tokenizers" / name)


def make_encoder(tokenizer: PreTrainedTokenizerFast, template: str, **settings: Any) -> Encoder:
    """Return an encoder that cuts nothing and gives a picture one token, unless told otherwise."""
    picture_tokens = FixedCount(settings.pop("num_image_tokens", 1))
    defaults = {"max_tokens": 10_000, "on_long_record": "error", "picture_tokens": picture_tokens}
    return Encoder(
        tokenizer=tokenizer,
        template=get_template(template),
        image_token_id=image_token_id(tokenizer),
        **{**defaults, **settings},
    )


def as_xtuner(ids: list[int], image_id: int, num_image_tokens: int) -> list[int]:
    """Return ids with each picture's run of image tokens as XTuner's one -200."""
    found: list[int] = []
    run = 0
    for token in ids:
        run = run + 1 if token == image_id else 0
        if run % num_image_tokens == 1 or num_image_tokens == 1 or not run:
            found.append(XTUNER_IMAGE_ID if run else token)
    return found
