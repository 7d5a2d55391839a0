"""`--gpus N`: N processes of this command on one machine, which start, stop and fail together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from dianjing.errors import ConfigError, TrainError
from dianjing.train.interrupt import stopping

LAUNCHED = "DIANJING_LAUNCHED"
"""In the environment of the ranks: the process of the launch, whose command line they have, --gpus included."""
GRACE_SECONDS = 15.0
"""How long the others may take to end by themselves once a rank has failed."""
LOOK_SECONDS = 0.1


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run `dianjing train` with these arguments on each rank and return the exit code of the first that failed, or 0.

    Raises:
        ConfigError: there are too few GPUs, or another launcher is at work already.
        TrainError: a rank was killed from outside.
    """
    environment = _environment(ranks)
    command = [sys.executable, "-m", "dianjing", "train", *arguments]
    # A session of their own: Ctrl-C reaches them through this process only, and once.
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]

    asked = 0

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in stopping()}
    try:
        code = _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if code >= 0 or asked:  # a rank that is asked to end before it trains just ends
        return code if code >= 0 else 128 + asked
    raise TrainError(
        f"a rank was ended by {signal.Signals(-code).name}, and the others with it; was there memory enough? "
        "--resume goes on from the last checkpoint"
    )


def end_with_launcher() -> None:
    """Let a rank stop, as SIGTERM does, once the process that has started it is gone."""
    launcher = int(os.environ.get(LAUNCHED, "0"))

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if launcher:
        threading.Thread(target=look, daemon=True).start()


def _environment(ranks: int) -> dict[str, str]:
    import torch  # slow to import

    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--gpus starts the processes itself; under torchrun or accelerate launch leave it out")
    gpus = torch.cuda.device_count()
    if ranks < 1 or (gpus and ranks > gpus):
        raise ConfigError(f"--gpus {ranks}: this machine has {gpus} GPUs")
    environment = {
        **os.environ,
        LAUNCHED: str(os.getpid()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not gpus:
        print(f"no GPU on this machine: {ranks} processes on the CPU", file=sys.stderr)
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks have ended, or one has failed and the others had time to; return the code of that one."""
    failed, patience = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < patience:
        time.sleep(LOOK_SECONDS)
        if failed is None:
            failed = next((rank for rank, process in enumerate(processes) if process.poll()), None)
            patience = float("inf") if failed is None else time.monotonic() + GRACE_SECONDS
    failed = (
        next((rank for rank, process in enumerate(processes) if process.poll()), None) if failed is None else failed
    )
    return 0 if failed is None else processes[failed].returncode


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
