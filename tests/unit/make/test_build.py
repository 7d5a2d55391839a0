"""From the journal to records: turns, drops, failures, and the held-out side."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dianjing.data.record import load_records
from dianjing.make.build import Made, build, held_out_names, overlap, write_json
from dianjing.make.journal import Journal
from dianjing.make.pictures import NEAR, Picture
from dianjing.make.prompts import Prompt, choose_prompts
from dianjing.make.requests import Parameters, blind_request, plan

PARAMETERS = Parameters(model="m")
PICTURES = [Picture(name=f"{name}.png", sha256=name * 8, dhash=i * 0xFFFFF, size=(9, 9)) for i, name in enumerate("ab")]


def pairs(*turns: tuple[str, str]) -> str:
    return json.dumps({"pairs": [{"question": question, "answer": answer} for question, answer in turns]})


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "j")


def built(
    journal: Journal, prompts: Sequence[Prompt], replies: dict[tuple[str, str], str], blind: bool = False
) -> Made:
    requests = plan(PICTURES, prompts, PARAMETERS)
    with journal:
        for request in requests:
            assert request.picture
            if reply := replies.get(
                (request.picture.name[0], request.text if request.prompt == "asked" else request.prompt)
            ):
                journal.received(request.key, "ok", {"prompt": request.prompt, "reply": reply})
    return build(requests, prompts, journal, PARAMETERS, blind=blind)


def test_records_are_those_of_the_replies(journal: Journal, tmp_path: Path) -> None:
    prompts = choose_prompts(["conversation_en", "caption_zh"], "en", 2)
    replies = {
        ("a", "conversation_en"): pairs(("What is it?", "A cat."), ("Where?", "On a sofa.")),
        ("b", "caption_zh"): "一只猫睡在沙发上。",
    }
    made = built(journal, prompts, replies)
    assert made.unasked == 2
    assert [(one["id"], one["image"]) for one in made.records] == [
        ("a.png#conversation_en", "a.png"),
        ("b.png#caption_zh", "b.png"),
    ]
    first, second = made.records
    assert first["conversations"] == [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "On a sofa."},
    ]
    assert second["conversations"][0]["value"].removeprefix("<image>\n") in prompts[1].questions
    assert (second["type"], second["language"], second["model"]) == ("caption", "zh", "m")
    assert second["prompt"] == {"name": "caption_zh", "sha256": prompts[1].sha256}
    write_json(tmp_path / "data.json", made.records)
    read = load_records(str(tmp_path / "data.json"))
    assert [record.id for record in read.records] == [record["id"] for record in made.records]
    assert not read.notices


def test_the_questions_of_captions_vary() -> None:
    (prompt,) = choose_prompts(["caption"], "en", 1)
    many = [Picture(name=f"{i}.png", sha256=str(i), dhash=0, size=(9, 9)) for i in range(60)]
    asked = {prompt.questions[int(one.key[:8], 16) % len(prompt.questions)] for one in plan(many, [prompt], PARAMETERS)}
    assert asked == set(prompt.questions)


def test_questions_asked_alone_become_one_record(journal: Journal) -> None:
    asked = Prompt(
        name="asked", kind="questions", language=None, reply="text", texts=("What?", "Where?", "Why?"), sha256="1"
    )
    replies = {("a", "What?"): "A cat.", ("a", "Why?"): "It is tired.", ("b", "What?"): "I'm sorry, I can't."}
    made = built(journal, [asked], replies)
    (record,) = made.records
    said = [turn["value"] for turn in record["conversations"]]
    assert said == ["<image>\nWhat?", "A cat.", "Why?", "It is tired."]
    assert made.drops == {"refusal": 1}
    assert made.unasked == 3


def test_a_question_is_put_to_a_picture_once(journal: Journal) -> None:
    prompts = choose_prompts(["conversation_en", "reasoning_en"], "en", 2)
    replies = {
        ("a", "conversation_en"): pairs(("What is it?", "A cat."), ("what is  it", "A dog.")),
        ("a", "reasoning_en"): pairs(("What is it?", "A cat, for it purrs.")),
        ("b", "conversation_en"): pairs(("What is it?", "A cat.")),
    }
    made = built(journal, prompts, replies)
    assert [one["id"] for one in made.records] == ["a.png#conversation_en", "b.png#conversation_en"]
    assert [(one.image, one.prompt, one.reason) for one in made.dropped] == [
        ("a.png", "conversation_en", "same_question"),
        ("a.png", "reasoning_en", "same_question"),
    ]


def test_what_is_known_without_the_picture_is_dropped(journal: Journal) -> None:
    prompts = choose_prompts(["conversation_en", "caption_en"], "en", 2)
    replies = {
        ("a", "conversation_en"): pairs(("What colour is grass?", "It is green."), ("What colour is it?", "Red.")),
        ("a", "caption_en"): "A red thing.",
    }
    with journal:
        for question, answer in (("What colour is grass?", "It is green."), ("What colour is it?", "Blue.")):
            key = blind_request(question, "en", PARAMETERS).key
            journal.received(key, "ok", {"prompt": "blind_check", "reply": answer})
    made = built(journal, prompts, replies, blind=True)
    assert [(one.question, one.reason) for one in made.dropped] == [("What colour is grass?", "blind")]
    assert [len(one["conversations"]) for one in made.records] == [2, 2]
    assert len(made.blind_requests) == 2
    assert not build(plan(PICTURES, prompts, PARAMETERS), prompts, journal, PARAMETERS).dropped


def near_twins(seed: int, number: int) -> list[Picture]:
    rng = random.Random(seed)
    hashes = [rng.getrandbits(64) for _ in range(number // 2)]
    hashes += [rng.choice(hashes) ^ 1 << rng.randrange(64) for _ in range(number - len(hashes))]
    return [Picture(name=f"{i:03d}", sha256=f"{seed} {i}", dhash=value, size=(9, 9)) for i, value in enumerate(hashes)]


@given(st.integers(0, 1000), st.integers(2, 40), st.floats(0.05, 0.5))
def test_held_out_pictures_have_no_twin_in_training(seed: int, number: int, share: float) -> None:
    pictures = near_twins(seed, number)
    names = held_out_names(pictures, share, seed=7)
    assert len(names) <= round(share * number)
    for one in pictures:
        for other in pictures:
            if (one.dhash ^ other.dhash).bit_count() <= NEAR:
                assert (one.name in names) == (other.name in names)
    shuffled = random.Random(seed).sample(pictures, number)
    assert held_out_names(shuffled, share, seed=7) == names


def test_the_share_is_met_and_the_seed_matters() -> None:
    pictures = [Picture(name=str(i), sha256=str(i), dhash=i * 0x0F0F1234567, size=(9, 9)) for i in range(200)]
    assert len(held_out_names(pictures, 0.1, 7)) == 20
    assert held_out_names(pictures, 0.1, 7) != held_out_names(pictures, 0.1, 8)


def test_the_overlap_is_counted_from_what_is_written() -> None:
    def record(image: str, answer: str) -> dict:
        return {"image": image, "conversations": [{"value": "<image>\nWhat?"}, {"value": answer}]}

    twins = [*PICTURES, Picture(name="c.png", sha256="c", dhash=PICTURES[0].dhash ^ 1, size=(9, 9))]
    train = [record("a.png", "A cat."), record("b.png", "A dog.")]
    clean = overlap(train[1:], [record("c.png", "A fish.")], twins)
    assert clean == {**dict.fromkeys(clean, 0), "pictures_in_train": 1, "pictures_in_held_out": 1}
    both = overlap(train, [record("b.png", "A cow."), record("c.png", "a cat")], twins)
    assert list(both.values()) == [2, 2, 1, 1, 1]
