"""The fields of a recipe by dotted name: what each may hold, and what to say when it holds something else."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from dianjing.config import schema
from dianjing.errors import ConfigError

Number = TypeVar("Number", int, float)

AT_LEAST_ONE = frozenset(
    {
        "language_model.lora_rank",
        "vision_tower.lora_rank",
        "data.max_tokens",
        "data.pack_tokens",
        "train.epochs",
        "train.global_batch_size",
        "train.log_every",
        "train.save_every",
        "train.keep",
        "train.sample_count",
    }
)
ABOVE_ZERO = frozenset({"language_model.lora_alpha", "vision_tower.lora_alpha"})
BELOW_ONE = frozenset({"language_model.lora_dropout", "vision_tower.lora_dropout", "train.betas"})
AT_MOST_ONE = frozenset({"train.warmup_ratio"})
SIGNED = frozenset({"data.workers", "vision_tower.feature_layer"})
"""Numbers that may be negative; no other may."""

RETIRED = {("train.engine", "deepspeed_zero3"): 'use "fsdp2", which shards the same'}
"""Values of an earlier version -> what to do instead."""

KINDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class RecipeField:
    """One value of a recipe."""

    name: str
    """Dotted: "train.epochs"; without a dot for those that stand in no section."""
    kinds: tuple[Any, ...]
    """The types it may have."""
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
        """What it may hold, in words."""
        return " or ".join(_in_words(kind) for kind in self.kinds if kind is not NoneType)


def sections() -> dict[str, type]:
    """Return the sections of a recipe and the dataclass of each."""
    hints = get_type_hints(schema.Recipe)
    return {name: cast(type, hint) for name, hint in hints.items() if is_dataclass(hint)}


@cache
def recipe_fields() -> dict[str, RecipeField]:
    """Return every field by dotted name, those outside sections first."""
    meanings = _meanings()
    found: dict[str, RecipeField] = {}
    for section, owner in {"": schema.Recipe, **sections()}.items():
        hints = get_type_hints(owner)
        for field in fields(owner):
            if field.name not in sections():
                name = f"{section}.{field.name}".lstrip(".")
                found[name] = RecipeField(
                    name=name,
                    kinds=get_args(hints[field.name]) if _is_union(hints[field.name]) else (hints[field.name],),
                    default=field.default,
                    meaning=meanings.get((owner.__name__, field.name), ""),
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
        if get_origin(kind) is Literal and isinstance(value, str):
            return _choice(field, value, get_args(kind), where)
        if get_origin(kind) is tuple and isinstance(value, list):
            return _checked_items(field, cast(list[object], value), get_args(kind), where)
        if kind is float and type(value) in (int, float):
            return _in_range(field, float(cast(float, value)), where)
        if type(value) is kind:
            return _in_range(field, cast(int, value), where) if kind is int else value
    shown = json.dumps(value, ensure_ascii=False, default=str)
    raise ConfigError(f"{where}: {field.name} = {shown}: {field.wanted} is needed, not {_kind_of(value)}")


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


def _checked_items(field: RecipeField, items: list[object], kinds: tuple[Any, ...], where: str) -> tuple[object, ...]:
    number = len(items) if kinds[-1] is ... else len(kinds)
    if not items or len(items) != number:
        raise ConfigError(f"{where}: {field.name} has {len(items)} values; {number or 'at least one'} must be there")
    inner = RecipeField(name=field.name, kinds=kinds[:1], default=MISSING, meaning="")
    return tuple(check(inner, item, where) for item in items)


def _in_range(field: RecipeField, value: Number, where: str) -> Number:
    name = field.name
    if name in AT_LEAST_ONE:
        good, wanted = value >= 1, "at least 1"
    elif name in ABOVE_ZERO:
        good, wanted = value > 0, "above 0"
    elif name in BELOW_ONE:
        good, wanted = 0 <= value < 1, "at least 0 and below 1"
    elif name in AT_MOST_ONE:
        good, wanted = 0 <= value <= 1, "between 0 and 1"
    else:
        good, wanted = value >= 0 or name in SIGNED, "at least 0"
    if not (good and math.isfinite(value)):
        raise ConfigError(f"{where}: {name} = {value}: it must be {'finite' if good else wanted}")
    return value


def _is_union(hint: Any) -> bool:
    return isinstance(hint, UnionType)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return f"a list of {'texts' if inner[0] is str else f'{len(inner)} numbers'}"
    return KINDS[kind]


def _kind_of(value: object) -> str:
    return "a list" if isinstance(value, list) else KINDS.get(type(value), f"a {type(value).__name__}")


def _meanings() -> dict[tuple[str, str], str]:
    """Return the docstring of each field of the schema; only its source has them."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[node.name, ast.unparse(field.target)] = str(ast.literal_eval(text.value))
    return found
