"""Models that answer, made from the tiny parts; their adapters are random, as if they had learned something."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dianjing.config.load import save_recipe
from dianjing.config.schema import Recipe
from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.template import get_template
from dianjing.infer.generate import Conversation, LoadedModel
from dianjing.layers.attention import PACKED
from dianjing.model.build import build
from dianjing.model.language import load_language_model
from dianjing.model.stage import apply_stage
from dianjing.model.weights import trainable_state
from dianjing.run.checkpoint import save
from dianjing.run.state import TrainState


def loaded_model(recipe: Recipe) -> LoadedModel:
    """Return the model of a recipe, all that trains moved away from where it began."""
    built = build(recipe)
    apply_stage(built.model, recipe)
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in built.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.02)
    return LoadedModel(
        name="tiny",
        model=built.model.eval(),
        tokenizer=built.tokenizer,
        encoder=built.encoder,
        image_processor=built.image_processor,
        recipe=recipe,
    )


def loaded_text_model(folder: Path) -> LoadedModel:
    """Return a text-only LLM."""
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(
        tokenizer=tokenizer,
        template=get_template("internlm2_chat"),
        picture_tokens=FixedCount(1),
        max_tokens=512,
        on_long_record="error",
        image_token_id=image_token_id(tokenizer),
    )
    model, _ = load_language_model(folder, torch.float32)
    model.set_attn_implementation(PACKED)
    return LoadedModel(name="text", model=model.eval(), tokenizer=tokenizer, encoder=encoder, image_processor=None)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def conversations() -> list[Conversation]:
    """Return conversations of unlike length: one picture, two, none, a history, the same picture again."""
    wide, tall = picture(60, 20, 1), picture(18, 50, 2)
    return [
        Conversation((), "<image>\nWhat colour is it?", [wide]),
        Conversation((), "Hello!", []),
        Conversation((), "Is <image> as wide as <image> is, or is it not, and if not, why?", [wide, tall]),
        Conversation([("<image>\nIs it wide?", "No.")], "Sure?", [tall]),
        Conversation((), "<image>", [wide]),
        Conversation([("Hello!", "Hello!"), ("<image>\nWhat?", "Red.")], "<image>\nAnd now?", [tall, wide]),
    ]


def write_run(recipe: Recipe, loaded: LoadedModel) -> Path:
    """Write what use needs of a run: its recipe and one checkpoint."""
    run = Path(recipe.output)
    run.mkdir(parents=True)
    save_recipe(recipe, run / "recipe.toml")
    state = TrainState(step=1, epoch=0, samples_seen=4, total_steps=1, recipe={}, data={})
    save(run, trainable_state(loaded.model), {"step": torch.ones(1)}, state, keep=1)
    return run
