"""A batch: requests out, results in, and the same records as from calls."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dianjing.make import batch
from tests.chaos.conftest import Maker
from tests.chaos.endpoint import Endpoint, pairs_about


def result(line: dict[str, Any], text: str, status: int = 200) -> str:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 20}, "model": "hostile-1"}
    return json.dumps(
        {"custom_id": line["custom_id"], "response": {"status_code": status, "body": body}, "error": None}
    )


def digest(line: dict[str, Any]) -> str:
    import hashlib

    uri = line["body"]["messages"][0]["content"][0]["image_url"]["url"]
    return hashlib.sha256(uri.encode()).hexdigest()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_gives_the_records_that_calls_give(make: Maker, tmp_path: Path) -> None:
    make.pictures(6)
    called = tmp_path / "called" / "data.json"
    with Endpoint() as endpoint:
        assert make(endpoint, out=called) == 0
        bodies = [hit.body for hit in endpoint.hits]
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    assert make(None, "--batch-out", str(requests)) == 0
    lines = read(requests)
    assert {line["method"] for line in lines} == {"POST"}
    assert {line["url"] for line in lines} == {"/v1/chat/completions"}
    assert all(len(line["custom_id"]) <= 64 for line in lines)
    assert sorted(map(str, (line["body"] for line in lines))) == sorted(map(str, bodies))
    random.Random(0).shuffle(lines)
    results.write_text("\n".join(result(line, pairs_about(digest(line))) for line in lines))
    assert make(None, "--batch-in", str(results)) == 0
    assert make.out.read_bytes() == called.read_bytes()


def test_what_a_batch_left_open_is_asked_again(make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(5)
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    make(None, "--batch-out", str(requests))
    lines = read(requests)
    answers = [
        result(lines[0], pairs_about(digest(lines[0]))),
        result(lines[1], "no JSON"),
        result(lines[2], "", status=500),
        json.dumps({"custom_id": lines[3]["custom_id"], "response": None, "error": {"message": "expired"}}),
        result({"custom_id": "0" * 64}, "x"),
    ]
    results.write_text("\n".join(answers))
    assert make(None, "--batch-in", str(results)) == 1
    assert "1 ok, 1 invalid, 2 failed, 1 of another plan" in capsys.readouterr().out
    assert make(None, "--batch-in", str(results)) == 1
    assert "2 already in the journal, 2 failed, 1 of another plan" in capsys.readouterr().out
    assert len(make.records) == 1
    with Endpoint() as endpoint:
        assert make(endpoint) == 0
        assert len(endpoint.hits) == 4
        assert sum(hit.again for hit in endpoint.hits) == 1
    assert len(make.records) == 5


def test_a_batch_is_divided_where_the_api_wants_it(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make.pictures(5)
    monkeypatch.setattr(batch, "FILE_REQUESTS", 2)
    out = tmp_path / "requests.jsonl"
    assert make(None, "--batch-out", str(out)) == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    assert [file.name for file in files] == ["requests.jsonl", "requests_2.jsonl", "requests_3.jsonl"]
    assert len({line["custom_id"] for file in files for line in read(file)}) == 5
    assert make(None, "--batch-out", str(out)) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"id": 1}', '{"custom_id": "a", "response": 3}'])
def test_a_file_that_is_no_result_is_named(
    make: Maker, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make.pictures(1)
    (tmp_path / "results.jsonl").write_text(content)
    assert make(None, "--batch-in", str(tmp_path / "results.jsonl")) == 2
    assert "results.jsonl: line 1 is not a batch result" in capsys.readouterr().err
