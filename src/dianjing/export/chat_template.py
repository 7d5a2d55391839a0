"""Template -> the Jinja chat template that other programs render; it gives the text that training saw."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping

from dianjing.constants import IMAGE_MARKER
from dianjing.data.template import Template

_JINJA = string.Template("""\
{%- macro render(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{- $image -}}{%- if not loop.last -%}{{- "\\n" -}}{%- endif -%}
{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set state = namespace(round=0, begin=true) -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- $lead ~ $answer ~ $end -}}
{%- set state.begin = $ends_with_eos -%}
{%- elif message['role'] != 'user' -%}
{{- raise_exception("This model was trained without " ~ message['role'] ~ " messages; use user and assistant.") -}}
{%- else -%}
{%- if state.begin -%}{{- $bos -}}{%- set state.begin = false -%}{%- endif -%}
{%- set state.round = state.round + 1 -%}{{- $instruction -}}
{%- endif -%}
{%- endfor -%}
""")


def jinja(template: Template, bos: str, eos: str) -> str:
    """Return the chat template; `bos` is "" for a model whose prompts begin with nothing.

    A picture is a content part of type "image", or the marker written in the text. The prompt always ends
    where the answer begins: in these templates the assistant's header belongs to the user's turn.
    """
    content = "render(message['content'])"
    question, answer = (
        f"({content} | trim)" if trims else content for trims in (template.trims_questions, template.trims_answers)
    )
    return _JINJA.substitute(
        image=_literal(IMAGE_MARKER),
        bos=_literal(template.begin if template.joined else bos),
        lead=_literal(template.lead),
        answer=answer,
        end=_literal(template.suffix + ("" if template.suffix_as_eos else eos) + template.sep),
        ends_with_eos="false" if template.suffix_as_eos else "true",
        instruction=_expression(template.instruction, {"{input}": question, "{round}": "state.round"}),
    )


def _expression(text: str, fields: Mapping[str, str]) -> str:
    """Return a Jinja expression: the literal pieces of `text`, joined with what stands for its fields."""
    pieces = re.split("(" + "|".join(map(re.escape, fields)) + ")", text)
    return " ~ ".join(fields.get(piece) or _literal(piece) for piece in pieces if piece) or _literal("")


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
