"""What holds for every record, order and set of lengths."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dianjing.config.steps import steps_per_epoch
from dianjing.constants import IGNORE_INDEX, IMAGE_MARKER
from dianjing.data.encode import Encoder, LongRecordError
from dianjing.data.order import epoch_order, step_indices
from dianjing.data.pack import pack
from dianjing.data.record import Place, Record, parse_record, place_marker
from dianjing.data.template import TEMPLATES
from dianjing.errors import DataError
from tests.xtuner import make_encoder, small_tokenizer

encoders = st.builds(
    lambda name, template: make_encoder(small_tokenizer(name), template, num_image_tokens=3),
    st.sampled_from(["tiny_llama_spm", "tiny_bbpe_qwen"]),
    st.sampled_from(sorted(TEMPLATES)),
)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0") | st.sampled_from("{}<>|/ \n图"), max_size=20)
answers = texts.filter(lambda text: text.strip())
questions = st.lists(texts, min_size=1, max_size=3).map(IMAGE_MARKER.join)


@st.composite
def records(draw: st.DrawFn) -> Record:
    messages = []
    images = 0
    for question, answer in draw(st.lists(st.tuples(questions, answers), min_size=1, max_size=4)):
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        images += place_marker(question).count(IMAGE_MARKER)
    names = [f"{i}.png" for i in range(images)]
    value = {"id": 0, "image": names[0] if len(names) == 1 else names, "conversations": messages}
    return parse_record(json.loads(json.dumps(value)), Place("data.json", 0, 0))[0]


@given(encoders, records())
@settings(deadline=None)
def test_what_is_supervised_are_the_answers(encoder: Encoder, record: Record) -> None:
    example = encoder.encode(record)
    expected: list[int] = []
    for turn in record.turns:
        expected += encoder.tokenizer.encode(turn.answer + encoder.template.suffix, add_special_tokens=False)
        expected += [] if encoder.template.suffix_as_eos else [encoder.tokenizer.eos_token_id]
    assert [label for label in example.labels if label != IGNORE_INDEX] == expected
    assert len(example.labels) == len(example.input_ids)
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
    assert example.input_ids.count(encoder.image_token_id) == 3 * len(record.images)


@given(encoders, records())
@settings(deadline=None)
def test_a_prompt_is_the_beginning_of_the_example(encoder: Encoder, record: Record) -> None:
    example = encoder.encode(record)
    history: list[tuple[str, str]] = []
    for turn in record.turns:
        input_ids, images = encoder.prompt(history, turn.question)
        assert example.input_ids[: len(input_ids)] == input_ids
        assert input_ids.count(encoder.image_token_id) == 3 * images
        history.append((turn.question, turn.answer))
    rest = len(example.input_ids) - len(input_ids)
    assert rest > 0
    assert example.labels[-rest] != IGNORE_INDEX


@given(records(), st.integers(1, 60))
@settings(deadline=None)
def test_a_cut_is_a_prefix_or_an_error(record: Record, limit: int) -> None:
    whole = make_encoder(small_tokenizer("tiny_llama_spm"), "vicuna")
    example = whole.encode(record)
    cut = make_encoder(whole.tokenizer, "vicuna", max_tokens=limit, on_long_record="truncate")
    input_ids, labels = example.input_ids[:limit], example.labels[:limit]
    lost = input_ids.count(whole.image_token_id) < len(record.images)
    if lost or not any(label != IGNORE_INDEX for label in labels):
        with pytest.raises(DataError):
            cut.encode(record)
    else:
        found = cut.encode(record)
        assert (found.input_ids, found.labels) == (input_ids, labels)
        assert found.truncated == len(example.input_ids) - len(input_ids)
    if len(example.input_ids) > limit:
        with pytest.raises(LongRecordError):
            make_encoder(whole.tokenizer, "vicuna", max_tokens=limit).encode(record)


@given(texts)
def test_placing_a_marker_twice_is_placing_it_once(text: str) -> None:
    for question in (text, f"{text}{IMAGE_MARKER}", f"{IMAGE_MARKER}{text}{IMAGE_MARKER}"):
        assert place_marker(place_marker(question)) == place_marker(question)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_packs_hold_each_item_once_and_none_is_too_long(lengths: list[int], limit: int) -> None:
    packs = pack(lengths, limit)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    sums = sorted(sum(lengths[i] for i in members) for members in packs)
    assert all(0 < total <= limit for total in sums)
    assert all(members == sorted(members) for members in packs)
    # Best fit opens a new pack only for what fits nowhere, so no two packs would fit into one.
    assert len(sums) < 2 or sums[0] + sums[1] > limit


@given(
    st.integers(1, 40),
    st.integers(0, 5),
    st.integers(0, 3),
    st.sampled_from(["shuffle", "sequential"]),
    st.integers(1, 12),
    st.integers(1, 4),
)
def test_an_epoch_shows_each_record_once_over_all_ranks(
    n: int, seed: int, epoch: int, mode: str, batch_size: int, world_size: int
) -> None:
    order = epoch_order(n, seed, epoch, mode)
    assert order == epoch_order(n, seed, epoch, mode)
    seen: list[int] = []
    for step in range(steps_per_epoch(n, batch_size)):
        alone = step_indices(order, step, batch_size, 0, 1)
        shared = [step_indices(order, step, batch_size, rank, world_size) for rank in range(world_size)]
        assert sorted(index for part in shared for index in part) == sorted(alone)
        assert alone
        seen += alone
    assert seen == order
