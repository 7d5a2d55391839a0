"""`dianjing completion bash|zsh|fish`: what lets a shell complete verbs, flags and recipes."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args, get_type_hints

import tyro

from dianjing.cli.flags import parse
from dianjing.config.fields import recipe_fields
from dianjing.config.load import as_flag, shipped_recipes
from dianjing.config.schema import Recipe

NAME = "completion"
SUMMARY = "print what lets a shell complete verbs, flags and recipes"
DETAILS = """
bash: dianjing completion bash > ~/.local/share/bash-completion/completions/dianjing

zsh: dianjing completion zsh > DIR/_dianjing, where DIR is in $fpath

fish: dianjing completion fish > ~/.config/fish/completions/dianjing.fish

What is printed knows the verbs of this version: print it again after an update."""
BASH = """\
_dianjing() {{
    local found=
    if ((COMP_CWORD == 1)); then
        found={verbs}
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$found" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _dianjing dianjing"""
ZSH = """\
#compdef dianjing
local found=
if ((CURRENT == 2)); then
    found={verbs}
else
    case $words[2] in
{cases}
    esac
fi
compadd -- ${{=found}}
_files"""
Words = Mapping[str, Sequence[str]]
"""Verbs, each with the words that may follow it."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing completion`."""

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh", "fish"]], tyro.conf.arg(metavar="bash|zsh|fish")]
    """The shell that reads it."""


def run(arguments: list[str]) -> int:
    """Print the program of a shell."""
    given = parse(Arguments, arguments, NAME, f"{SUMMARY}\n{DETAILS}")
    found = words()
    if given.shell == "fish":
        print("\n".join(fish(found)))
        return 0
    template, indent = (BASH, 12) if given.shell == "bash" else (ZSH, 8)
    cases = (f"{' ' * indent}{verb}) found={_quoted(after)} ;;" for verb, after in found.items())
    print(template.format(verbs=_quoted(found), cases="\n".join(cases)))
    return 0


def words() -> Words:
    """Return the verbs, each with its flags and with the words that its first argument can be."""
    from dianjing.cli.main import VERBS  # which imports the verbs, by name

    first = {
        "help": tuple(VERBS),
        "completion": ("bash", "zsh", "fish"),
        "recipes": ("list", "copy", "new", *shipped_recipes()),
        "make": ("prompts",),
        **dict.fromkeys(("train", "plan"), tuple(shipped_recipes())),
    }
    found = {verb: (*first.get(verb, ()), *flags(verb)) for verb in VERBS}
    return {**found, "help": first["help"]}


def flags(verb: str) -> Iterator[str]:
    """Yield the flags of a verb, and those that only one of its actions has."""
    module = importlib.import_module(f"dianjing.cli.{verb}")
    (positional,) = get_args(tyro.conf.Positional[int])[1:]
    for owner in (module.Arguments, getattr(module, "NewArguments", None)):
        if owner is None:
            continue
        hints = get_type_hints(owner, include_extras=True)
        for field in fields(owner):
            kind, *about = get_args(hints[field.name]) or (hints[field.name],)
            if kind is Recipe:
                yield from ("--engine", *map(as_flag, recipe_fields()))
            elif positional not in about:
                yield as_flag(field.name)
    yield "--help"


def fish(found: Words) -> Iterator[str]:
    """Yield the lines that fish reads."""
    from dianjing.cli.main import VERBS

    for verb in found:
        about = shlex.quote(VERBS.get(verb, "say more about a verb"))
        yield f"complete -c dianjing -n __fish_use_subcommand -a {verb} -d {about}"
    for verb, after in found.items():
        for word in after:
            offered = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            yield f"complete -c dianjing -n '__fish_seen_subcommand_from {verb}' {offered}"


def _quoted(names: Sequence[str] | Words) -> str:
    return shlex.quote(" ".join(names))
