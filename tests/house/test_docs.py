"""What the documents say can be done, can be done."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from dianjing.cli import main
from dianjing.config.load import load_recipe
from tests.house.source import MODULES, PACKAGE, ROOT
from tests.house.test_imports import ORDER

READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")}
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str = "") -> list[str]:
    return [body for kind, body in BLOCK.findall(text) if kind == (language or kind)]


def without_comments(block: str) -> list[str]:
    return [re.sub(r"\s*#.*", "", line) for line in block.splitlines()]


def test_both_readmes_show_the_same_commands() -> None:
    english, chinese = READMES.values()
    assert len(blocks(english)) >= 4
    assert list(map(without_comments, blocks(english))) == list(map(without_comments, blocks(chinese)))


def test_both_readmes_have_the_same_sections_and_tables() -> None:
    shapes = [re.findall(r"^(#+|\|)", text, re.MULTILINE) for text in READMES.values()]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("block", blocks(READMES["README.md"], "toml"), ids=lambda block: block.split()[1])
def test_recipes_of_the_readme_are_read(block: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(block, encoding="utf-8")
    assert load_recipe(str(recipe), {}).stage == tomllib.loads(block)["stage"]


@pytest.mark.parametrize("name", READMES)
def test_the_readme_lists_the_verbs_there_are(name: str) -> None:
    listed = re.findall(r"^\| `dianjing (\w+)`", READMES[name], re.MULTILINE)
    assert sorted(listed) == sorted(main.VERBS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_named_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    sources = re.findall(r"`((?:src|tests|benchmarks|docs)/[\w/]+\.\w+)`", text)
    assert not [link for link in links if not (document.parent / link).exists()]
    assert not [path for path in sources if not (ROOT / path).exists()]


def test_the_tour_names_every_folder_in_reading_order() -> None:
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## `(\w+)/`", tour, re.MULTILINE)
    assert headings == [name for name in ORDER if (PACKAGE / name).is_dir()]


def names_in(lines: list[str]) -> list[str]:
    return [re.split(r"[><=\[]", line)[0].lower() for line in lines]


def test_each_dependency_is_imported_explained_and_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: names_in(lines) for name, lines in project["optional-dependencies"].items()}
    testing, always = extras.pop("dev"), names_in(project["dependencies"])
    asked_for = {name for names in extras.values() for name in names}
    pins = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line]
    explained = re.findall(r"^\| ([\w-]+) \|", (ROOT / "docs" / "dependencies.md").read_text("utf-8"), re.MULTILINE)
    assert sorted({*always, *asked_for, *testing}) == sorted(names_in(pins))
    assert {*always, *asked_for} == set(explained) - {"package"}
    # torch.utils.tensorboard imports tensorboard; llama_cpp is compiled by who wants it.
    imported = {name.replace("PIL", "pillow").replace("_heif", "-heif") for name in third_party()}
    assert set(always) == imported - (asked_for - set(always)) - {"llama_cpp", "fastapi", "starlette", "triton"}


def third_party() -> set[str]:
    """Return the packages that the source imports anywhere, but for the standard library and itself."""
    found = set()
    for node in (node for module in MODULES for node in ast.walk(module.tree)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found - sys.stdlib_module_names - {"dianjing"}
