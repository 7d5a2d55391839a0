"""A proposal is what `dianjing make` would have written: same question, same rules, same journal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dianjing.cli import main
from dianjing.errors import DataError
from dianjing.make.journal import Journal
from dianjing.studio.propose import Proposer
from tests.chaos.endpoint import Behaviour, Endpoint, good
from tests.tiny import TinyDataset

pytest.importorskip("openai", reason="asking an endpoint needs openai: pip install openai")


def proposer(images: Path, journal: Path, endpoint: Endpoint) -> Proposer:
    return Proposer(
        root=str(images), journal=journal, base_url=endpoint.url, model="m", max_tokens=1024, timeout_seconds=20.0
    )


def test_it_is_what_make_writes(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "wide.png").write_bytes((tiny_dataset.images / "wide.png").read_bytes())
    with Endpoint() as endpoint:
        proposal = proposer(tiny_dataset.images, tmp_path / "p.journal.jsonl", endpoint).propose(
            "wide.png", "conversation_zh"
        )
        flags = ["--model", "m", "--base-url", endpoint.url, "--prompts", "conversation_zh", "--language", "zh"]
        assert main.main(["make", str(tmp_path / "photos"), "--out", str(tmp_path / "data.json"), *flags]) == 0
    made = json.loads((tmp_path / "data.json").read_text("utf-8"))
    assert proposal.conversations == made[0]["conversations"]
    first, *_, second = endpoint.hits
    assert first.body == second.body
    assert proposal.calls == 1
    # The journal is one that `make` reads, with the same key.
    ours, theirs = Journal(tmp_path / "p.journal.jsonl"), Journal(tmp_path / "data.journal.jsonl")
    ours.read()
    theirs.read()
    assert ours.entries == theirs.entries


def test_what_was_asked_is_not_asked_again(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    with Endpoint() as endpoint:
        asking = proposer(tiny_dataset.images, tmp_path / "j", endpoint)
        first = asking.propose("wide.png", "caption_en")
        assert len(endpoint.hits) == 1
        again = asking.propose("wide.png", "caption_en")
        assert len(endpoint.hits) == 1
        assert (again.conversations, again.calls) == (first.conversations, 0)
        asking.propose("wide.png", "description_en")
        asking.propose("tall.jpg", "caption_en")
        assert len(endpoint.hits) == 3


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (lambda hit: "refusal_text", "refusal"),
        (lambda hit: "error_401", "refuses the key"),
        (lambda hit: "wrong_schema", "pairs"),
        (lambda hit: "error_400", "I do not like this picture"),
    ],
    ids=["refusal", "key", "schema", "status"],
)
def test_what_cannot_be_used_is_said(
    tiny_dataset: TinyDataset, tmp_path: Path, behaviour: Behaviour, reason: str
) -> None:
    with Endpoint(behaviour) as endpoint:
        asking = proposer(tiny_dataset.images, tmp_path / "j", endpoint)
        with pytest.raises(DataError, match=reason):
            asking.propose("wide.png", "conversation_en")


def test_the_key_stays_secret(tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIANJING_API_KEY", "sk-very-secret-123")
    with Endpoint(lambda hit: "error_401") as endpoint:
        asking = proposer(tiny_dataset.images, tmp_path / "j", endpoint)
        with pytest.raises(DataError) as error:
            asking.propose("wide.png", "conversation_en")
        assert endpoint.hits[0].authorization == "Bearer sk-very-secret-123"
    assert "very-secret" not in str(error.value) + (tmp_path / "j").read_text()


def test_a_picture_outside_is_not_sent(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    with Endpoint(good) as endpoint:
        for name in ("../data.json", "/etc/passwd", "file:///etc/passwd", "https://10.0.0.1/a.png"):
            with pytest.raises(DataError):
                proposer(tiny_dataset.images, tmp_path / "j", endpoint).propose(name, "caption_en")
        assert not endpoint.hits
