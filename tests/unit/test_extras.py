"""The words that install an extra."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from dianjing import extras

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's metadata as a wheel of this tree has it."""
    lines = [f'{one}; extra == "{name}"' for name, some in PROJECT["optional-dependencies"].items() for one in some]
    monkeypatch.setattr(extras, "requires", lambda _: [*PROJECT["dependencies"], *lines])


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_the_packages_are_named(installed: None, extra: str) -> None:
    said = extras.install(extra)
    assert all(f"'{package}'" in said for package in PROJECT["optional-dependencies"][extra])
    assert "dianjing" not in said.partition(" install ")[2]


def test_a_source_folder_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> list[str]:
        raise extras.PackageNotFoundError

    monkeypatch.setattr(extras, "requires", none)
    assert extras.install("make").endswith("install 'dianjing[make]'")


def test_pip_is_that_of_this_python(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: str(Path(sys.executable).with_name("pip")))
    assert extras.install("make") == "pip install 'openai>=3.0'"
    for other in ("/somewhere/else/pip", None):
        monkeypatch.setattr(shutil, "which", lambda _, other=other: other)
        assert extras.install("make") == f"{sys.executable} -m pip install 'openai>=3.0'"
