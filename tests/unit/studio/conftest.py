"""A studio behind a real socket, on records with friendly and hostile pictures."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from dianjing.serve.page import PageGuard
from dianjing.serve.server import open_port
from dianjing.studio.app import build_app
from dianjing.studio.models import Models
from dianjing.studio.runs import Runs
from dianjing.studio.session import ReviewSession
from dianjing.studio.studio import Studio
from tests.tiny import TinyDataset, tiny_records

TOKEN = "token"
HOSTILE = (
    "../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:1/a.png",
    "http://169.254.169.254/latest",
    "data:image/png;base64,AAAA",
    "link.png",
    "a\0.png",
    "sub/../../secret.png",
)
"""Each stands in a record; "link.png" and the last one lead to a readable picture outside the folder."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def value(self) -> Any:
        return json.loads(self.content)


@dataclass(frozen=True)
class Served:
    """A studio that listens, and the folder it was started on."""

    studio: Studio
    port: int
    folder: Path

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        method: str = "",
        prefix: str = f"/{TOKEN}",
    ) -> Answer:
        """Send one request, its path as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            kind = {"content-type": "application/json"} if data is not None else {}
            connection.putrequest(method or ("GET" if data is None else "POST"), prefix + path, skip_host=True)
            given = {"host": f"127.0.0.1:{self.port}", **kind, **(headers or {})}
            for name, value in {**given, **({"content-length": str(len(data))} if data is not None else {})}.items():
                connection.putheader(name, value)
            connection.endheaders(data)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


@pytest.fixture
def served(tiny_dataset: TinyDataset, tmp_path: Path) -> Iterator[Served]:
    """Return a running studio on the tiny records, and after them one record for each hostile picture."""
    folder = tmp_path / "project"
    images = folder / "images"
    shutil.copytree(tiny_dataset.images, images)
    shutil.copy(tiny_dataset.images / "wide.png", tmp_path / "secret.png")
    shutil.copy(tiny_dataset.images / "wide.png", folder / "secret.png")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    hostile = [{"id": f"h{i}", "image": name, "conversations": talk} for i, name in enumerate(HOSTILE)]
    data = folder / "data.json"
    data.write_text(json.dumps([*tiny_records(), *hostile]), encoding="utf-8")
    session = ReviewSession(data, str(images))
    studio = Studio(folder=folder, runs=Runs(folder, str(images)), models=Models(), session=session)
    with open_port(0) as listening:
        port = listening.getsockname()[1]
        app = PageGuard(app=build_app(studio), port=port, token=TOKEN)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Served(studio, port, folder)
        finally:
            server.should_exit = True
            thread.join()
            studio.close()
