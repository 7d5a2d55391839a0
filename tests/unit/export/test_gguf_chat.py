"""The chat templates inside a GGUF and in a Modelfile write what training saw."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dianjing.data.record import Turn, with_markers
from dianjing.data.template import TEMPLATES, prompt
from dianjing.export.gguf.chat import MEDIA, gguf_chat_template, modelfile

HISTORY = [("What is it?", "A dog.")]


def written(name: str, contents: list[str], history: list[tuple[str, str]]) -> str:
    messages: list[dict[str, Any]] = []
    for content, (_, answer) in zip(contents, history, strict=False):
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": contents[-1]})
    chat_template = gguf_chat_template(TEMPLATES[name], "<s>", "</s>")
    rendered, _ = render_jinja_template([messages], chat_template=chat_template, add_generation_prompt=True)
    return str(rendered[0])


def trained(name: str, history: list[tuple[str, str]], question: str) -> str:
    """Return the text of what training shows before an answer."""
    turns = [Turn(question=asked, answer=answer) for asked, answer in history]
    spans = prompt(TEMPLATES[name], turns, question)
    return "".join(("<s>" if one.bos else "") + one.text + ("</s>" if one.eos else "") for one in spans)


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("marker", [MEDIA, "<__media_7Hq0Xz__>"])
@pytest.mark.parametrize(("count", "question"), [(1, "What colour?"), (2, "Which?\nSay it."), (1, ""), (0, "Hi")])
def test_a_prompt_is_what_training_saw(name: str, marker: str, count: int, question: str) -> None:
    """llama-server joins pictures and text to one string without a newline, and names pictures at random."""
    expected = trained(name, HISTORY, with_markers(question, count))
    shown = written(name, [HISTORY[0][0], marker * count + question], HISTORY)
    assert shown.replace(marker, "<image>") == expected
    # A program that sends the newline itself gets no second one.
    shown = written(name, [HISTORY[0][0], f"{marker}\n" * count + question], HISTORY)
    assert shown.replace(marker, "<image>") == expected


def test_a_picture_in_the_history() -> None:
    first = with_markers("What is it?", 1)
    expected = trained("internlm2_chat", [(first, "A dog.")], "Sure?")
    shown = written("internlm2_chat", [f"{MEDIA}What is it?", "Sure?"], [(first, "A dog.")])
    assert shown.replace(MEDIA, "<image>") == expected


def go_template(text: str, messages: list[tuple[str, str]]) -> str:
    """Return what Go's template makes of messages, as far as ours goes: a range, if and else if."""
    before, inner = re.fullmatch(r"(.*)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}", text, re.DOTALL).groups()  # type: ignore[union-attr]
    shape = r'\{\{ if eq \.Role "user" \}\}(.*)\{\{ else if eq \.Role "assistant" \}\}(.*)\{\{ end \}\}'
    user, assistant = re.fullmatch(shape, inner, re.DOTALL).groups()  # type: ignore[union-attr]
    ways = {"user": user, "assistant": assistant}
    return before + "".join(ways[role].replace("{{ .Content }}", content) for role, content in messages)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_ollama_writes_the_same(name: str) -> None:
    template = TEMPLATES[name]
    text = modelfile(template, "<s>", "</s>", ["a.gguf", "b.gguf"], ["</s>", 'quoted "stop"'])
    if "{round}" in template.instruction:
        assert text == ""
        return
    assert text.startswith("FROM ./a.gguf\nFROM ./b.gguf\nTEMPLATE")
    assert text.endswith('PARAMETER stop "</s>"\nPARAMETER stop "quoted \\"stop\\""\n')
    found = re.search(r'TEMPLATE """(.*?)"""\n', text, re.DOTALL)
    assert found
    messages = [("user", HISTORY[0][0]), ("assistant", HISTORY[0][1]), ("user", "Sure?")]
    assert go_template(found[1], messages) == trained(name, HISTORY, "Sure?")
