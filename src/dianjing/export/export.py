"""Seer -> a folder others can load, which is kept only if it answers as the run does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from dianjing.errors import ExportError
from dianjing.export.hf import save_hf
from dianjing.export.receipt import Case, compare, drawn_cases, write_receipt
from dianjing.use.generate import Conversation, Seer


def export(seer: Seer, out: Path, conversations: Sequence[Conversation] = ()) -> list[Case]:
    """Write the model to `out` with its receipt, and return what was compared.

    It is written beside `out` and gets its name last: a folder of that name is a proven export.

    Raises:
        ExportError: `out` exists, the model cannot be exported, or the export does not equal the run.
    """
    require_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unproven = out.with_name(f"{out.name}.unproven")
    shutil.rmtree(unproven, ignore_errors=True)
    unproven.mkdir()
    try:
        save_hf(seer, unproven)
        cases = _compare(seer, unproven, [*conversations, *drawn_cases()])
        write_receipt(seer, unproven, cases)
        unproven.rename(out)
    except BaseException:
        shutil.rmtree(unproven, ignore_errors=True)
        raise
    return cases


def require_free(out: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ExportError: there is something of that name.
    """
    if out.exists():
        raise ExportError(f"{out}: already there; remove it or give another name")


def _compare(seer: Seer, folder: Path, conversations: Sequence[Conversation]) -> list[Case]:
    try:
        return compare(seer, folder, conversations)
    except Exception as error:  # whatever stops a stranger from reading it
        raise ExportError(f"the export cannot be read back, so it is not kept: {error}") from error
