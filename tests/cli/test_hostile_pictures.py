"""Whatever a record names as its picture, no verb opens a file outside the folder, or an address."""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from dianjing.cli.main import main
from dianjing.config.load import save_recipe
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model, picture, write_run

NAMES = (
    "../secret.png",
    "inside/../../secret.png",
    "SECRET",
    "out.png",
    "away/secret.png",
    "file://SECRET",
    "http://127.0.0.1:9/a.png",
    "https://169.254.169.254/latest",
    "data:image/png;base64,AAAA",
    "~/secret.png",
    "pipe.png",
    "bomb.png",
)
_seen: list[str] = []
_watching = False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str | bytes):
        _seen.append(os.path.realpath(os.fsdecode(arguments[0])))
    elif _watching and event == "socket.connect":
        _seen.append(f"{event} {arguments[1]}")


sys.addaudithook(_note)


def bomb(side: int) -> bytes:
    """Return a PNG of a few bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a data file beside a secret picture; its pictures lie in `images`."""
    images = tmp_path / "images"
    (images / "inside").mkdir(parents=True)
    picture(30, 20).save(tmp_path / "secret.png")
    (images / "out.png").symlink_to(tmp_path / "secret.png")
    (images / "away").symlink_to(tmp_path)
    os.mkfifo(images / "pipe.png")
    (images / "bomb.png").write_bytes(bomb(40_000))
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    names = [name.replace("SECRET", str(tmp_path / "secret.png")) for name in NAMES]
    records = [{"id": f"n{i}", "image": name, "conversations": said} for i, name in enumerate(names)]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path / "data.json"


@pytest.mark.parametrize("verb", ["show", "train", "eval", "compare", "check"])
def test_no_verb_opens_what_a_record_must_not_name(
    verb: str, data: Path, make_recipe: MakeRecipe, tiny_llm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, images = data.parent, data.parent / "images"
    recipe = make_recipe(data={"path": str(data), "images": str(images)})
    save_recipe(recipe, folder / "run.toml")
    run = write_run(recipe, loaded_model(recipe)) if verb in ("eval", "compare") else folder
    arguments = {
        "show": ["show", data, "--images", images, "--llm", tiny_llm],
        "train": ["train", folder / "run.toml", "--output", folder / "new"],
        "eval": ["eval", run, data, "--images", images],
        "compare": ["compare", run, "--data", data, "--images", images, "--out", folder / "page.html"],
        "check": ["check", data, "--images", images, "--json"],
    }[verb]
    secret = str(folder / "secret.png")
    opened = _watched([str(argument) for argument in arguments], code=1 if verb == "check" else 2)
    assert str(data) in opened, "the hook sees nothing"
    assert secret not in opened
    assert not [one for one in opened if one.startswith("socket")]
    shown = capsys.readouterr()
    said = shown.out + shown.err
    assert "Traceback" not in said
    for number in range(len(NAMES)):
        assert f'n{number}"' in said, "each is named"
    assert not (folder / "page.html").exists()
    assert not (folder / "new").exists()


def _watched(arguments: list[str], code: int) -> list[str]:
    global _watching
    _seen.clear()
    _watching = True
    try:
        assert main(arguments) == code
    finally:
        _watching = False
    return [*_seen]
