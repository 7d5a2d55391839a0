"""The studio in a real browser: edit, reject, undo, reload, generate, two tabs, a run, a question about a picture."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dianjing.config.load import save_recipe
from tests.chaos.endpoint import Endpoint, pairs_about
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model, write_run
from tests.studio.conftest import Open, playwright
from tests.tiny import TinyDataset, tiny_records

expect = playwright.expect
SCRIPT = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def project(tiny_dataset: TinyDataset, tmp_path: Path) -> Path:
    """Return a folder with the tiny records, the second one's answer a hostile text, and their pictures."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_dataset.images, folder / "images")
    records = tiny_records()
    records[1]["conversations"][1]["value"] = SCRIPT
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    return ["--data", str(folder / "data.json"), "--images", str(folder / "images"), *more]


def shows(page: Any, index: int) -> None:
    """Wait until a record is on the page."""
    expect(page).to_have_url(re.compile(rf"#review/{index}$"))
    expect(page.locator("#record-name")).to_have_attribute("title", f"Record {index}")


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data.review.jsonl").read_text("utf-8").splitlines()[2:]]


def test_edit_reject_undo_and_reload(tab: Callable[[], Any], start: Open, project: Path) -> None:
    page, before = tab(), (project / "data.json").read_bytes()
    page.goto(start(project, flags(project)))
    shows(page, 0)
    expect(page.locator("#pictures img")).to_have_js_property("complete", True)
    assert page.locator("#pictures img").evaluate("image => image.naturalWidth") > 0
    expect(page.locator("#check-state")).to_contain_text("records with findings")

    page.keyboard.press("j")
    shows(page, 1)
    expect(page.locator(".message.gpt .text").first).to_have_text(SCRIPT)
    assert page.title() != "owned"

    page.keyboard.press("e")
    page.locator("#editor textarea").nth(1).fill("A better answer. 更好的回答。")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text("accepted")
    expect(page.locator("#edited")).to_be_visible()

    page.keyboard.press("j")
    shows(page, 2)
    page.keyboard.press("r")
    shows(page, 3)
    page.keyboard.press("a")
    shows(page, 4)
    expect(page.locator("#done-text")).to_have_text(f"3 of {len(tiny_records())} decided")
    page.keyboard.press("u")
    shows(page, 3)
    expect(page.locator("#status")).to_have_text("undecided")
    page.keyboard.press("k")
    shows(page, 2)
    expect(page.locator("#status")).to_have_text("rejected")

    page.reload()
    shows(page, 2)
    expect(page.locator("#status")).to_have_text("rejected")
    page.keyboard.press("u")  # this tab's last change, also after a reload
    expect(page.locator("#status")).to_have_text("undecided")
    page.keyboard.press("u")
    shows(page, 1)
    expect(page.locator(".message.gpt .text").first).to_have_text(SCRIPT)
    expect(page.locator("#done-text")).to_have_text(f"0 of {len(tiny_records())} decided")
    assert [(line["op"], line["record"]) for line in journal(project)] == [
        *[("edit", 1), ("reject", 2), ("accept", 3)],
        *[("undo", 3), ("undo", 2), ("undo", 1)],
    ]
    assert (project / "data.json").read_bytes() == before


def test_two_tabs_lose_nothing(tab: Callable[[], Any], start: Open, project: Path) -> None:
    first, second = tab(), tab()
    address = start(project, flags(project))
    for page in (first, second):
        page.goto(address)
        shows(page, 0)
    second.keyboard.press("e")
    second.locator("#editor textarea").nth(1).fill("Mine.")
    first.keyboard.press("r")
    shows(first, 1)
    second.keyboard.press("Control+Enter")
    expect(second.locator("#notice")).to_contain_text("Another tab changed this record")
    expect(second.locator("#status")).to_have_text("rejected")
    expect(second.locator("#editor textarea").nth(1)).to_have_value("Mine.")
    assert [line["op"] for line in journal(project)] == ["reject"]
    second.keyboard.press("Control+Enter")
    expect(second.locator("#editor")).to_be_hidden()
    expect(second.locator("#status")).to_have_text("accepted")
    # The first tab does not undo what the second one did.
    first.keyboard.press("u")
    expect(first.locator("#notice")).to_contain_text("Another tab changed this record")
    expect(first.locator(".message.gpt .text").first).to_have_text("Mine.")
    assert [line["op"] for line in journal(project)] == ["reject", "edit"]


def test_generate_and_write_the_reviewed_set(tab: Callable[[], Any], start: Open, project: Path) -> None:
    pytest.importorskip("openai", reason="asking an endpoint needs openai: pip install openai")
    page = tab()
    with Endpoint() as endpoint:
        page.goto(start(project, flags(project, "--base-url", endpoint.url, "--model-name", "m")))
        shows(page, 0)
        page.keyboard.press("g")
        expect(page.locator("#editor")).to_contain_text("A proposal by m")
        answer = json.loads(pairs_about(endpoint.hits[0].picture))["pairs"][0]["answer"]
        expect(page.locator("#editor textarea").nth(1)).to_have_value(answer)
        assert journal(project) == []
        page.keyboard.press("Escape")
        expect(page.locator("#editor")).to_be_hidden()
        page.keyboard.press("g")
        expect(page.locator("#editor")).to_contain_text("nobody was asked again")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#status")).to_have_text("accepted")
        assert len(endpoint.hits) == 1
    page.keyboard.press("j")
    shows(page, 1)
    page.keyboard.press("r")
    shows(page, 2)
    page.locator("#export").click()
    expect(page.locator("#toast")).to_contain_text(f"{len(tiny_records()) - 1} records written")
    written = json.loads((project / "data.reviewed.json").read_text("utf-8"))
    assert [record["id"] for record in written] == [one["id"] for i, one in enumerate(tiny_records()) if i != 1]
    assert written[0]["conversations"][1]["value"] == answer


def test_chat_with_a_picture_and_see_what_the_model_sees(
    tab: Callable[[], Any],
    start: Open,
    project: Path,
    make_recipe: MakeRecipe,
    tiny_llm: Path,
    tiny_dataset: TinyDataset,
) -> None:
    recipe = make_recipe(output=str(project / "runs" / "seeing"))
    write_run(recipe, loaded_model(recipe))
    page = tab()
    address = start(project, flags(project, "--model", str(tiny_llm)))
    page.goto(f"{address}?lang=zh#chat")
    expect(page.locator("nav")).to_contain_text("审阅")
    page.locator("#file").set_input_files(str(tiny_dataset.images / "wide.png"))
    expect(page.locator("#own")).to_be_visible()
    page.locator("#model-1").select_option("runs/seeing")
    page.locator("#model-2").select_option(str(tiny_llm))
    page.locator("#question").fill("What colour is it?")
    page.keyboard.press("Enter")
    expect(page.locator(".column")).to_have_count(2)
    expect(page.locator(".message.gpt")).to_have_count(2)
    expect(page.locator(".message.waiting")).to_have_count(0)
    expect(page.locator("#columns .broken")).to_have_count(0)
    expect(page.locator(".column").nth(1).locator(".notice")).to_contain_text("看不见")
    assert page.locator(".column").nth(0).locator(".message.gpt .text").inner_text().strip()

    page.goto(f"{address}?lang=zh#review/0")
    page.locator("#sees").click()
    expect(page.locator("#seen .tokens .supervised").first).to_be_visible()
    expect(page.locator("#seen img").first).to_have_js_property("complete", True)
    assert page.locator("#seen img").first.evaluate("image => image.naturalWidth") > 0
    expect(page.locator("#seen h2")).to_be_in_viewport()


def test_a_recipe_is_made_planned_written_and_started(tab: Callable[[], Any], start: Open, project: Path) -> None:
    page = tab()
    page.goto(f"{start(project)}#runs")
    page.locator("#new-recipe").click()
    page.locator("#recipe-from").select_option("tinyworld_pretrain")
    field = lambda name: page.locator(f'[data-field="{name}"]')  # noqa: E731
    expect(field("vision_tower.folder")).to_have_value("tinyworld")
    field("data.path").fill(str(project / "nowhere.json"))
    expect(page.locator("#plan")).to_contain_text("The data file is not there")
    field("train.epochs").fill("two")
    expect(page.locator("#plan .notice")).to_contain_text("a whole number is needed")
    field("data.path").fill(str(project / "data.json"))
    field("data.images").fill(str(project / "images"))
    field("output").fill(str(project / "drafted"))
    field("train.epochs").fill("1000000")
    field("train.global_batch_size").fill("4")
    field("train.log_every").evaluate("one => { one.value = '1' }")  # folded away
    field("train.sample_every").fill("2")
    field("train.sample_path").fill(str(project / "data.json"))
    expect(page.locator("#plan table")).to_be_visible()
    expect(page.locator("#plan")).to_contain_text("8 records, 2000000 steps")
    page.locator("#recipe-name").fill("drafted")
    page.locator("#write-and-start").click()
    expect(page.locator("#run h1")).to_have_text("drafted")
    expect(page.locator("#run circle.shown")).to_be_visible()
    page.locator("#run circle").first.click()
    expect(page.locator("#run-samples h2")).to_have_text("Sample answers at step 0")
    expect(page.locator("#run table img").first).to_have_js_property("complete", True)
    page.locator("#stop").click()
    expect(page.locator("#run-state")).to_contain_text("exit code 143")
    assert "epochs = 1000000" in (project / "drafted.toml").read_text()


def test_a_page_of_the_folder_opens_and_reaches_nothing(tab: Callable[[], Any], start: Open, project: Path) -> None:
    spy = "document.body.dataset.seen = 'ran'; fetch(location.href.replace(/page.*/, 'runs')).catch(() => 0)"
    text = f'<meta name="generator" content="dianjing"><h1>side by side</h1><script>{spy}</script>'
    (project / "compare.html").write_text(f"<!doctype html><head></head><body>{text}</body>")
    page = tab()
    asked: list[str] = []
    page.goto(f"{start(project)}#runs")
    page.on("requestfinished", lambda request: asked.append(request.url) if request.frame != page.main_frame else None)
    page.locator("#page-list a").click()
    frame = page.frame_locator("#run iframe")
    expect(frame.locator("h1")).to_have_text("side by side")
    expect(frame.locator("body")).to_have_attribute("data-seen", "ran")
    assert all("/page?" in url for url in asked)


@pytest.mark.parametrize("place", ["review/0", "runs", "chat"])
def test_a_phone_scrolls_down_and_not_sideways(tab: Callable[[], Any], start: Open, project: Path, place: str) -> None:
    page = tab()
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(f"{start(project, flags(project))}#{place}")
    if place == "runs":
        page.locator("#new-recipe").click()
        expect(page.locator("#recipe-form")).to_be_visible()
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    bar = page.locator(".actions").bounding_box() if place.startswith("review") else None
    assert bar is None or bar["height"] <= 0.1 * 800


def test_a_run_is_started_followed_and_stopped(
    tab: Callable[[], Any], start: Open, project: Path, make_recipe: MakeRecipe
) -> None:
    train = {"sample_path": str(project / "data.json"), "sample_every": 2, "max_steps": 100_000, "epochs": 100_000}
    data = {"path": str(project / "data.json"), "images": str(project / "images")}
    recipe = make_recipe(output=str(project / "mine"), train=train, data=data)
    save_recipe(recipe, project / "mine.toml")
    page = tab()
    page.goto(f"{start(project)}#runs")
    page.locator("#recipe-list button").first.click()
    expect(page.locator("#run h1")).to_have_text("mine")
    expect(page.locator("#run svg path")).to_be_visible()
    expect(page.locator("#run table img").first).to_have_js_property("complete", True)
    expect(page.locator("#run-state")).to_have_text("running")
    page.locator("#stop").click()
    expect(page.locator("#run-state")).to_contain_text("exit code 143")
    assert list((project / "mine" / "checkpoints").glob("step-*"))
