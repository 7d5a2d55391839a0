"""Reading replies: what is asked for, what can be mended in one way only, and what cannot."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dianjing.make.replies import MAX_CHARACTERS, InvalidReply, Pair, read_pairs, read_strict, read_text

PAIRS = [Pair("What is it?", 'A "cat", asleep.'), Pair("它在哪里？", "在沙发上。")]
WHOLE = json.dumps({"pairs": [vars(pair) for pair in PAIRS]}, ensure_ascii=False)


@pytest.mark.parametrize(
    "reply",
    [
        WHOLE,
        f"```json\n{WHOLE}\n```",
        f"Sure! Here they are:\n{WHOLE}\nI hope this is of use {{as wished}}.",
        f"<think>First {{pairs}}... {WHOLE[:30]}</think>\n{WHOLE}",
        WHOLE.replace("}]", "},]"),
        WHOLE.replace('."}', '.",\n}'),
        WHOLE[len('{"pairs": ') : -1],
        f"{WHOLE}\n{WHOLE}",
        WHOLE[:-1],
        WHOLE[:-2] + ', {"question": "And this?", "answ',
        WHOLE[:-2] + ', {"question": "And this?", "answer": "Cut o',
        WHOLE.replace('{"question"', '{"type": "x", "question"'),
        WHOLE.replace('{"pairs"', '{"note": "b", "pairs"'),
        WHOLE.replace('"pairs"', '"qa_pairs"'),
        json.dumps(WHOLE),
        f"First {{pairs}}... {WHOLE[:30]}</think>\n{WHOLE}",
        f"<|begin_of_box|>{WHOLE}<|end_of_box|>",
        "The list:\n" + WHOLE[len('{"pairs": ') : -2] + ', {"question"',
    ],
    ids=lambda reply: reply[:12] + "..." + reply[-12:],
)
def test_one_reading_is_found(reply: str) -> None:
    assert read_pairs(reply) == PAIRS


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        ("<think>Hm.</think>", "empty"),
        ("A cat lies on a sofa.", "not JSON"),
        ('{"pairs": []}', "at least one"),
        ('{"pairs": "none"}', "at least one"),
        ('{"pairs": [{"q": "What?", "a": "This."}]}', "pairs[0] must be"),
        ('{"pairs": [{"question": "What?", "answer": 3}]}', "pairs[0].answer"),
        ('{"pairs": [{"question": "What?", "answer": "  "}]}', "pairs[0].answer"),
        ('{"pairs": [{"question": "What?", "answer": "\\ud800"}]}', "half a character"),
        ('{"pairs": [{"question": "What?"}], "note": "b"}', 'with "answer" and "question"'),
        ('{"a": [{"question": "What?", "answer": "a"}], "b": [1]}', 'with "pairs"'),
        (WHOLE + WHOLE.replace("cat", "dog"), "2 different"),
        (WHOLE[:40], "not JSON"),
        ('{"pairs": [{"question": "a", "question": "b", "answer": "c"}]}', "twice"),
        ("x" * (MAX_CHARACTERS + 1), "characters"),
        ("[" * 40_000, "not JSON"),
    ],
    ids=lambda value: value[:30],
)
def test_no_other_reading_is_taken(reply: str, reason: str) -> None:
    with pytest.raises(InvalidReply) as error:
        read_pairs(reply)
    assert reason in str(error.value)


@given(st.integers(0, len(WHOLE)))
def test_a_cut_reply_gives_whole_pairs_or_none(length: int) -> None:
    try:
        found = read_pairs(WHOLE[:length])
    except InvalidReply:
        assert '"}' not in WHOLE[:length]
    else:
        assert found == PAIRS[: len(found)]


sentences = st.text(min_size=1).filter(str.strip)


@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4), st.booleans(), sentences, sentences)
def test_prose_around_json_changes_nothing(
    pairs: list[tuple[str, str]], ascii_only: bool, before: str, after: str
) -> None:
    value = {"pairs": [{"question": question, "answer": answer} for question, answer in pairs]}
    reply = json.dumps(value, ensure_ascii=ascii_only)
    quiet = str.maketrans(dict.fromkeys('{}[]"<', " "))
    assert read_pairs(f"{before.translate(quiet)}{reply}{after.translate(quiet)}") == read_strict(reply)


def test_plain_text_loses_only_its_thoughts() -> None:
    assert read_text("<think>A cat? Yes.</think>\n\nA cat. \n") == "A cat."
    with pytest.raises(InvalidReply, match="empty"):
        read_text(" \n")


@pytest.mark.parametrize(
    "reply",
    [
        "A red box.",
        "It may be red.</think>\n\nA red box.",
        "<|begin_of_box|>A red box.<|end_of_box|>",
        "**Caption:** A red box.",
        "Description: A red box.",
        '"A red box."',
        "“A red box.”",
    ],
)
def test_a_caption_without_what_stands_around_it(reply: str) -> None:
    assert read_text(reply) == "A red box."


@pytest.mark.parametrize("reply", ['"Stop" and "Go" are written here.', "“Stop” and “Go”"])
def test_quotes_within_a_text_stay(reply: str) -> None:
    assert read_text(reply) == reply


def test_many_openings_take_no_quadratic_time() -> None:
    with pytest.raises(InvalidReply):
        read_pairs("{" * (MAX_CHARACTERS - 1))
