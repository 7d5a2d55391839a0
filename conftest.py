"""What every test runs in: one thread, an empty HOME, no model hub, no network.

It stands at the root to be read before anything imports torch or transformers; fixtures: tests/conftest.py.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost", "0.0.0.0")

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")


def refuse_network(event: str, arguments: Sequence[Any]) -> None:
    """Stop a connection to another machine; sockets of this one (gloo, xdist) pass."""
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in LOCAL_HOSTS:
        raise OSError(f"a test may not reach the network: {arguments[1]}")


def pytest_configure(config: pytest.Config) -> None:
    home = tempfile.mkdtemp(prefix="dianjing-home-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    for name in [name for name in os.environ if name.startswith(("XDG_", "HF_HOME"))]:
        del os.environ[name]
    os.environ["HOME"] = home
    sys.addaudithook(refuse_network)
