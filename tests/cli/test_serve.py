"""`dianjing serve` in a process of its own: it answers as the run does, and opens nothing that a request names."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dianjing.cli.main import main
from dianjing.config.schema import DataConfig, LanguageModelConfig, Recipe, TrainConfig, VisionTowerConfig
from dianjing.infer.generate import generate
from dianjing.infer.load import load_for_use
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model, picture, write_run
from tests.tiny import TinyDataset

needs_server = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
    reason="needs the extra serve: pip install 'dianjing[serve]'",
)

WATCHED = """
import sys
secret, log, *arguments = sys.argv[1:]
def hook(event, given):
    if event == "open" and str(given[0]) == secret:
        with open(log, "a") as file:
            file.write("opened\\n")
sys.addaudithook(hook)
open(secret, "rb").close()
from dianjing.cli.main import main
sys.exit(main(arguments))
"""
"""Runs a verb and notes each time the process opens a file; it opens it once itself."""


@dataclass
class Server:
    """A process that serves, and what it said."""

    process: subprocess.Popen[bytes]
    port: int
    said: str
    run: Path
    secret: Path
    opened: Path

    def post(self, body: dict[str, Any]) -> tuple[int, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read().decode()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    recipe = Recipe(
        stage="pretrain",
        output=str(folder / "my run"),
        language_model=LanguageModelConfig(folder=str(tiny_llm), template="internlm2_chat"),
        vision_tower=VisionTowerConfig(folder=str(tiny_clip)),
        data=DataConfig(path=str(tiny_dataset.path), images=str(tiny_dataset.images)),
        train=TrainConfig(precision="fp32"),
    )
    run = write_run(recipe, loaded_model(recipe))
    secret = folder / "secret.png"
    picture(8, 8).save(secret)
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    with open(folder / "said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, str(secret), str(folder / "opened"), "serve", str(run), "--port", "0"],
            stdout=said,
            stderr=said,
            env=environment,
        )
    try:
        while "-d @-" not in (text := (folder / "said").read_text()):
            assert process.poll() is None, text
            threading.Event().wait(0.1)
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1 ", text)
        assert found
        yield Server(process, int(found[1]), text, run, secret, folder / "opened")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert "Traceback" not in (folder / "said").read_text()
        assert "stopped" in (folder / "said").read_text()
    finally:
        process.kill()


def photo(seed: int = 3) -> tuple[Any, str]:
    image = picture(40, 18, seed)
    file = io.BytesIO()
    image.save(file, "PNG")
    return image, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def question(url: Any, text: str = "What colour is it?", **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": "my run", "messages": [{"role": "user", "content": parts}], "max_tokens": 8, **fields}


@needs_server
def test_it_answers_as_the_run_does(server: Server) -> None:
    image, url = photo()
    (expected,) = generate(load_for_use(str(server.run), "cpu"), [((), "<image>\nWhat colour is it?", [image])], 8)
    status, text = server.post(question(url))
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"].strip() == expected
    status, text = server.post(question(url, stream=True))
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
    # A character that is not whole at the end is sent as such by the one, and not at all by the other.
    assert "".join(pieces).strip().rstrip("\ufffd") == expected.rstrip("\ufffd")


@needs_server
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_printed_example_works(server: Server, tmp_path: Path) -> None:
    picture(20, 30).save(tmp_path / "photo.jpg")
    command = server.said[server.said.index("printf ") :]
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


@needs_server
def test_what_a_request_takes_is_counted_as_the_server_counts_it(server: Server) -> None:
    status, text = server.post(question(photo()[1], stop=["zzz"], seed=3, temperature=0.5, top_p=0.9))
    assert status == 200
    taken = json.loads(text)["usage"]["prompt_tokens"]
    status, text = server.post(question(photo()[1], max_tokens=10**12))
    assert status == 400
    assert f"the messages take {taken} of the model's 512 positions" in json.loads(text)["error"]["message"]
    assert f"ask for at most {512 - taken}" in json.loads(text)["error"]["message"]
    status, text = server.post(question(photo()[1], "word " * 200_000))
    assert (status, "512 positions" in text) == (400, True)


@needs_server
def test_nothing_that_a_request_names_is_opened(server: Server) -> None:
    visits: list[str] = []

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            visits.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"file://{server.secret}")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Redirect) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{other.server_port}/x.png"
        for url in (str(server.secret), f"file://{server.secret}", "/etc/passwd", "file:///etc/passwd", address):
            status, text = server.post(question(url))
            assert status == 400
            assert "inside the request" in json.loads(text)["error"]["message"]
        other.shutdown()
    assert not visits
    assert server.post(question(photo()[1], model=str(server.run)))[0] == 404
    assert server.opened.read_text() == "opened\n"


def test_gguf_files_are_for_llama_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.gguf").touch()
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert f"llama-server -m {tmp_path / 'text.gguf'} --mmproj {tmp_path / 'mmproj.gguf'} --jinja" in said


def test_what_cannot_be_served(tmp_path: Path, tiny_llm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (tmp_path, tmp_path / "nowhere", tiny_llm):
        assert main(["serve", str(model), "--port", "0"]) == 2
        assert "dianjing export" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("vllm") is not None, reason="vLLM is installed")
def test_vllm_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path), "--backend", "vllm"]) == 2
    assert "pip install vllm" in capsys.readouterr().err


def test_vllm_gets_the_folder_and_the_key(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program named vllm stands for vLLM."""
    recipe = make_recipe()
    run = write_run(recipe, loaded_model(recipe))
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@ key=$VLLM_API_KEY" > {tmp_path}/called\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DIANJING_SERVE_KEY", "open sesame")
    assert main(["serve", str(run), "--backend", "vllm", "--port", "0"]) == 3
    called = (tmp_path / "called").read_text()
    assert called.startswith(f"serve {tmp_path}/cache/dianjing/serve/")
    assert called.strip().endswith("key=open sesame")
