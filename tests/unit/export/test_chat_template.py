from __future__ import annotations

from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dianjing.data.record import Turn
from dianjing.data.template import TEMPLATES, Template, prompt, spans
from dianjing.export.chat_template import jinja

TURNS = [Turn(question="<image>\nWhat {is} 'it'?", answer='"Red" {{ 1 }}.'), Turn(question="然后呢？", answer="蓝。")]


def render(source: str, messages: list[dict[str, Any]]) -> str:
    """Render as transformers does."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source).render(messages=messages, add_generation_prompt=True)


def text_of(template: Template, turns: list[Turn], question: str) -> str:
    """Return what training reads up to the answer of `question`, BOS and EOS as text."""
    return "".join(
        ("<s>" if span.bos else "") + span.text + ("</s>" if span.eos else "")
        for span in prompt(template, turns, question)
    )


def messages_of(turns: list[Turn], question: str) -> list[dict[str, Any]]:
    said = [
        message
        for turn in turns
        for message in (
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": turn.answer},
        )
    ]
    return [*said, {"role": "user", "content": question}]


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_template_gives_the_text_of_training(name: str, number: int) -> None:
    template, turns = TEMPLATES[name], TURNS[:number]
    source = jinja(template, "<s>", "</s>")
    assert render(source, messages_of(turns, "Sure?")) == text_of(template, turns, "Sure?")


def test_a_whole_record_is_rendered_too() -> None:
    template = TEMPLATES["internlm2_chat"]
    said = "".join(span.text for span in spans(template, TURNS[:1]))
    messages = messages_of(TURNS[:1], "x")[:-1]
    assert render(jinja(template, "<s>", "</s>"), messages) == "<s>" + said


@pytest.mark.parametrize(
    ("content", "same_as"),
    [
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "<image>\nWhat?"),
        ([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}], "<image>\n<image>\nWhat?"),
        ([{"type": "image"}], "<image>"),
        ([{"type": "text", "text": "What?"}], "What?"),
    ],
)
def test_content_parts_say_what_the_text_says(content: list[dict[str, str]], same_as: str) -> None:
    source = jinja(TEMPLATES["internlm2_chat"], "<s>", "</s>")
    one, other = ([{"role": "user", "content": given}] for given in (content, same_as))
    assert render(source, one) == render(source, other)


def test_no_bos_where_the_tokenizer_has_none() -> None:
    assert render(jinja(TEMPLATES["qwen_chat"], "", ""), messages_of([], "x")).startswith("<|im_start|>user")


def test_an_unknown_role_is_refused() -> None:
    source = jinja(TEMPLATES["internlm2_chat"], "<s>", "</s>")
    with pytest.raises(jinja2.TemplateError, match="without system messages"):
        render(source, [{"role": "system", "content": "Be brief."}])
