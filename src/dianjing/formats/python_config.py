"""A config file written in Python -> its values. It is parsed and never run.

Understood is what XTuner's configs consist of: names set to literals, to names set above them, to arithmetic on them,
and to dict(...), list(...), int(...) of them. An imported name is its dotted path as text, as XTuner prints it.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from dianjing.errors import ConfigError, shortened

LARGEST = 2**63
LONGEST_TEXT = 100_000
MOST_WRITTEN_OUT = 1_000_000
"""Values and characters that a config may have, a name counting as often as it is used: [x, x], 60 times over, is more
than any memory holds."""
MOST_DIGITS = 64

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def _round(number: Any, digits: Any = None) -> Any:
    if digits is not None and abs(digits) > MOST_DIGITS:
        raise ValueError(f"round to more than {MOST_DIGITS} digits")
    return round(number, digits)


CONVERSIONS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "tuple": tuple,
    "round": _round,
    "min": min,
    "max": max,
}


def read_python_config(text: str, where: str) -> dict[str, Any]:
    """Return the names that the config sets and their values.

    Raises:
        ConfigError: it is not Python, or does what only running it could tell; the line is named.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{where}: not a config in Python: {shortened(error)}") from None
    except (RecursionError, MemoryError):  # what ast.parse says of depth, whatever the memory
        raise ConfigError(f"{where}: not a config in Python: its brackets or operators are nested too deep") from None
    reader = _Reader(where)
    for statement in tree.body:
        reader.take(statement)
    return reader.values


def _key(value: Any) -> Any:
    """Return what may be a key: hashes of nested tuples can take for ever, and those of long numbers can be all one."""
    if not isinstance(value, str | int | float | None) or (isinstance(value, int) and abs(value) >= 2**32):
        raise TypeError(f"a {type(value).__name__} as a key, or in a set, that is neither text nor a small number")
    return value


class _Reader:
    def __init__(self, where: str) -> None:
        self.values: dict[str, Any] = {}
        self._imported: dict[str, str] = {}
        self._where = where
        self._left = MOST_WRITTEN_OUT

    def take(self, statement: ast.stmt) -> None:
        """Read one statement of the file."""
        match statement:
            case ast.Import(names=names):
                self._imported |= {
                    name.name.split(".")[0]: name.name.split(".")[0] for name in names if not name.asname
                }
                self._imported |= {name.asname: name.name for name in names if name.asname}
            case ast.ImportFrom(module=module, names=names):
                self._imported |= {name.asname or name.name: f"{module}.{name.name}" for name in names}
            case ast.Assign(targets=[ast.Name(id="_base_")]):
                self._refuse(statement, "it builds on another config (_base_); give the whole one, as XTuner saves it")
            case ast.Assign(targets=targets, value=value) if all(isinstance(target, ast.Name) for target in targets):
                found = self._value(value)
                self.values |= {target.id: found for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                self.values[name] = self._value(value)
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case ast.With():
                self._refuse(
                    statement, "it builds on another config (read_base); give the whole one, as XTuner saves it"
                )
            case _:
                self._refuse(statement, f"a {type(statement).__name__} statement; only NAME = VALUE is read")

    def _value(self, node: ast.expr) -> Any:
        try:
            return self._evaluate(node)
        except RecursionError:
            self._refuse(node, "a value that is nested too deep")
        except (TypeError, ValueError, ArithmeticError) as error:
            self._refuse(node, str(error))

    def _evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=items):
                return [self._evaluate(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self._evaluate(item) for item in items)
            case ast.Set(elts=items):
                return {_key(self._evaluate(item)) for item in items}
            case ast.Dict(keys=keys, values=values) if all(keys):
                return {_key(self._evaluate(k)): self._evaluate(v) for k, v in zip(keys, values, strict=True) if k}
            case ast.Name() | ast.Attribute():
                return self._look_up(node)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return self._combine(node, self._evaluate(left), op, self._evaluate(right))
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=words):
                found: dict[str, Any] = {}
                for word in words:
                    value = self._evaluate(word.value)
                    found |= {word.arg: value} if word.arg else value
                return found
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in CONVERSIONS:
                return self._counted(CONVERSIONS[name](*map(self._evaluate, arguments)))
            case ast.Call(func=function):
                self._refuse(node, f"{ast.unparse(function)}(...) would have to be run; write its value there")
            case _:
                self._refuse(node, f"{ast.unparse(node)[:60]!r} would have to be run; write its value there")

    def _look_up(self, node: ast.Name | ast.Attribute) -> Any:
        names = ast.unparse(node).split(".")
        if isinstance(node, ast.Name) and node.id in self.values:
            return self._counted(self.values[node.id])
        if names[0] in self._imported and all(name.isidentifier() for name in names):
            return ".".join([self._imported[names[0]], *names[1:]])
        self._refuse(node, f"{names[0]!r} is not set above")

    def _counted(self, value: Any) -> Any:
        """Return the value, if with it the config has not more than may be written out."""
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self._left -= 1 + (len(item) if isinstance(item, str | bytes) else 0)
            if self._left < 0:
                raise ValueError(f"a value that is too large (more than {MOST_WRITTEN_OUT:,} parts, written out)")
            if isinstance(item, dict):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set):
                waiting += item
        return value

    def _combine(self, node: ast.expr, left: Any, op: ast.operator, right: Any) -> Any:
        numbers = all(type(value) in (int, float) for value in (left, right))
        joined = type(op) is ast.Add and type(left) is type(right) and type(left) in (str, list, tuple)
        if not numbers and not joined:
            self._refuse(node, f"{ast.unparse(node)[:60]!r} is not arithmetic on numbers")
        too_large = len(left) + len(right) > LONGEST_TEXT if joined else max(abs(left), abs(right)) > LARGEST
        if too_large or (type(op) is ast.Pow and abs(right) > 64):
            self._refuse(node, "a value that is too large")
        return OPERATORS[type(op)](left, right)

    def _number(self, node: ast.expr) -> int | float:
        value = self._evaluate(node)
        if type(value) not in (int, float):
            raise TypeError(f"-{ast.unparse(node)} is not a number")
        return value

    def _refuse(self, node: ast.stmt | ast.expr, reason: str) -> Any:
        raise ConfigError(f"{self._where}: line {node.lineno}: {shortened(reason)} (a config is read, never run)")
