"""Making records in this process, from an endpoint that misbehaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dianjing.cli.main import main
from tests.chaos.endpoint import Endpoint
from tests.chaos.pictures import write_pictures

pytest.importorskip("openai", reason="dianjing make needs openai: pip install openai")


class Maker:
    """Runs `dianjing make` on a few pictures; reads what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.images, self.out = folder / "images", folder / "data.json"

    def pictures(self, number: int) -> list[str]:
        """Write the pictures and return their names."""
        return write_pictures(self.images, number)

    def __call__(self, endpoint: Endpoint | None, *flags: str, out: Path | None = None) -> int:
        """Return the exit code."""
        where = ["--base-url", endpoint.url] if endpoint else []
        return main(["make", str(self.images), "--out", str(out or self.out), "--model", "m", *where, *flags])

    @property
    def records(self) -> list[dict[str, Any]]:
        return json.loads(self.out.read_text(encoding="utf-8"))

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.out.with_name("data.report.json").read_text(encoding="utf-8"))

    @property
    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.with_name("data.journal.jsonl").read_text().splitlines()]

    def statuses(self) -> list[str]:
        """Return the outcomes in the journal."""
        return [line["status"] for line in self.journal if line.get("status") not in (None, "sent")]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """A maker whose retries do not wait long."""
    monkeypatch.setattr("dianjing.make.send.RETRY_SECONDS", 0.01)
    for name in ("OPENAI_API_KEY", "DIANJING_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return Maker(tmp_path)
