"""The house rules that a linter does not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

import pytest

from tests.house.source import MODULES, ROOT, Module

FUNCTION_LINES = 60
FILE_LINES = 600
CLASS_LINES = 150
ARGUMENTS = 8
"""Of a function, without self or ctx; kernels, which take a pointer and a stride for each matrix, may have more."""
FORBIDDEN_WORDS = set(
    ["util", "utils", "helper", "helpers", "common", "misc", "manager", "factory", "registry", "legacy"]
)

every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def too_long(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, Function) and (node.end_lineno or 0) - node.lineno + 1 >= FUNCTION_LINES:
            yield f"{node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"


def unsafe(module: Module) -> Iterator[str]:
    """Ways to run what a model folder or a checkpoint brings along, and to load weights that do not fit."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            given = {word.arg: word.value for word in node.keywords}
            for name, value in (("trust_remote_code", True), ("weights_only", False), ("strict", False)):
                constant = given.get(name)
                if isinstance(constant, ast.Constant) and constant.value is value and not is_zip(node):
                    yield f"line {node.lineno}: {name}={value}"
            restricted = isinstance(only := given.get("weights_only"), ast.Constant) and only.value is True
            if ast.unparse(node.func) in {"eval", "exec", *([] if restricted else ["torch.load"])}:
                yield f"line {node.lineno}: {ast.unparse(node.func)}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"line {node.lineno}: {name}" for name in names if name.split(".")[0] == "pickle")


def is_zip(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "zip"


def ill_named(module: Module) -> Iterator[str]:
    defined = [node.name for node in ast.walk(module.tree) if isinstance(node, Function | ast.ClassDef)]
    for name in [*module.name.split("."), *defined]:
        words = set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))
        if words & FORBIDDEN_WORDS or re.search(r"_v\d+$", name):
            yield name


def undocumented(module: Module) -> Iterator[str]:
    """The module itself, its public classes and functions, and the public methods of public classes."""
    if not ast.get_docstring(module.tree) and module.text.strip():
        yield "the file"
    for node in module.tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.name
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            public = isinstance(inner, Function) and not inner.name.startswith("_")
            if public and not ast.get_docstring(inner):
                yield f"{node.name}.{inner.name}"


def long_class(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > CLASS_LINES:
            yield f"{node.name} has {lines} lines"


def many_arguments(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, Function) and not module.name.startswith("layers.kernels."):
            names = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            if len(names) - (names[:1] in (["self"], ["cls"], ["ctx"])) > ARGUMENTS:
                yield f"{node.name} has {len(names)} arguments"


def two_subjects(module: Module) -> Iterator[str]:
    """A first sentence of a file that joins two clauses by "and": the file then holds two things, or the sentence.

    "LLM and tower", "a, b and c" within a clause are one subject.
    """
    first = re.split(r"[.:?](?:\s|$)", ast.get_docstring(module.tree) or "")[0]
    if re.search(r"[,;] and (?!so on)", " ".join(first.split())):
        yield f'"{first}": say one thing, or divide the file'


def second_ignore_index(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-100" and module.name != "constants":
            yield f"line {node.lineno}: -100; write IGNORE_INDEX"


@every_module
def test_functions_are_short(module: Module) -> None:
    assert not list(too_long(module))


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_files_are_short(folder: str) -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / folder).rglob("*.py")}
    assert not {str(path): number for path, number in lines.items() if number >= FILE_LINES}


ALLOWED = {
    (many_arguments, "layers"): 1,
    (long_class, "studio"): 1,
    (two_subjects, "importing"): 1,
    (two_subjects, "studio"): 1,
}
"""Faults that a folder may still have. `packed_attention` is called by transformers, with these arguments."""


@pytest.mark.parametrize("rule", [long_class, many_arguments, two_subjects], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("folder", sorted({module.name.partition(".")[0] for module in MODULES}))
def test_a_file_is_about_one_thing(rule: Callable[[Module], Iterator[str]], folder: str) -> None:
    modules = [module for module in MODULES if module.name.partition(".")[0] == folder]
    faults = [f"{module.name}: {fault}" for module in modules for fault in rule(module)]
    assert len(faults) <= ALLOWED.get((rule, folder), 0), "\n".join(faults)


@every_module
def test_nothing_unsafe_is_called(module: Module) -> None:
    assert not list(unsafe(module))


@every_module
def test_names_say_something(module: Module) -> None:
    assert not list(ill_named(module))


@every_module
def test_public_things_are_documented(module: Module) -> None:
    assert not list(undocumented(module))


@every_module
def test_there_is_one_ignore_index(module: Module) -> None:
    assert not list(second_ignore_index(module))


LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (too_long, LONG),
        (unsafe, "torch.load(path)"),
        (unsafe, "load(path, weights_only=False)"),
        (unsafe, "load(path, trust_remote_code=True)"),
        (unsafe, "model.load_state_dict(state, strict=False)"),
        (unsafe, "from pickle import loads"),
        (ill_named, "class RunManager: ..."),
        (ill_named, "def load_v2(): ..."),
        (long_class, "class A:\n" + "    x = 1\n" * CLASS_LINES),
        (many_arguments, "def f(self, a, b, c, d, e, f, /, g, *, h, i): ..."),
        (two_subjects, '"""Loads a model, and saves it."""'),
        (undocumented, '"""Doc."""\nclass A:\n    """Doc."""\n    def b(self): ...'),
        (second_ignore_index, "x = -100"),
    ],
)
def test_each_rule_sees_its_fault(rule: Callable[[Module], Iterator[str]], text: str) -> None:
    assert len(list(rule(Module("data.x", "x.py", text)))) == 1
