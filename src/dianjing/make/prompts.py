"""Prompt files: what is asked about each picture; plain text that a user can copy and edit."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, cast, get_args

from dianjing.config.fields import nearest
from dianjing.errors import ConfigError

Form = Literal["text", "pairs"]
"""The form of a reply: "text", the answer itself; "pairs", questions and answers as JSON."""
Language = Literal["en", "zh"]
HEADER = {"kind": (), "language": get_args(Language), "reply": get_args(Form)}
"""The header lines a prompt file must have, `# name: value` -> the values allowed (none listed: any word)."""
QUESTIONS = "== questions =="
PAIRS = "{pairs}"
JSON_WANTED = {
    "en": "Reply with one JSON object of this form and nothing else:",
    "zh": "只回复一个这种格式的 JSON 对象，不要有其他内容：",
}
FORM_SHOWN = '{"pairs": [{"question": "...", "answer": "..."}]}'


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One way to ask about a picture."""

    name: str
    kind: str
    """The kind of its records: caption, conversation, ...; their type in the data, and part of a file's name."""
    language: Language | None
    """None: any; its replies are not checked for it."""
    reply: Form
    texts: tuple[str, ...]
    """The messages sent with the picture, each alone."""
    questions: tuple[str, ...] = ()
    """The questions that the records of a text reply ask, one drawn for each; (): the message itself is one."""
    sha256: str
    """Of the file."""


def shipped_prompts() -> dict[str, Path]:
    """Return the prompt files that come with the package, by name."""
    folder = Path(str(files("dianjing.make"))) / "prompts"
    return {file.stem: file for file in sorted(folder.glob("*.txt"))}


def summary(path: Path) -> str:
    """Return the first line of a prompt file, which says what it is for."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def choose_prompts(names: Sequence[str], language: Literal["en", "zh", "both"], pairs: int) -> list[Prompt]:
    """Return the prompts that `names` say: shipped ones ("caption", "caption_zh") and files of one's own.

    A shipped name without a language stands for those of `language`.

    Raises:
        ConfigError: there is no such prompt, a file is not one, or two have one name.
    """
    shipped = shipped_prompts()
    paths: list[Path] = []
    for name in names:
        wanted = get_args(Language) if language == "both" else (language,)
        known = [shipped[full] for full in (name, *(f"{name}_{one}" for one in wanted)) if full in shipped]
        if not known and not (name.endswith(".txt") or os.sep in name):
            offer = "".join(f"; did you mean '{other}'?" for other in nearest(name, _known_names(shipped)))
            raise ConfigError(
                f"{name}: no such shipped prompt, and not a .txt file; there are {', '.join(shipped)}{offer}"
            )
        paths += known or [Path(name)]
    prompts = [read_prompt(path, pairs) for path in paths]
    if twice := {prompt.name for prompt in prompts if [other.name for other in prompts].count(prompt.name) > 1}:
        raise ConfigError(
            f"two prompts are called {', '.join(sorted(twice))}; name each once, and give files own names"
        )
    return prompts


def _known_names(shipped: Iterable[str]) -> list[str]:
    """Return the names that a shipped prompt can be asked for by: with its language, and without."""
    return sorted({*shipped, *(name.rsplit("_", 1)[0] for name in shipped)})


def read_prompt(path: Path, pairs: int) -> Prompt:
    """Return the prompt of a file, `{pairs}` replaced in its text.

    Raises:
        ConfigError: the file cannot be read or is not a prompt.
    """
    content = _read(path)
    header, body = _divide(content, path)
    text, mark, questions = body.partition(QUESTIONS)
    asked = tuple(line.strip() for line in questions.splitlines() if line.strip())
    if not text.strip():
        raise ConfigError(f"{path}: there is no prompt under the header; write what to ask about the picture")
    form = cast(Form, header["reply"])
    if (form == "text") != bool(asked):
        need = f"write the questions that the records ask under a line {QUESTIONS}, one a line"
        raise ConfigError(
            f"{path}: reply: {form}; {need if form == 'text' else f'remove {mark}: the reply has its own'}"
        )
    language = cast(Language, header["language"])
    message = text.strip().replace(PAIRS, str(pairs))
    return Prompt(
        name=path.stem,
        kind=header["kind"],
        language=language,
        reply=form,
        texts=(f"{message}\n\n{JSON_WANTED[language]}\n{FORM_SHOWN}" if form == "pairs" else message,),
        questions=asked,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
    )


def read_questions(path: Path) -> Prompt:
    """Return a file of questions, one a line, as a prompt that asks each alone and takes the reply as the answer.

    Raises:
        ConfigError: the file cannot be read, is empty, or asks a question twice.
    """
    content = _read(path)
    texts = [line.strip() for line in content.splitlines() if line.strip()]
    if not texts:
        raise ConfigError(f"{path}: there is no question in it; write one a line")
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ConfigError(f'{path}: "{twice[0]}" stands in it twice; remove one')
    return Prompt(
        name=path.stem,
        kind="questions",
        language=None,
        reply="text",
        texts=tuple(texts),
        sha256=hashlib.sha256(content.encode()).hexdigest(),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); give a text file") from None


def _divide(content: str, path: Path) -> tuple[dict[str, str], str]:
    """Return the header's values and what follows it."""
    lines = content.splitlines()
    header: dict[str, str] = {}
    number = 0
    for number, line in enumerate(lines, 1):
        if not line.startswith("#"):
            break
        name, colon, value = line[1:].partition(":")
        if number == 1 and name.strip() not in HEADER:
            continue  # the sentence on what it is for
        if not colon or name.strip() not in HEADER:
            raise ConfigError(f"{path}: line {number}: the header has {', '.join(f'# {key}:' for key in HEADER)}")
        header[name.strip()] = value.strip()
    if kind := re.sub(r"[\w-]", "", header.get("kind", "")):
        raise ConfigError(f'{path}: "# kind:" has {kind[0]!r} in it; write a word of letters, digits, _ and -')
    for name, allowed in HEADER.items():
        value = header.get(name, "")
        if not value or (allowed and value not in allowed):
            wanted = " or ".join(allowed) if allowed else "a word"
            raise ConfigError(f'{path}: "# {name}: {value}" in its header; write "# {name}:" and {wanted}')
    return header, "\n".join(lines[number - 1 :])
