from __future__ import annotations

from pathlib import Path

import pytest

from dianjing.export.card import base_name


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (
            "~/hub/models--internlm--internlm2-chat-7b/snapshots/70e6cdc",
            "internlm/internlm2-chat-7b",
        ),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("tinyworld", "tinyworld"),
    ],
)
def test_a_base_is_named_as_on_the_hub(folder: str, name: str) -> None:
    assert base_name(folder) == name


def test_a_folder_is_named_without_its_place(tmp_path: Path) -> None:
    (tmp_path / "my-llm").mkdir()
    assert base_name(str(tmp_path / "my-llm")) == "my-llm"
