"""The fields of a recipe by dotted name: the values each takes, with an error for any other."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from dianjing.config import schema
from dianjing.errors import ConfigError

RETIRED = {("train.engine", "deepspeed_zero3"): 'use "fsdp2", which shards the same'}
"""Values of an earlier version -> what to do instead."""

KINDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class RecipeField:
    """One value of a recipe."""

    name: str
    """Dotted: "train.epochs"; without a dot for those that stand in no section."""
    kinds: tuple[Any, ...]
    """The types it may have, numbers with their Range."""
    default: object
    """MISSING when a recipe must give it."""
    meaning: str

    @property
    def section(self) -> str:
        """The part of the name before the dot."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The name within its section."""
        return self.name.rpartition(".")[2]

    @property
    def wanted(self) -> str:
        """The values it takes, in words."""
        return " or ".join(_in_words(kind) for kind in self.kinds if kind is not NoneType)


def sections() -> dict[str, type]:
    """Return the sections of a recipe and the dataclass of each."""
    hints = get_type_hints(schema.Recipe)
    return {name: cast(type, hint) for name, hint in hints.items() if is_dataclass(hint)}


@cache
def recipe_fields() -> dict[str, RecipeField]:
    """Return every field by dotted name, those outside sections first."""
    found: dict[str, RecipeField] = {}
    for section, owner in {"": schema.Recipe, **sections()}.items():
        hints = get_type_hints(owner, include_extras=True)
        for field in fields(owner):
            if field.name not in sections():
                name = f"{section}.{field.name}".lstrip(".")
                found[name] = RecipeField(
                    name=name,
                    kinds=get_args(hints[field.name]) if _is_union(hints[field.name]) else (hints[field.name],),
                    default=field.default,
                    meaning=docstrings(owner).get(field.name, ""),
                )
    return found


def known_field(name: str, where: str) -> RecipeField:
    """Return the field of that name.

    Raises:
        ConfigError: there is none; the nearest name is offered.
    """
    known = recipe_fields()
    if name in known:
        return known[name]
    section, _, key = name.rpartition(".")
    siblings = [field.key for field in known.values() if field.section == section]
    near = nearest(key, siblings)
    if not near:
        key_elsewhere = nearest(key, [field.key for field in known.values()])
        near = [other for other, field in known.items() if field.key in key_elsewhere]
    offer = f"; did you mean {' or '.join(repr(other) for other in near)}?"
    choices = f"; there are {', '.join(siblings or sections())}"
    raise ConfigError(f"{where}: unknown field '{key if siblings else name}'{offer if near else choices}")


def check(field: RecipeField, value: object, where: str) -> object:
    """Return a value in the field's own type; a whole number will do for a float, a list for a tuple.

    Raises:
        ConfigError: the value is of another type, or out of range.
    """
    for kind in field.kinds:
        bare = without_range(kind)
        if get_origin(bare) is Literal and isinstance(value, str):
            return _choice(field, value, get_args(bare), where)
        if get_origin(bare) is tuple and isinstance(value, list | tuple):
            return _checked_items(field, cast(Sequence[object], value), get_args(bare), where)
        if bare is float and type(value) in (int, float):
            return _in_range(field, float(cast(float, value)), kind, where)
        if type(value) is bare:
            return _in_range(field, cast(int, value), kind, where) if bare is int else value
    shown = json.dumps(value, ensure_ascii=False, default=str)
    raise ConfigError(f"{where}: {field.name} = {shown}: {field.wanted} is needed, not {_kind_of(value)}")


def without_range(kind: Any) -> Any:
    """Return the type of a number whose Range is written with it; any other type as it is."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return the name that is most like `name`, or nothing when none is."""
    return difflib.get_close_matches(name, list(names), n=1)


def _choice(field: RecipeField, value: str, choices: tuple[str, ...], where: str) -> str:
    if value not in choices:
        if instead := RETIRED.get((field.name, value)):
            raise ConfigError(f'{where}: {field.name} = "{value}": it has been removed; {instead}')
        offer = "".join(f'; did you mean "{choice}"?' for choice in nearest(value, choices))
        raise ConfigError(f'{where}: {field.name} = "{value}": {field.wanted} is needed{offer}')
    return value


def _checked_items(
    field: RecipeField, items: Sequence[object], kinds: tuple[Any, ...], where: str
) -> tuple[object, ...]:
    number = len(items) if kinds[-1] is ... else len(kinds)
    if not items or len(items) != number:
        raise ConfigError(f"{where}: {field.name} has {len(items)} values; {number or 'at least one'} must be there")
    inner = RecipeField(name=field.name, kinds=kinds[:1], default=MISSING, meaning="")
    return tuple(check(inner, item, where) for item in items)


def _in_range(field: RecipeField, value: float, kind: Any, where: str) -> float:
    for allowed in get_args(kind)[1:]:
        if not allowed.holds(value) or not math.isfinite(value):
            wanted = allowed.words if math.isfinite(value) else "finite"
            raise ConfigError(f"{where}: {field.name} = {value}: it must be {wanted}")
    return value


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (UnionType, Union)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return f"a list of {'texts' if inner[0] is str else f'{len(inner)} numbers'}"
    return KINDS[without_range(kind)]


def _kind_of(value: object) -> str:
    return "a list" if isinstance(value, list) else KINDS.get(type(value), f"a {type(value).__name__}")


@cache
def docstrings(owner: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, its parents' included; only the source has them."""
    found: dict[str, str] = {}
    for parent in reversed(owner.__mro__[:-1]):
        (node,) = ast.parse(inspect.getsource(parent)).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found
