"""Template -> the chat template inside a GGUF or in Ollama's Modelfile."""

from __future__ import annotations

import json

from dianjing.data.template import Template
from dianjing.export.chat_template import jinja

MEDIA = "<__media__>"
"""Stands for a picture in a text for llama.cpp; llama-server writes <__media_ and a random word instead."""

_PLAIN = "{{- content -}}"
_WITH_NEWLINES = """\
{%- set text = content -%}
{%- if '<__media' in text -%}
{%- set text = text | replace('__>\\n', '__>') | replace('__>', '__>\\n') -%}
{%- if text.endswith('__>\\n') -%}{%- set text = text[:-1] -%}{%- endif -%}
{%- endif -%}
{{- text -}}"""


def gguf_chat_template(template: Template, bos: str, eos: str) -> str:
    """Return the Jinja chat template of a GGUF.

    llama-server joins a message's parts to one string without the newline that training saw after a picture,
    so the template puts it there.
    """
    source = jinja(template, bos, eos)
    assert source.count(_PLAIN) == 1, "the macro that writes a message has changed"
    return source.replace(_PLAIN, _WITH_NEWLINES)


def modelfile(template: Template, bos: str, eos: str, files: list[str], stops: list[str]) -> str:
    """Return a Modelfile for `ollama create`; "" where Ollama's template language cannot say the template."""
    if "{round}" in template.instruction:
        return ""
    before, after = template.instruction.split("{input}")
    each, once = (bos, "") if not template.suffix_as_eos else ("", bos)
    end = template.suffix + ("" if template.suffix_as_eos else eos) + template.sep
    text = (
        f'{once}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{each}{before}{{{{ .Content }}}}{after}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{end}{{{{ end }}}}{{{{ end }}}}'
    )
    lines = [
        *(f"FROM ./{name}" for name in files),
        f'TEMPLATE """{text}"""',
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
    ]
    return "\n".join(lines) + "\n"
