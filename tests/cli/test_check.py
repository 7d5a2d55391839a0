from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dianjing.cli.main import main
from dianjing.config.load import save_recipe
from tests.tiny import TinyDataset, tiny_records, write_dataset

COURSE = """[
    {
        "id": "000000033471",
        "image": "wide.png",  // path of the picture
        "conversation": [
            {"from": "human", "value": "<image>\\nWhat is it?"},
            {"from": "gpt", "value": "A red thing."},
        ]
    },
]
"""


@pytest.fixture
def data(tmp_path: Path) -> TinyDataset:
    return write_dataset(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["check", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def findings(out: str) -> dict[str, dict[str, Any]]:
    return {one["code"]: one for one in map(json.loads, out.splitlines())}


def test_a_set_without_errors(capsys: pytest.CaptureFixture[str], data: TinyDataset) -> None:
    code, out, _ = run(capsys, data.path, "--images", data.images)
    assert code == 0
    assert "8 records, 4 pictures" in out
    assert "0 errors" in out


def test_the_course_s_own_example(capsys: pytest.CaptureFixture[str], data: TinyDataset) -> None:
    """Its prose has a comment, trailing commas and `conversation`; line and column are named, and all is put right."""
    data.path.write_text(COURSE, encoding="utf-8")
    fixed = data.path.with_name("fixed.json")
    code, out, _ = run(capsys, data.path, "--images", data.images, "--json", "--fix", fixed)
    found = findings(out)
    assert code == 1
    assert set(found) == {"json_comment", "json_trailing_comma", "conversation_key"}
    assert (found["json_comment"]["line"], found["json_comment"]["column"]) == (4, 31)
    assert all(one["fixed"] for one in found.values())
    assert data.path.read_text(encoding="utf-8") == COURSE
    assert run(capsys, fixed, "--images", data.images)[0] == 0
    assert json.loads(fixed.read_text(encoding="utf-8"))[0]["conversations"][1]["value"] == "A red thing."


def test_the_summary_names_records_and_what_to_do(capsys: pytest.CaptureFixture[str], data: TinyDataset) -> None:
    records = tiny_records()
    records[1]["image"] = "tall.jpeg"
    records[2]["conversations"][1]["value"] = "[red]\x1b[31m"
    records[3]["id"] = "wide"
    data.path.write_text(json.dumps(records), encoding="utf-8")
    report = data.path.with_name("report.html")
    code, out, err = run(capsys, data.path, "--images", data.images, "--report", report)
    assert code == 1
    assert 'record 1 ("tall")' in out
    assert 'was "tall.jpg" meant?' in out
    assert "warning id_duplicate" in out
    assert "\x1b[31m" not in out
    assert str(report) in err
    page = report.read_text(encoding="utf-8")
    assert "picture_missing" in page
    assert page.count("<svg") >= 5
    assert '<details class="error" open>' in page, "few errors lie open"
    assert "http://" not in page
    assert "https://" not in page


def test_the_page_of_a_clean_set_and_of_a_refused_one(
    capsys: pytest.CaptureFixture[str], data: TinyDataset, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    records = [record for record in tiny_records() if record["id"] in ("square", "text")]
    data.path.write_text(json.dumps(records), encoding="utf-8")
    assert run(capsys, data.path, "--images", data.images, "--report", report)[0] == 0
    page = report.read_text(encoding="utf-8")
    assert "Nothing was found." in page
    assert "<details" not in page

    records = [{**record, "id": "<b>&"} for record in records]
    data.path.write_text(json.dumps(records)[:-1] + ", // why\n]", encoding="utf-8")
    assert run(capsys, data.path, "--images", data.images, "--report", report)[0] == 1
    page = report.read_text(encoding="utf-8")
    assert f"training would refuse {data.path} as a whole" in page
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page


def test_what_a_run_would_use(capsys: pytest.CaptureFixture[str], make_recipe: Any, tmp_path: Path) -> None:
    save_recipe(make_recipe(data={"max_tokens": 40, "on_long_record": "skip"}), tmp_path / "run.toml")
    code, out, _ = run(capsys, "--recipe", tmp_path / "run.toml")
    assert "a run would use" in out
    assert "full" in out
    assert code == 0
    save_recipe(make_recipe(language_model={"template": "llama3_chat"}), tmp_path / "run.toml")
    code, out, _ = run(capsys, "--recipe", tmp_path / "run.toml")
    assert code == 1
    assert '3 special strings of the template "llama3_chat"' in out


def test_special_strings_of_an_llm(capsys: pytest.CaptureFixture[str], data: TinyDataset, tiny_llm: Path) -> None:
    records = tiny_records()
    records[0]["conversations"][1]["value"] += "<|im_end|>"
    data.path.write_text(json.dumps(records), encoding="utf-8")
    flags = ("--images", data.images, "--llm", tiny_llm, "--template", "internlm2_chat", "--json")
    assert "special_string" in findings(run(capsys, data.path, *flags)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data is named"),
        (["DATA", "--images", "no/where"], "no/where: there is no such image folder"),
        (["DATA", "--fix", "DATA"], "this is the data file itself"),
        (["DATA", "DATA", "--fix", "x.json"], "--fix corrects one file at a time"),
        (["DATA", "--template", "qwen_chat"], "--template goes with --llm"),
        (["DATA", "--llm", "a", "--recipe", "tinyworld_finetune"], "leave one out"),
        (["DATA", "--convert", "x.txt"], "must end in .json"),
        (["no.json"], "no.json: cannot be read"),
        (["data.csv"], "must end in .json"),
    ],
)
def test_what_cannot_run(
    capsys: pytest.CaptureFixture[str], data: TinyDataset, arguments: list[str], message: str
) -> None:
    code, _, err = run(capsys, *(str(data.path) if word == "DATA" else word for word in arguments))
    assert code == 2
    assert message in err


def test_convert(capsys: pytest.CaptureFixture[str], data: TinyDataset) -> None:
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello."}]
    data.path.write_text(json.dumps([{"messages": messages}]), encoding="utf-8")
    out = data.path.with_name("new.json")
    code, _, err = run(capsys, data.path, "--convert", out)
    assert code == 0
    assert "OpenAI messages" in err
    assert "1 records, 0 pictures" in err
    assert run(capsys, out)[0] == 0


def test_the_command_itself(data: TinyDataset) -> None:
    command = [sys.executable, "-m", "dianjing", "check", str(data.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "picture_missing" in done.stdout
    assert done.stderr == ""
