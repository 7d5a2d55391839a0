from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dianjing.check.fixes import read_value
from dianjing.data import split as split_module
from dianjing.data.split import Chunk, Flaw, chunks, split

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(['"', "\\", "//", "[{", "}]", ",]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=20,
)


def elements(data: bytes, *, lines: bool = False) -> list[Any]:
    return [json.loads(data[one[0] : one[1]]) for one in split(data, lines=lines) if not isinstance(one, Flaw)]


def flaws(data: bytes) -> list[tuple[str, int]]:
    return [(one.code, one.offset) for one in split(data, lines=False) if isinstance(one, Flaw)]


@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 1, "\t"]), st.booleans())
def test_the_elements_are_those_of_the_list(values: list[Any], indent: Any, ascii_only: bool) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert elements(data) == values
    assert flaws(data) == []


@given(st.lists(VALUES, max_size=5))
def test_the_lines_are_the_records(values: list[Any]) -> None:
    assume(not (len(values) == 1 and isinstance(values[0], list) and values[0] and isinstance(values[0][0], dict)))
    data = "\n\n".join(json.dumps(value) for value in values).encode()
    assert elements(data, lines=True) == values


@given(st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=4))
def test_comments_and_commas_change_no_value(values: list[Any]) -> None:
    text = "".join(f"// a, [comment\n{json.dumps(value)} /* and ] another */,\n" for value in values)
    data = f"[{text}]".encode()
    assert elements(data) == values
    assert len(flaws(data)) == (2 * len(values) + 1 if values else 0)


def test_a_record_is_mended_where_it_stands() -> None:
    text = '{"a": "//no, ]", // yes\n "b": [1, 2, /* x */ ], }'
    value, changes = read_value(text)
    assert value == {"a": "//no, ]", "b": [1, 2]}
    assert [(change.code, text[change.offset]) for change in changes] == [
        ("json_comment", "/"),
        ("json_trailing_comma", ","),
        ("json_comment", "/"),
        ("json_trailing_comma", ","),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'[{"a": "x}, {"b": 2}]', [("json_unread", 1)]),
        (b"[{} {}]", [("json_syntax", 4)]),
        (b"[1, 2", [("json_syntax", 4)]),
        (b"[1] 2", [("json_unread", 4)]),
        (b'{"a": 1}\n{"a": 2}', [("json_not_a_list", 0)]),
        (b"\xef\xbb\xbf[1]", [("bom", 0)]),
        (b"\xff\xfe[\x001\x00]\x00", [("encoding_known", 0)]),
        (b"", []),
        (b"[}", [("json_syntax", 1)]),
    ],
)
def test_what_is_wrong_between_records(text: bytes, found: list[tuple[str, int]]) -> None:
    assert flaws(text) == found


def test_chunks_know_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "CHUNK_RECORDS", 3)
    data = json.dumps([{"number": number} for number in range(8)], indent=1).encode()
    found = [chunk for chunk in chunks(data, lines=False) if isinstance(chunk, Chunk)]
    assert [(chunk.first_record, len(chunk.elements)) for chunk in found] == [(0, 3), (3, 3), (6, 2)]
    for chunk in found:
        assert chunk.first_line == data[: chunk.start].count(b"\n") + 1


def test_a_hundred_megabytes_of_one_string_are_passed_over() -> None:
    data = b'["' + b"x" * 100_000_000 + b'", {"a": 1}]'
    first, second = (one for one in split(data, lines=False) if not isinstance(one, Flaw))
    assert first == (1, 100_000_003)
    assert data[slice(*second)] == b'{"a": 1}'


@pytest.mark.timeout(20)
def test_what_is_nested_or_commented_without_end_is_given_up() -> None:
    for text, code in (
        (b"[" * 30_000_000, "json_unread"),
        (b"[" + b"/**/" * 1_000_000 + b"]", "json_unread"),
        (b"[1 /" + b" /" * 2_000_000, "json_syntax"),
    ):
        found = [one[0].code for one in chunks(text, lines=False) if isinstance(one, tuple)]
        assert found[-1] == code
        assert len(found) <= 1002


def test_columns_of_many_flaws() -> None:
    text = "[ /*\u00e9*/ 1, /**/ 2,\n\n  // x\n 3 /**/ /**/]".encode()
    found = [one[1:] for one in chunks(text, lines=False) if isinstance(one, tuple)]
    assert found == [(1, 3), (1, 12), (3, 3)]


def test_a_record_of_comments_alone_is_not_mended() -> None:
    with pytest.raises(ValueError, match="more than 1,000 comments"):
        read_value("[1" + "/**/" * 5000 + "]")
