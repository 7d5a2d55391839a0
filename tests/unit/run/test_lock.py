"""One writer for each run: the second is refused by name, a dead one is in nobody's way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dianjing.errors import ConfigError
from dianjing.run import lock as module
from dianjing.run.lock import locked, require_no_writer

HOLD = """
import sys
from pathlib import Path
from dianjing.run.lock import locked
with locked(Path(sys.argv[1]), print):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer(run: Path) -> Generator[subprocess.Popen[str]]:
    """Start a process that has the run locked until it is killed or its input ends."""
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield process


def test_a_second_writer_is_refused_and_both_process_and_host_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with writer(run) as process:
        wanted = f"{run}: process {process.pid} on {socket.gethostname()} is writing this run; stop it or wait"
        for attempt in (lambda: require_no_writer(run), lambda: locked(run, print).__enter__()):
            with pytest.raises(ConfigError) as error:
                attempt()
            assert str(error.value).startswith(wanted)
    assert not run.exists(), "nothing was written, so nothing stays"
    require_no_writer(run)


def test_a_killed_writer_is_in_nobodys_way(tmp_path: Path) -> None:
    with writer(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "run.lock").exists()
    require_no_writer(tmp_path)
    with locked(tmp_path, print):
        assert f"process {os.getpid()} on " in (tmp_path / "run.lock").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_that_outlives_the_writer_does_not_keep_the_lock(tmp_path: Path) -> None:
    asked, answered = os.pipe()
    with locked(tmp_path, print):
        child = os.fork()
        if child == 0:
            os.close(answered)
            os.read(asked, 1)
            os._exit(0)
    with locked(tmp_path, print):
        pass
    os.close(answered)
    os.waitpid(child, 0)
    os.close(asked)


def test_the_lock_of_a_removed_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its opening and its locking, the last writer may remove the file: then it is made again."""
    real, removed = module.try_lock, []

    def late(descriptor: int) -> bool:
        if not removed:
            removed.append(descriptor)
            (tmp_path / "run.lock").unlink()
        return real(descriptor)

    monkeypatch.setattr(module, "try_lock", late)
    with locked(tmp_path, print):
        assert (tmp_path / "run.lock").exists()
        with pytest.raises(ConfigError, match="is writing this run"):
            require_no_writer(tmp_path)


def test_what_was_written_stays_and_made_folders_go(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b", print):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]
    with pytest.raises(KeyError), locked(tmp_path / "c" / "d", print):
        raise KeyError
    assert not (tmp_path / "c").exists()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    told: list[str] = []
    with locked(tmp_path, told.append):
        pass
    (text,) = told
    assert "cannot lock files (Operation not supported); make sure that no second process writes this run" in text


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious")
    (tmp_path / "run.lock").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be written there"), locked(tmp_path, print):
        pass
    assert (tmp_path / "other").read_text() == "precious"
