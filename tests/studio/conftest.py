"""The studio as a user starts it, and a browser without a window."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven by playwright: pip install playwright"
)
CHROMIUM = os.environ.get("DIANJING_CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PATIENCE_MS = 60_000
"""Longest wait for something to appear; models are loaded in it."""

Open = Callable[..., str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a headless Chromium of this machine.

    Of one module only: while the driver is there, no other test of this process can run an event loop.
    """
    if not CHROMIUM:
        pytest.skip("no chromium or google-chrome in PATH, and none in DIANJING_CHROMIUM")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Callable[[], Any]]:
    """Return what opens a tab; two tabs are two of one window. A script error or a foreign request fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 820}, locale="en")
    context.set_default_timeout(PATIENCE_MS)
    playwright.expect.set_options(timeout=PATIENCE_MS)
    faults: list[str] = []
    context.on("weberror", lambda error: faults.append(str(error.error)))
    context.on("request", lambda request: faults.append(request.url) if "//127.0.0.1:" not in request.url else None)
    yield context.new_page
    context.close()
    assert not faults


@pytest.fixture
def start() -> Iterator[Open]:
    """Return what starts `dianjing studio` on a folder and says its address; all of them end as with Ctrl-C."""
    processes: list[subprocess.Popen[str]] = []

    def begin(folder: Path, flags: Sequence[str] = ()) -> str:
        command = [sys.executable, "-m", "dianjing", "studio", str(folder), *flags, "--port", "0", "--no-browser"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder)
        processes.append(process)
        assert process.stderr
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+/\S+/", line):
                return found[0]
        pytest.fail("the studio did not start")

    yield begin
    for process in processes:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "Traceback" not in said
