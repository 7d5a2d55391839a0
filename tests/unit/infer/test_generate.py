from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dianjing.errors import DataError
from dianjing.infer import generate as module
from dianjing.infer.generate import (
    Conversation,
    Sampling,
    Seer,
    generate,
    generate_ids,
    prepare,
    stop_sequences,
    stream,
)
from tests.conftest import MakeRecipe
from tests.seers import conversations, picture, seer_of, text_seer

TOKENS = 12


@pytest.fixture
def seer(make_recipe: MakeRecipe) -> Seer:
    return seer_of(make_recipe("finetune", language_model={"tuning": "lora", "lora_dropout": 0.5}))


def test_batched_equals_one_by_one(seer: Seer) -> None:
    alone = [generate_ids(seer, [one], TOKENS)[0] for one in conversations()]
    assert generate_ids(seer, conversations(), TOKENS) == alone
    assert len({tuple(answer) for answer in alone}) > 3, "the answers are too alike to show a mix-up"


def test_small_batches_equal_one_large(seer: Seer, monkeypatch: pytest.MonkeyPatch) -> None:
    together = generate_ids(seer, conversations(), TOKENS)
    monkeypatch.setattr(module, "BATCH_POSITIONS", 130)
    assert generate_ids(seer, conversations(), TOKENS) == together


def test_greedy_equals_upstream_generate(seer: Seer) -> None:
    ours = generate_ids(seer, conversations(), TOKENS)
    # The image token lies outside this vocabulary, which upstream cannot embed: give it a row.
    embedding = seer.model.get_input_embeddings()
    embedding.weight.data = torch.cat([embedding.weight.data, torch.zeros(1, 32)])
    for conversation, answer in zip(conversations(), ours, strict=True):
        assert seer.image_processor is not None
        prompt = prepare(seer, conversation)
        pixels = [seer.image_processor(image) for image in prompt.images]
        ids = torch.tensor([prompt.input_ids])
        written = seer.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **({"pixel_values": torch.stack(pixels)} if pixels else {}),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=[stop[0] for stop in stop_sequences(seer)],
        )
        assert answer == written[0, ids.shape[1] :].tolist()


def test_the_picture_matters(seer: Seer) -> None:
    red, blue = (Conversation((), "<image>\nWhat?", [picture(30, 30, seed)]) for seed in (1, 2))
    with module.answering(seer.model):
        one, other = (module.left_padded(seer, [prepare(seer, asked)])[0] for asked in (red, blue))
    assert not torch.equal(one, other)


def test_streamed_pieces_join_to_the_answer(seer: Seer) -> None:
    for conversation in conversations():
        assert "".join(stream(seer, conversation, TOKENS)) == generate(seer, [conversation], TOKENS)[0]


@pytest.mark.parametrize("answer", ["  它是 红色的。\n\nYes. ", "né 🦙", " ", ""])
def test_no_half_character_and_no_outer_blank_is_shown(
    seer: Seer, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    ids = seer.tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)
    monkeypatch.setattr(module, "_tokens", lambda *settings: ((0, token) for token in ids))
    pieces = list(stream(seer, conversations()[0], TOKENS))
    assert "".join(pieces) == answer.strip()
    assert not any("\ufffd" in piece or not piece for piece in pieces)
    assert len(pieces) > 2 or len(answer) < 4


@pytest.mark.parametrize("length", [1, 2])
def test_a_stop_sequence_ends_one_row_and_is_not_shown(
    seer: Seer, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    free = generate_ids(seer, conversations(), TOKENS)
    stop = tuple(free[0][3 : 3 + length])
    monkeypatch.setattr(module, "stop_sequences", lambda seer: [stop])
    for before, ids, text in zip(
        free,
        generate_ids(seer, conversations(), TOKENS),
        generate(seer, conversations(), TOKENS),
        strict=True,
    ):
        ends = [i for i in range(len(before)) if tuple(before[max(0, i - length + 1) : i + 1]) == stop]
        assert ids == (before[: ends[0] + 1] if ends else before)
        kept = ids[:-length] if ends else ids
        assert text == seer.tokenizer.decode(kept, skip_special_tokens=True).strip()
    assert "".join(stream(seer, conversations()[0], TOKENS)) == generate(seer, conversations()[:1], TOKENS)[0]


def test_stops_are_those_of_tokenizer_and_template(seer: Seer) -> None:
    ends = {seer.tokenizer.decode(list(stop)) for stop in stop_sequences(seer)}
    assert ends == {"</s>", "<|im_end|>"}


def test_a_training_model_answers_without_dropout_and_trains_on(seer: Seer) -> None:
    answers = generate_ids(seer, conversations(), TOKENS)
    seer.model.train()
    assert generate_ids(seer, conversations(), TOKENS) == answers
    assert seer.model.training
    assert all(module.training for module in seer.model.modules())
    assert torch.is_grad_enabled()


def test_text_model_is_asked_without_the_picture(tiny_llm: Path) -> None:
    seer = text_seer(tiny_llm)
    assert not seer.can_see
    shown = Conversation([("<image>\nIs it wide?", "No.")], "<image>\nAnd now?", [picture(9, 9), picture(8, 8)])
    said = Conversation([("Is it wide?", "No.")], "And now?", [])
    assert prepare(seer, shown) == prepare(seer, said)
    assert generate(seer, [shown, said], TOKENS)[0] == generate(seer, [said], TOKENS)[0]


def test_sampling(seer: Seer) -> None:
    asked = conversations()[:1]
    drawn = [generate_ids(seer, asked, TOKENS, Sampling(temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    narrow = Sampling(temperature=2.0, top_p=1e-6)
    assert generate_ids(seer, asked, TOKENS, narrow) == generate_ids(seer, asked, TOKENS)


def test_pictures_must_match_markers(seer: Seer) -> None:
    with pytest.raises(ValueError, match="1 <image> markers but 0 pictures"):
        prepare(seer, Conversation((), "<image>\nWhat?", []))


def test_too_long_a_conversation_is_refused(seer: Seer) -> None:
    with pytest.raises(DataError, match="start a new conversation"):
        prepare(seer, Conversation([("Hello!", "Hello! " * 400)], "Hello!", []))


def test_no_conversation_no_answer(seer: Seer) -> None:
    assert generate(seer, []) == []
