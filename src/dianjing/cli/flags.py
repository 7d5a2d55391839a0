"""Flags -> the dataclass of a verb."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dianjing.config.fields import KINDS, recipe_fields
from dianjing.config.load import RENAMED, as_flag, as_toml, flatten, load_recipe, make_recipe, read_values, today
from dianjing.config.schema import Recipe

Arguments = TypeVar("Arguments")
RunArgumentsT = TypeVar("RunArgumentsT", bound="RunArguments")
SHORT = {"--engine": "--train.engine"}
"""Flags of a recipe that have a short form."""


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """A recipe, and flags for all its fields that win over it."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """A TOML file, or the name of a shipped recipe (`dianjing recipes` lists them)."""
    recipe: Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


def parse(
    kind: type[Arguments], arguments: list[str], verb: str, summary: str, default: Arguments | None = None
) -> Arguments:
    """Return what the command line of a verb gives; tyro prints help and complaints and exits."""
    return tyro.cli(
        kind,
        args=arguments,
        prog=f"dianjing {verb}",
        description=summary,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=VALUES,
        default=default or tyro.MISSING_NONPROP,
    )


def parse_with_recipe(kind: type[RunArgumentsT], arguments: list[str], verb: str, summary: str) -> RunArgumentsT:
    """Return what the command line of a verb gives, its recipe with the values of the flags.

    It is parsed twice: for the name of the recipe, then with the values of that recipe as defaults.

    Raises:
        ConfigError: the recipe cannot be used as written.
    """
    words = [_today(word) for word in arguments]
    required: dict[str, object] = {
        name: tyro.MISSING for name, field in recipe_fields().items() if field.default is MISSING
    }
    blank = make_recipe(required) if {"-h", "--help"} & set(words) else load_recipe("tinyworld_pretrain")
    path = parse(kind, words, verb, summary, kind(path=tyro.MISSING, recipe=blank)).path
    written = make_recipe(required | read_values(path))
    given = parse(kind, words, verb, summary, kind(path=path, recipe=written))
    before = flatten(written)
    changed = {name: value for name, value in flatten(given.recipe).items() if value != before[name]}
    return replace(given, recipe=load_recipe(path, changed))


def _today(word: str) -> str:
    """Return a word of the command line with today's and the full name of its flag."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    if name in RENAMED:
        flag = as_flag(today(name, flag))
    return SHORT.get(flag, flag) + equals + value


VALUES = ConstructorRegistry()


@VALUES.primitive_rule
def _value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Return how numbers and true or false are read from a flag: as TOML writes them."""
    kind: Any = info.type
    if kind not in (bool, int, float):
        return None

    def read(words: list[str]) -> object:
        try:
            return {"true": True, "false": False}[words[0]] if kind is bool else kind(words[0])
        except (KeyError, ValueError):
            raise ValueError(f"{KINDS[kind]} is needed, not {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="true|false" if kind is bool else kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: type(value) is kind,
        str_from_instance=lambda value: [as_toml(value)],
    )


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How much of a data set `eval` and `compare` ask."""

    images: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of the pictures; the data file's own if not given."""
    limit: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Only the first N records; 0 = all."""
    max_new_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 256
    """Longest answer in tokens."""
    other: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """The picture to show as the other one where the data have no other; one is drawn if not given."""
