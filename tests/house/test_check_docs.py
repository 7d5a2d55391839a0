"""The pages about `check` list its codes as they are."""

from __future__ import annotations

import re

from dianjing.check.codes import CODES
from tests.house.source import ROOT

ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (\S*) ?\| (.*) \| ?(.*) \|$", re.MULTILINE)


def rows(name: str) -> list[tuple[str, ...]]:
    return ROW.findall((ROOT / "docs" / name).read_text(encoding="utf-8"))


def test_the_english_table_is_the_list_of_codes() -> None:
    expected = [
        (name, code.severity, "yes" if code.fixed else "", code.meaning, "" if code.fix == "-" else code.fix)
        for name, code in CODES.items()
    ]
    assert [tuple(cell.strip() for cell in row) for row in rows("check.md")] == expected


def test_the_chinese_table_has_the_same_codes() -> None:
    expected = [(name, code.severity, "是" if code.fixed else "") for name, code in CODES.items()]
    assert [row[:3] for row in rows("check_zh.md")] == expected
    assert all(row[3] for row in rows("check_zh.md"))
