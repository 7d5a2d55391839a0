"""The same weights, records and pictures give the logits and losses that XTuner 0.1.23 computed.

Its LLM is InternLM2 (one wqkv, a LoRA on it and on the head), its tower a CLIP that transformers 4 saved.
States: the adapters and the projector as a run began, and after ten steps of `xtuner train`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor

from dianjing.constants import IGNORE_INDEX
from dianjing.data.collate import Batch, collate
from dianjing.data.encode import Example
from dianjing.formats.source import open_foreign
from dianjing.importing.run import ImportOptions, import_run
from dianjing.infer.generate import LoadedModel
from dianjing.infer.load import load_for_use
from dianjing.model.forward import embed, forward_loss, image_features
from dianjing.pictures.image import load_image
from tests.xtuner import IMAGES, XTUNER, XTUNER_IMAGE_ID

TINY = XTUNER / "tiny"
EXPECTED: dict[str, Any] = json.loads((TINY / "expected.json").read_text(encoding="utf-8"))
STATES = ("pretrain_init", "pretrain_iter_10", "finetune_init", "finetune_iter_10")
SIZES = {"0": (97, 31), "1": (29, 113), "3": (40, 57)}
"""Record -> width and height of its picture; record 5 has none."""
LLM, TOWER = TINY / "tiny_internlm2", TINY / "tiny_clip"


def pattern(width: int, height: int) -> Image.Image:
    """Draw the pictures' pattern: red grows to the right, green downwards, blue in cells of 7 by 5."""
    picture = Image.new("RGB", (width, height))
    for y in range(height):
        for x in range(width):
            blue = 200 if (x // 7 + y // 5) % 2 else 40
            picture.putpixel((x, y), (x * 255 // (width - 1), y * 255 // (height - 1), blue))
    return picture


@pytest.fixture(scope="module")
def restore(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a maker of models in one of the STATES, imported as a user would."""
    folder = tmp_path_factory.mktemp("xtuner")

    def make(state: str) -> LoadedModel:
        run = folder / state
        if not run.exists():
            stage = state.split("_")[0]
            config = folder / f"{stage}.py"
            checkpoint = open_foreign(TINY / f"{stage}_iter_10.pth")
            config.write_text(checkpoint.config, encoding="utf-8")
            source = TINY / f"{state}.{'safetensors' if state.endswith('init') else 'pth'}"
            import_run(source, run, ImportOptions(config=config, llm=str(LLM), vision_tower=str(TOWER)))
        return load_for_use(str(run), "cpu")

    return make


def batch_of(loaded: LoadedModel, *records: str, sizes: dict[str, tuple[int, int]] = SIZES) -> Batch:
    examples, pixels = [], []
    for record in records:
        images = (record,) * (record in sizes)
        pixels += [loaded.image_processor.pixels(pattern(*sizes[image])) for image in images]
        input_ids, labels = expanded(loaded, **EXPECTED["records"][record])
        examples.append(
            Example(
                id=record,
                input_ids=input_ids,
                labels=labels,
                images=images,
                num_images=len(images),
                image_lengths=(),
                truncated=0,
                source="",
                index=0,
            )
        )
    image_id = loaded.encoder.image_token_id
    return collate(examples, pixels, image_token_id=image_id, image_processor=loaded.image_processor)


def expanded(loaded: LoadedModel, input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    ours: tuple[list[int], list[int]] = ([], [])
    for token, label in zip(input_ids, labels, strict=True):
        pictured = token == XTUNER_IMAGE_ID
        times = loaded.encoder.picture_tokens() if pictured else 1
        ours[0].extend([loaded.encoder.image_token_id if pictured else token] * times)
        ours[1].extend([label] * times)
    return ours


def logits_of(loaded: LoadedModel, batch: Batch) -> Tensor:
    features = image_features(loaded.model, batch.pixel_values)
    embeddings = embed(loaded.model, batch.input_ids, batch.image_positions, features)
    hidden = loaded.model.model.language_model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state
    return loaded.model.lm_head(hidden)[0]


def mean_loss(loaded: LoadedModel, batch: Batch) -> float:
    return forward_loss(loaded.model, batch).item() / batch.num_supervised


@pytest.mark.parametrize("name", ["wide_97x31.png", "tall_29x113.png"])
def test_the_pattern_is_that_of_the_pictures(name: str) -> None:
    picture = load_image(str(IMAGES), name)
    assert not ImageChops.difference(pattern(*picture.size), picture).getbbox()


@torch.no_grad()
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("record", ["0", "1", "3", "5"])
def test_logits_are_xtuners(restore: Any, state: str, record: str) -> None:
    loaded, expected = restore(state), EXPECTED["states"][state]
    logits = logits_of(loaded, batch_of(loaded, record))
    assert logits.argmax(-1).tolist() == expected["predictions"][record]
    torch.testing.assert_close(logits[-1, :16], torch.tensor(expected["last_logits"][record]), rtol=0, atol=3e-5)


@torch.no_grad()
@pytest.mark.parametrize("state", STATES)
def test_the_loss_of_a_pack_is_xtuners(restore: Any, state: str) -> None:
    loaded = restore(state)
    assert mean_loss(loaded, batch_of(loaded, "0", "5", "1", "3")) == pytest.approx(
        EXPECTED["states"][state]["loss"], abs=2e-6
    )


@torch.no_grad()
def test_losses_logged_in_training_are_ours(restore: Any) -> None:
    """Steps of the logged runs whose pictures are known, taken before the weights have moved."""
    loaded = restore("finetune_init")
    # The second step's two records, less the first step's: record 0 with the tall picture.
    assert mean_loss(loaded, batch_of(loaded, "0", sizes={"0": (29, 113)})) == pytest.approx(
        2 * 6.911591 - 6.854129, abs=3e-6
    )


def test_a_step_without_pictures_is_xtuners(restore: Any) -> None:
    """The third step of its pretrain run: two text-only records, loss 7.179591, gradient norm 0."""
    loaded = restore("pretrain_init")
    loss = forward_loss(loaded.model, batch_of(loaded, "5", "5"))
    loss.backward()
    assert loss.item() / 38 == pytest.approx(7.179591, abs=2e-6)
    assert all((weight.grad == 0).all() for weight in loaded.model.model.multi_modal_projector.parameters())


def test_labels_of_the_samples_are_supervised(restore: Any) -> None:
    stored = EXPECTED["records"]["0"]["labels"]
    batch = batch_of(restore("pretrain_init"), "0")
    assert batch.targets.tolist() == [label for label in stored if label != IGNORE_INDEX]
