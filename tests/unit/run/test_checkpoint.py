from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dianjing.errors import CheckpointError
from dianjing.run import checkpoint as module
from dianjing.run.checkpoint import damage, newest, read_state, require_space, save
from dianjing.run.layout import TRAINABLE, checkpoints
from dianjing.run.state import TrainState


def state_of(step: int) -> TrainState:
    return TrainState(
        step=step, epoch=0, samples_seen=step, total_steps=99, recipe={"seed": 0}, data={"fingerprint": "é"}
    )


def save_step(run: Path, step: int, *, keep: int = 2, numbers: int = 8) -> Path:
    weights = {"a": torch.full((numbers,), float(step)), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    return save(run, weights, {"a/exp_avg": torch.ones(numbers)}, state_of(step), keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = save_step(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step-000007" == newest(tmp_path)
    assert read_state(path) == state_of(7)
    assert load_file(path / TRAINABLE)["a"].tolist() == [7.0] * 8
    assert not damage(path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        save_step(tmp_path, step)
    assert names(tmp_path) == ["step-000010", "step-000100"]


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save_step(tmp_path, step)
    assert newest(tmp_path).name == "step-1000000"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


FILES = [TRAINABLE, "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("fault", [flip, empty, cut, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, name: str, fault: Callable) -> None:
    save_step(tmp_path, 1)
    fault(save_step(tmp_path, 2) / name)
    told: list[str] = []
    assert newest(tmp_path, told.append).name == "step-000001"
    (text,) = told
    assert "step-000002" in text
    assert name in text
    assert "using step-000001" in text


def test_the_manifest_must_name_all_files(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (path / "manifest.json").write_text(json.dumps({"step": 1, "files": {}}))
    assert damage(path) == "manifest.json does not name all files"


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint in it"):
        newest(tmp_path)
    empty(save_step(tmp_path, 1) / TRAINABLE)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint is whole.*step-000001: trainable.safetensors has 0"):
        newest(tmp_path)


def test_after_a_walk_back_the_damaged_ones_go_and_the_good_stay(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    empty(save_step(tmp_path, 3) / TRAINABLE)
    save_step(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-000002"]
    assert newest(tmp_path).name == "step-000002"


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    empty(save_step(tmp_path, 2) / TRAINABLE)
    save_step(tmp_path, 2)
    assert newest(tmp_path).name == "step-000002"


@pytest.mark.parametrize("call", ["save_file", "_digest", "_flush"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    save_step(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / "step-000001").iterdir()}
    calls = iter(range(1, 99))
    real = getattr(module, call)

    def fail(*arguments: Any) -> Any:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(module, call, fail)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room") as error:
        save_step(tmp_path, 2)
    assert error.value.exit_code == 2
    assert names(tmp_path) == ["step-000001"]
    assert {path.name: path.read_bytes() for path in newest(tmp_path).iterdir()} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_is_seen_before_anything_is_written(small_disk: Path) -> None:
    save_step(small_disk, 1)
    with pytest.raises(CheckpointError, match=r"880,\d\d\d bytes are needed for checkpoints, but only \d+,\d+ are"):
        save_step(small_disk, 2, numbers=100_000)
    assert newest(small_disk).name == "step-000001"


def test_a_disk_that_fills_up_while_saving(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(small_disk, 1)
    monkeypatch.setattr(module, "require_space", lambda *_: None)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_step(small_disk, 2, numbers=100_000)
    assert names(small_disk) == ["step-000001"]
    save_step(small_disk, 2)
    assert newest(small_disk).name == "step-000002"


def test_room_is_asked_for_with_a_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2000, 900, 1100))
    require_space(tmp_path, 1000)
    with pytest.raises(CheckpointError, match="1,101 bytes are needed for checkpoints, but only 1,100 are free"):
        require_space(tmp_path, 1001)


def in_a_child(work: Callable[[], object]) -> int:
    """Do something in a forked process, which starts in no time; return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, work: Callable[[], object]) -> None:
    """Do something, killed with -9 as it is about to open, make, move, list or remove its `number`-th file."""
    calls = iter(range(1, 10_000))

    def hear(event: str, _: object) -> None:
        touches_files = event == "open" or event.startswith(("os.", "shutil.", "pathlib."))
        if touches_files and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)
    work()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("keep", [1, 2])
def test_kill_9_at_every_point_of_saving(tmp_path: Path, keep: int) -> None:
    """The newest checkpoint is then the old one or the new one, whole, with nothing to pass over."""
    steps_found = []
    for number in range(1, 1000):
        run = tmp_path / str(number)
        for step in (1, 2):
            save_step(run, step, keep=keep)
        status = in_a_child(lambda: killed_at(number, lambda: save_step(run, 3, keep=keep)))  # noqa: B023
        told: list[str] = []
        steps_found.append(int(newest(run, told.append).name[5:]))
        assert not told
        save_step(run, 4, keep=keep)
        assert names(run) == [f"step-{step:06d}" for step in ([4] if keep == 1 else [steps_found[-1], 4])]
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert steps_found == sorted(steps_found)
    assert steps_found.count(2) > 10
    assert steps_found.count(3) > 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_kill_9_at_any_time_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(8):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                start = max([int(path.name[5:]) for path in checkpoints(tmp_path)], default=0)
                for step in range(start + 1, start + 100_000):
                    save_step(tmp_path, step, numbers=200_000)
                    os.write(write, f"{step}\n".encode())
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as acknowledged:
            first = acknowledged.readline()
            time.sleep(rng.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            last = int([first, *acknowledged.read().splitlines()][-1])
        told: list[str] = []
        found = newest(tmp_path, told.append)
        assert not told
        assert int(found.name[5:]) >= last
        assert load_file(found / TRAINABLE)["a"][0] == int(found.name[5:])
