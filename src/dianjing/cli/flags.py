"""Flags -> the dataclass of a verb."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from dianjing.config.fields import KINDS, docstrings, recipe_fields
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
        description=_wrapped(summary),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
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


def _wrapped(text: str) -> str:
    """Return paragraphs in lines as long as the terminal's."""
    width = shutil.get_terminal_size().columns
    return "\n\n".join(textwrap.fill(paragraph, width, break_on_hyphens=False) for paragraph in text.split("\n\n"))


def _today(word: str) -> str:
    """Return a word of the command line with today's and the full name of its flag."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    if name in RENAMED:
        flag = as_flag(today(name, flag))
    return SHORT.get(flag, flag) + equals + value


VALUES = ConstructorRegistry()
METAVARS = {
    "FILE": ("data", "held_out", "path", "sample_path", "config", "report", "other"),
    "DIR": ("folder", "images", "output", "start_from", "llm", "vision_tower"),
    "NAME": ("template",),
    "RUN": ("init_from",),
}
"""Words for the value of a flag, by its name; a flag may say something else."""
UNSAID = ("", "''", "None", "False")
"""Defaults that the text of a flag explains, if anything is to be explained."""


@VALUES.struct_rule
def _flags(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return the fields of a dataclass as flags: with docstring, what each takes, and a default that says something."""
    owner, default = info.type, info.default
    if not is_dataclass(owner):
        return None
    docs, hints = docstrings(owner), get_type_hints(owner, include_extras=True)
    known = default is not tyro.MISSING and default is not tyro.MISSING_NONPROP
    return StructConstructorSpec(
        instantiate=owner,
        fields=tuple(
            StructFieldSpec(
                name=field.name,
                type=_described(hints[field.name], field.name),
                default=getattr(default, field.name) if known else _default(field, default),
                helptext=docs.get(field.name),
            )
            for field in fields(owner)
        ),
    )


def _described(hint: Any, name: str) -> Any:
    """Return the type of a flag with its metavar; what the type itself says comes later, and wins."""
    metavar = next((metavar for metavar, names in METAVARS.items() if name in names), None)
    described = tyro.conf.arg(
        metavar=metavar, help_behavior_hint=lambda label: "" if label in UNSAID else f"(default: {label})"
    )
    inner, *more = (hint.__origin__, *hint.__metadata__) if get_origin(hint) is Annotated else (hint,)
    return Annotated[inner, described, *more]


def _default(field: Field[Any], owner: object) -> object:
    if field.default is not MISSING:
        return field.default
    return owner if field.default_factory is MISSING else field.default_factory()


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
