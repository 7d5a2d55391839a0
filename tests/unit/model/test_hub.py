"""Models by their name on the hub: from the cache, from a hub on this machine, or one clear error."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dianjing.errors import ModelError
from dianjing.model.folders import resolve
from dianjing.model.hub import _wanted, hub_folder, is_hub_name

NAME = "acme/tiny-llm"
COMMIT = "a" * 40


@pytest.mark.parametrize("name", ["internlm/internlm2-chat-1_8b", "Qwen/Qwen2.5-0.5B", NAME])
def test_owner_and_name_is_of_the_hub(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "path",
    ["./acme/model", "../model", "~/model", "/models/llm", "a/b/c", "model", "acme/", "/acme", "acme/my model", ""],
)
def test_anything_else_is_a_path(path: str) -> None:
    assert not is_hub_name(path)
    with pytest.raises(ModelError, match=r"no such language model folder; give a folder on this machine, a model of"):
        resolve(path or "nowhere", "language_model")


def test_a_path_into_a_folder_that_is_here_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not is_hub_name("runs/first")
    (tmp_path / "runs" / "first").mkdir()
    assert resolve("runs/first", "language_model") == Path("runs/first")


def test_only_data_is_fetched_and_one_kind_of_weights() -> None:
    data = ["config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    other = [
        "modeling_internlm2.py",
        "README.md",
        "flax_model.msgpack",
        "training_args.bin",
        "onnx/config.json",
        "run.sh",
    ]
    safe = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    pickled = ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"]
    assert _wanted([*data, *other, *safe, *pickled, "consolidated.safetensors"], weights=True) == [*data, *safe]
    assert _wanted([*data, *other, *pickled], weights=True) == [*data, *pickled]
    assert _wanted([*data, *safe[1:], *pickled], weights=False) == data


def cached(home: Path, source: Path) -> Path:
    """Put a model into a hub cache as huggingface_hub lays it out."""
    repository = home / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(source, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_a_model_in_the_cache_is_read_there(home: Path, tiny_llm: Path) -> None:
    snapshot = cached(home, tiny_llm)
    assert resolve(NAME, "language_model").samefile(snapshot)


def test_half_a_model_in_the_cache_is_not_taken(home: Path, tiny_llm: Path) -> None:
    snapshot = cached(home, tiny_llm)
    (snapshot / "model.safetensors").unlink()
    assert hub_folder(NAME, weights=False).samefile(snapshot)
    for index in (None, {"weight_map": {"a": "model-00001-of-00001.safetensors"}}):
        if index:
            (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=f"{NAME}: no such folder, and no such model in the hub's cache"):
            hub_folder(NAME)


class Hub(BaseHTTPRequestHandler):
    """One model, served as the hub does."""

    folder: Path
    requests: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.requests.append(path)
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        sums = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        api, resolved = f"/api/models/{NAME}", f"/{NAME}/resolve/"
        if path.startswith(f"{api}/tree/"):
            tree = [{"type": "file", "path": n, "size": len(files[n]), "oid": sums[n]} for n in files]
            self._answer(200, json.dumps(tree).encode())
        elif path in (api, f"{api}/revision/main"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            self._answer(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(resolved) and (name := path.rpartition("/")[-1]) in files:
            self._answer(200, files[name], {"ETag": f'"{sums[name]}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tiny_llm: Path, tmp_path: Path) -> Iterator[type[Hub]]:
    """A hub on this machine; its model also has code, and weights of both kinds."""
    folder = Path(shutil.copytree(tiny_llm, tmp_path / "served"))
    (folder / "modeling_trap.py").write_text("raise SystemExit('code of a model folder was run')")
    (folder / "pytorch_model.bin").write_bytes(b"not to be fetched")
    served = type("Served", (Hub,), {"folder": folder, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), served)
    served.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


def show(home: Path, hub: type[Hub], llm: str, *verb: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line where the hub is this one."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DIANJING_"))}
    given |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    (home / "data.json").write_text(
        json.dumps(
            [{"id": "a", "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}]
        )
    )
    arguments = verb or ("show", str(home / "data.json"), "--json", "--llm")
    return subprocess.run(
        [sys.executable, "-m", "dianjing", *arguments, llm],
        env=given,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_a_model_of_the_hub_is_downloaded_in_the_open_and_once(tmp_path: Path, hub: type[Hub]) -> None:
    snapshot = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    first = show(tmp_path, hub, NAME)
    assert first.returncode == 0, first.stderr
    assert f"downloading {NAME} (" in first.stderr
    assert not any(path.suffix in (".safetensors", ".bin", ".py") for path in snapshot.iterdir())
    assert len(first.stdout.splitlines()) == 1
    asked = len(hub.requests)
    again = show(tmp_path, hub, NAME, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert len(hub.requests) == asked

    talk = show(tmp_path, hub, NAME, "chat")
    assert talk.returncode == 0, talk.stderr
    assert f"downloading {NAME} (" in talk.stderr
    names = {path.name for path in snapshot.iterdir()}
    assert "model.safetensors" in names
    assert not names & {"modeling_trap.py", "pytorch_model.bin"}


def test_what_the_hub_has_not_is_one_error_and_a_folder_asks_it_nothing(
    tmp_path: Path, hub: type[Hub], tiny_llm: Path
) -> None:
    local = show(tmp_path, hub, str(tiny_llm))
    assert (local.returncode, hub.requests) == (0, [])
    unknown = show(tmp_path, hub, "acme/nothing")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: acme/nothing: no such folder, and the hub does not give it: there is none")
    assert "Traceback" not in unknown.stderr
    unreachable = show(tmp_path, hub, "acme/nothing", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 2
    assert "check the network" in unreachable.stderr
    offline = show(tmp_path, hub, "acme/nothing", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "hf download acme/nothing" in offline.stderr
