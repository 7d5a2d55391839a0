from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dianjing.eval.sight import digests, other_pictures
from dianjing.infer.questions import Question


def asked(*names: str) -> Question:
    return Question(id="r", turn=0, type="t", text="<image>\n" * len(names) + "?", images=names, reference="x")


names = st.lists(st.sampled_from("abcdef"), max_size=3).map(tuple)


@given(st.lists(names, max_size=12))
def test_no_question_gets_its_own_picture(images: list[tuple[str, ...]]) -> None:
    questions = [asked(*own) for own in images]
    pictures = {name for own in images for name in own}
    others = other_pictures(questions, {name: name for name in "abcdef"})
    for own, other in zip(images, others, strict=True):
        if not own or pictures == set(own):
            assert other is None
        else:
            assert other is not None
            assert len(other) == len(own)
            assert not set(other) & set(own)
            assert set(other) <= pictures


@given(st.permutations("abcde"))
def test_one_picture_a_question_is_a_derangement_whatever_the_order(order: list[str]) -> None:
    others = other_pictures([asked(name) for name in order], {name: f"digest-{name}" for name in "abcde"})
    assert Counter(others) == Counter((name,) for name in "abcde")
    assert dict(zip(order, others, strict=True)) == {
        "a": ("b",),
        "b": ("c",),
        "c": ("d",),
        "d": ("e",),
        "e": ("a",),
    }


def test_one_picture_under_two_names_is_not_another_picture(tmp_path: Path) -> None:
    for name, content in {"a.png": b"one", "copy.png": b"one", "b.png": b"two"}.items():
        (tmp_path / name).write_bytes(content)
    digest_of = digests(["a.png", "copy.png", "b.png"], str(tmp_path))
    questions = [asked("a.png"), asked("copy.png"), asked("b.png")]
    assert other_pictures(questions, digest_of)[:2] == [("b.png",), ("b.png",)]
    assert other_pictures(questions[:2], digest_of) == [None, None]
