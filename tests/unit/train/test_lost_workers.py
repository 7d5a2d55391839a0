"""Loader processes that are killed or hang, and signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dianjing.data import workers
from dianjing.data.workers import lost_workers_explained
from dianjing.errors import TrainError
from dianjing.run.checkpoint import newest, read_state
from dianjing.run.layout import checkpoints
from dianjing.train.interrupt import Interrupt
from dianjing.train.loop import train


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", r"was killed \(Killed\); was memory enough"),
        ("DataLoader worker (pid(s) 1, 2) exited unexpectedly", "a process that reads pictures ended"),
    ],
)
def test_what_torch_says_of_its_workers_becomes_a_sentence(said: str, words: str) -> None:
    with pytest.raises(TrainError, match=f"{words}.*--resume goes on"), lost_workers_explained():
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="something else"), lost_workers_explained():
        raise RuntimeError("something else")


def children() -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_ends_the_run_which_can_be_resumed(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(workers, "WORKER_SECONDS", 3)
    recipe = make_recipe(train={"epochs": 300, "save_every": 5}, data={"workers": 1})
    run = Path(recipe.output)
    before = {*children()}

    def strike() -> None:
        while not checkpoints(run):
            time.sleep(0.005)
        for child in {*children()} - before:
            os.kill(child, number)

    thread = threading.Thread(target=strike)
    thread.start()
    began = time.monotonic()
    with pytest.raises(TrainError, match="--resume goes on from the last checkpoint"):
        train(recipe, quiet=True)
    thread.join()
    assert time.monotonic() - began < 60
    assert 0 < read_state(newest(run)).step < 600


def test_a_hang_up_stops_a_run_but_not_under_nohup() -> None:
    with Interrupt(quiet=True) as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
    assert interrupt.number == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(quiet=True) as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.number
    finally:
        signal.signal(signal.SIGHUP, before)
