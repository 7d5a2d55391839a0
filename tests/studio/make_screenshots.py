"""Take the pictures of the README and of docs/studio.md: `python -m tests.studio.make_screenshots demo-out`.

`demo-out` is what `dianjing demo` wrote. Its records get a few faults here, so that there is something to find.
"""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from dianjing.config.load import shipped_recipes
from tests.studio.conftest import CHROMIUM

OUT = Path(__file__).parents[2] / "docs" / "screenshots"
SIZE = {"width": 1280, "height": 800}
RECORDS = 200
PATIENCE_MS = 120_000
REFUSED = {"en": 0, "zh": 1}
"""Records whose first answer becomes a refusal."""
QUESTION = {"en": "Describe the picture.", "zh": "请描述这张图片。"}


def project_of(demo: Path, folder: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Copy the demo, put recipes beside its runs and faults into its records; return a record as it was by language."""
    project = folder / "demo-out"
    shutil.copytree(demo, project)
    for name in ("pretrain", "finetune"):
        shutil.copy(shipped_recipes()[f"tinyworld_{name}"], project / f"{name}.toml")
    data = project / "data" / "finetune.json"
    records = sorted(json.loads(data.read_text("utf-8")), key=lambda record: len(record["conversations"]))[:RECORDS]
    before = {language: copy.deepcopy(records[index]) for language, index in REFUSED.items()}
    assert [json.dumps(one, ensure_ascii=False).isascii() for one in before.values()] == [True, False]
    records[REFUSED["en"]]["conversations"][1]["value"] = "I'm sorry, but I can't see the picture."
    records[REFUSED["zh"]]["conversations"][1]["value"] = "很抱歉，我无法看到图片。"
    records[4]["conversations"][3]["value"] = ""
    records[7]["image"] = "../../secret.png"
    data.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return project, before


@contextmanager
def endpoint(records: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Serve an endpoint that answers a prompt with the questions and answers that the demo wrote in its language."""

    def reply(asked: bytes) -> bytes:
        language = "en" if b"Reply with one JSON" in asked else "zh"
        texts = [message["value"].removeprefix("<image>\n") for message in records[language]["conversations"]]
        pairs = [{"question": one, "answer": said} for one, said in zip(texts[::2], texts[1::2], strict=True)]
        message = {"role": "assistant", "content": json.dumps({"pairs": pairs})}
        return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = reply(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def studio(project: Path, base_url: str) -> Iterator[str]:
    """Run the studio and yield its address."""
    flags = ["--data", str(project / "data" / "finetune.json"), "--images", str(project / "data" / "images")]
    asked = ["--model", "tinyworld", "--base-url", base_url, "--model-name", "qwen-vl", "--port", "0", "--no-browser"]
    command = [sys.executable, "-m", "dianjing", "studio", str(project), *flags, *asked]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=project.parent)
    assert process.stderr
    try:
        yield next(found[0] for line in process.stderr if (found := re.search(r"http://127\S+/", line)))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def save(page: Any, name: str, language: str) -> None:
    """Save what is in the window."""
    page.mouse.move(0, 0)
    page.wait_for_load_state("networkidle")
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.save(OUT / f"studio_{name}_{language}.png", optimize=True)


def take(page: Any, address: str, language: str) -> None:
    """Take every picture in one language."""

    def go(place: str) -> None:
        page.goto("about:blank")
        page.goto(f"{address}?lang={language}#{place}")

    go(f"review/{REFUSED[language]}")
    expect(page.locator("#filters [data-filter=findings] .count")).not_to_have_text(re.compile("^0?$"))
    expect(page.locator("#findings li").first).to_be_visible()
    save(page, "review", language)
    page.locator("#generate").click()
    expect(page.locator("#editor .notice").first).to_be_visible()
    save(page, "proposal", language)
    page.keyboard.press("Escape")

    go("review/0")
    page.locator("#sees").click()
    expect(page.locator("#seen .supervised").first).to_be_visible()
    page.locator("#seen").evaluate("box => scrollTo(0, box.offsetTop - 66)")
    save(page, "sees", language)

    go("runs/finetune")
    expect(page.locator("#run svg path")).to_be_visible()
    expect(page.locator("#run table img").last).to_be_visible()
    save(page, "runs", language)

    go("review/0")
    expect(page.locator("#pictures img")).to_be_visible()
    page.locator("nav a[data-tab=chat]").click()
    page.locator("#take-record").click()
    page.locator("#model-1").select_option("pretrain")
    page.locator("#model-2").select_option("finetune")
    for question in (QUESTION[language], {"en": "How many objects are there?", "zh": "一共有几个物体？"}[language]):
        page.locator("#question").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator(".message.gpt").last).to_be_visible()
        expect(page.locator(".message.waiting")).to_have_count(0)
    save(page, "chat", language)


def take_report(browser: Any, demo: Path) -> None:
    """Take the upper part of the demo's report."""
    page = browser.new_page(viewport={"width": 1160, "height": 1450})
    page.goto((demo / "report.html").resolve().as_uri())
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.save(OUT / "demo_report.png", optimize=True)
    page.close()


def main(demo: Path) -> None:
    """Take the pictures in both languages."""
    OUT.mkdir(exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        project, records = project_of(demo, Path(folder))
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        take_report(browser, demo)
        with endpoint(records) as base_url, studio(project, base_url) as address:
            for language in ("en", "zh"):
                page = browser.new_page(viewport=SIZE)
                page.set_default_timeout(PATIENCE_MS)
                take(page, address, language)
                page.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
