from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dianjing.errors import DataError
from dianjing.infer import generate as module
from dianjing.infer.generate import (
    Conversation,
    LoadedModel,
    Sampling,
    continue_prompts,
    generate,
    generate_ids,
    prepare,
    stop_sequences,
    stream,
)
from dianjing.model.compile import fuse_layers
from dianjing.model.forward import FUSED
from tests.conftest import MakeRecipe
from tests.llm_families import write_family
from tests.loaded_models import conversations, loaded_model, loaded_text_model, picture

TOKENS = 12


@pytest.fixture
def loaded(make_recipe: MakeRecipe) -> LoadedModel:
    return loaded_model(make_recipe("finetune", language_model={"tuning": "lora", "lora_dropout": 0.5}))


def test_batched_equals_one_by_one(loaded: LoadedModel) -> None:
    alone = [generate_ids(loaded, [one], TOKENS)[0] for one in conversations()]
    assert generate_ids(loaded, conversations(), TOKENS) == alone
    assert len({tuple(answer) for answer in alone}) > 3, "the answers are too alike to show a mix-up"


def test_small_batches_equal_one_large(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    together = generate_ids(loaded, conversations(), TOKENS)
    monkeypatch.setattr(module, "CPU_POSITIONS", 130)
    assert generate_ids(loaded, conversations(), TOKENS) == together


@pytest.mark.parametrize("family", ["internlm2", "qwen3", "mistral"])
def test_fused_layers_answer_alike(make_recipe: MakeRecipe, tmp_path: Path, family: str) -> None:
    """Qwen3 norms queries and keys, this Mistral sees eight positions back."""
    more = {
        "internlm2": {},
        "qwen3": {"initializer_range": 0.3},
        "mistral": {"sliding_window": 8, "initializer_range": 0.3},
    }[family]
    folder = write_family(tmp_path / "llm", family, **more)
    plain = loaded_model(make_recipe("finetune", language_model={"folder": str(folder), "tuning": "lora"}))
    answers = generate_ids(plain, conversations(), TOKENS)
    fuse_layers(plain.model)
    assert hasattr(plain.model.model.language_model, FUSED)
    assert generate_ids(plain, conversations(), TOKENS) == answers
    assert len({tuple(answer) for answer in answers}) > 3, "the answers are too alike to show a mix-up"


def test_slots_are_filled_again(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when some answers end early, several tokens are read back at once and prompts are read a few at a time."""
    asked = conversations() * 2
    free = generate_ids(loaded, asked, TOKENS)
    stop = free[0][3:4]
    monkeypatch.setattr(module, "stop_sequences", lambda loaded: [tuple(stop)])
    alone = [generate_ids(loaded, [one], TOKENS)[0] for one in asked]
    assert len({len(answer) for answer in alone}) > 1
    order: list[int] = []
    monkeypatch.setattr("dianjing.infer.writing.PACK_POSITIONS", 80)
    prompts = [prepare(loaded, one) for one in asked]
    for at_once, steps in ((1, 1), (3, 1), (4, 5), (12, 16)):
        monkeypatch.setattr(module, "_slots_that_fit", lambda *_, n=at_once: n)
        monkeypatch.setattr(module, "STEPS_ON_CPU", steps)
        found = continue_prompts(loaded, prompts, TOKENS, finished=lambda number, ids: order.append(number))
        assert found == alone, (at_once, steps)
    assert sorted(order) == sorted([*range(len(asked))] * 4)


def test_greedy_equals_upstream_generate(loaded: LoadedModel) -> None:
    ours = generate_ids(loaded, conversations(), TOKENS)
    # The image token lies outside this vocabulary, which upstream cannot embed: give it a row.
    embedding = loaded.model.get_input_embeddings()
    embedding.weight.data = torch.cat([embedding.weight.data, torch.zeros(1, 32)])
    for conversation, answer in zip(conversations(), ours, strict=True):
        assert loaded.image_processor is not None
        prompt = prepare(loaded, conversation)
        pixels = [loaded.image_processor(image) for image in prompt.images]
        ids = torch.tensor([prompt.input_ids])
        written = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **({"pixel_values": torch.stack(pixels)} if pixels else {}),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=[stop[0] for stop in stop_sequences(loaded)],
        )
        assert answer == written[0, ids.shape[1] :].tolist()


def test_the_picture_matters(loaded: LoadedModel) -> None:
    red, blue = (Conversation((), "<image>\nWhat?", [picture(30, 30, seed)]) for seed in (1, 2))
    one, other = (module.pack(loaded, [prepare(loaded, asked)]).embeddings for asked in (red, blue))
    assert not torch.equal(one, other)


def test_streamed_pieces_join_to_the_answer(loaded: LoadedModel) -> None:
    for conversation in conversations():
        assert "".join(stream(loaded, conversation, TOKENS)) == generate(loaded, [conversation], TOKENS)[0]


@pytest.mark.parametrize("answer", ["  它是 红色的。\n\nYes. ", "né 🦙", " ", ""])
def test_no_half_character_and_no_outer_blank_is_shown(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    ids = loaded.tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)
    monkeypatch.setattr(module, "_tokens", lambda *settings, **more: ((0, token) for token in ids))
    pieces = list(stream(loaded, conversations()[0], TOKENS))
    assert "".join(pieces) == answer.strip()
    assert not any("\ufffd" in piece or not piece for piece in pieces)
    assert len(pieces) > 2 or len(answer) < 4


@pytest.mark.parametrize("length", [1, 2])
def test_a_stop_sequence_ends_one_row_and_is_not_shown(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    free = generate_ids(loaded, conversations(), TOKENS)
    stop = tuple(free[0][3 : 3 + length])
    monkeypatch.setattr(module, "stop_sequences", lambda loaded: [stop])
    for before, ids, text in zip(
        free,
        generate_ids(loaded, conversations(), TOKENS),
        generate(loaded, conversations(), TOKENS),
        strict=True,
    ):
        ends = [i for i in range(len(before)) if tuple(before[max(0, i - length + 1) : i + 1]) == stop]
        assert ids == (before[: ends[0] + 1] if ends else before)
        kept = ids[:-length] if ends else ids
        assert text == loaded.tokenizer.decode(kept, skip_special_tokens=True).strip()
    assert "".join(stream(loaded, conversations()[0], TOKENS)) == generate(loaded, conversations()[:1], TOKENS)[0]


def test_stops_are_those_of_tokenizer_and_template(loaded: LoadedModel) -> None:
    ends = {loaded.tokenizer.decode(list(stop)) for stop in stop_sequences(loaded)}
    assert ends == {"</s>", "<|im_end|>"}


def test_a_training_model_answers_without_dropout_and_trains_on(loaded: LoadedModel) -> None:
    answers = generate_ids(loaded, conversations(), TOKENS)
    loaded.model.train()
    assert generate_ids(loaded, conversations(), TOKENS) == answers
    assert loaded.model.training
    assert all(module.training for module in loaded.model.modules())
    assert torch.is_grad_enabled()


def test_text_model_is_asked_without_the_picture(tiny_llm: Path) -> None:
    loaded = loaded_text_model(tiny_llm)
    assert not loaded.can_see
    shown = Conversation([("<image>\nIs it wide?", "No.")], "<image>\nAnd now?", [picture(9, 9), picture(8, 8)])
    said = Conversation([("Is it wide?", "No.")], "And now?", [])
    assert prepare(loaded, shown) == prepare(loaded, said)
    assert generate(loaded, [shown, said], TOKENS)[0] == generate(loaded, [said], TOKENS)[0]


def test_sampling(loaded: LoadedModel) -> None:
    asked = conversations()[:1]
    drawn = [generate_ids(loaded, asked, TOKENS, Sampling(temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    narrow = Sampling(temperature=2.0, top_p=1e-6)
    assert generate_ids(loaded, asked, TOKENS, narrow) == generate_ids(loaded, asked, TOKENS)


def test_pictures_must_match_markers(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="1 <image> markers but 0 pictures"):
        prepare(loaded, Conversation((), "<image>\nWhat?", []))


def test_too_long_a_conversation_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="start a new conversation"):
        prepare(loaded, Conversation([("Hello!", "Hello! " * 400)], "Hello!", []))


def test_no_conversation_no_answer(loaded: LoadedModel) -> None:
    assert generate(loaded, []) == []
