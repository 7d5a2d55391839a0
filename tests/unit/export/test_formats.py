"""The table of formats: each row has its code, each option its takers, and the command and the docs show all rows."""

from __future__ import annotations

import inspect
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from dianjing.cli.main import main
from dianjing.errors import ExportError
from dianjing.export.formats import FORMATS, Code, Options, find_format, require_taken
from tests.house.source import ROOT

OTHER_THAN_DEFAULT: dict[str, Any] = {"dtype": "bf16", "quantize": "q8_0", "verify": True}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_has_what_the_table_promises(name: str) -> None:
    code = FORMATS[name].code
    assert code.LOADING.strip()
    for method in ("can_hold", "save", "prove"):
        wanted = list(inspect.signature(getattr(Code, method)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(code, method)).parameters) == wanted


def test_every_option_is_taken_by_a_format_or_refused_by_name() -> None:
    assert set(OTHER_THAN_DEFAULT) == {field.name for field in fields(Options)}
    for option, value in OTHER_THAN_DEFAULT.items():
        takers = [name for name, format in FORMATS.items() if option in format.options]
        assert takers
        for name in FORMATS:
            require_taken(name, Options())
            if name in takers:
                require_taken(name, Options(**{option: value}))
            else:
                with pytest.raises(ExportError, match=f"--{option}: the format {name} does not take it"):
                    require_taken(name, Options(**{option: value}))


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(ExportError, match="there are hf, adapter"):
        find_format("onnx")


def test_the_help_and_the_page_show_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    for name, format in FORMATS.items():
        assert f"{name}: {format.purpose}" in shown
        assert f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("tower", "llm", "refusing"),
    [
        ("clip_vision_model", "llama", []),
        ("clip_vision_model", "qwen2", ["llava"]),
        ("siglip_vision_model", "llama", ["xtuner", "llava"]),
        ("clip_vision_model", "gemma", ["llava", "gguf"]),
    ],
)
def test_which_formats_hold_a_model_is_known_from_its_configurations(tower: str, llm: str, refusing: list[str]) -> None:
    vision = SimpleNamespace(model_type=tower, hidden_act="gelu", hidden_size=8, intermediate_size=16)
    text = SimpleNamespace(model_type=llm, hidden_act="silu", rope_parameters={"rope_theta": 1e4})
    reasons = {name: format.code.can_hold(vision, "mlp", text) for name, format in FORMATS.items()}
    assert [name for name, reason in reasons.items() if reason] == refusing
