"""A tokenizer's own chat template: its turns are found, proved, and refused where they cannot be told apart."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dianjing.constants import IGNORE_INDEX
from dianjing.data import chat_template
from dianjing.data.chat_template import TurnsError, read_turns
from dianjing.data.encode import Encoder, load_tokenizer
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.record import Record, Turn
from dianjing.data.template import OWN, Template, check_template, choose_template, own_template, template_for
from dianjing.errors import ModelError
from dianjing.export.chat_template import jinja
from tests import chat_templates
from tests.chat_templates import FAMILIES, IM, Family
from tests.xtuner import XTUNER

CHOICES = {
    "internlm2": "internlm2_chat",
    "qwen2": "qwen_chat",
    "qwen3": "qwen_chat",
    "llama3": "llama3_chat",
    "llama3.2": "llama3_chat",
    "mistral": OWN,
    "mistral, its marks being tokens": OWN,
    "llama2": OWN,
    "phi3": OWN,
    "gemma": OWN,
    "vicuna": OWN,
    "phi4 mini": OWN,
    "olmo2": OWN,
    "minicpm": OWN,
    "unheard of": OWN,
}
TURNS = (
    Turn(question="What is it?", answer="A {red} 'box', 红色 😀."),
    Turn(question="Two\n\nlines\nthen", answer="Yes, <b>two</b>.\nAnd more."),
    Turn(question="Sure?", answer="No."),
)


def own_encoder(tokenizer: Any) -> Encoder:
    return named_encoder(tokenizer, own_template(tokenizer))


def named_encoder(tokenizer: Any, template: Template) -> Encoder:
    return Encoder(
        tokenizer=tokenizer,
        template=template,
        picture_tokens=FixedCount(1),
        max_tokens=10_000,
        on_long_record="error",
        image_token_id=100_000,
    )


def record(*turns: Turn) -> Record:
    return Record(id="a", images=(), turns=turns, types=(), source="data.json", index=0)


def asked(tokenizer: Any, turns: tuple[Turn, ...], question: str) -> list[int]:
    """Return what the tokenizer's own template makes of a conversation that waits for an answer."""
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]
    template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    return tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": question}],
        chat_template=template,
        add_generation_prompt=True,
        return_dict=False,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_is_chosen_from_the_tokenizer(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    assert choose_template(tokenizer) == CHOICES[name]
    template, how = template_for(tokenizer)
    assert how.startswith(f"template: {template.name} (")
    check_template(template, tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_turns_have_the_ids_of_the_tokenizers_own_template(name: str) -> None:
    """Those of a template taken by name too, but for a system text that nobody asked for."""
    tokenizer = FAMILIES[name].tokenizer()
    template, _ = template_for(tokenizer)
    ids = named_encoder(tokenizer, template).prompt([(TURNS[0].question, TURNS[0].answer)], TURNS[1].question)[0]
    expected = asked(tokenizer, TURNS[:1], TURNS[1].question)
    left_out = len(expected) - len(ids)
    assert ids[-30:] == expected[-30:]
    if left_out:
        assert name in ("qwen2", "llama3.2")
        begin = 1 if name == "llama3.2" else 0
        assert [*expected[:begin], *expected[begin + left_out :]] == ids
        assert "system" in tokenizer.decode(expected[begin : begin + left_out])
    else:
        assert ids == expected


def test_what_is_not_its_own_is_refused_with_the_difference() -> None:
    glm = Family(chat_templates.GLM, ("<|user|>", "<|assistant|>", "[gMASK]", "<sop>", "<|endoftext|>"), None, "</s>")
    with pytest.raises(ModelError, match=r"chatglm3 is like it, but it writes '<\|user\|>.*own writes '\[gMASK\]<sop>"):
        template_for(glm.tokenizer())


def test_a_named_template_that_differs_is_said_in_one_line() -> None:
    _, how = template_for(FAMILIES["vicuna"].tokenizer(), "vicuna")
    assert "(as named; it writes '<s>USER: " in how
    assert template_for(FAMILIES["internlm2"].tokenizer(), "internlm2_chat")[1].endswith("(as named)")


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_those_of_the_tokenizers_own_template(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    encoder = own_encoder(tokenizer)
    for size in range(3):
        history = [(turn.question, turn.answer) for turn in TURNS[:size]]
        ids, _ = encoder.prompt(history, TURNS[size].question)
        assert ids == asked(tokenizer, TURNS[:size], TURNS[size].question)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_answer_is_learned_with_its_end_and_after_its_prompt(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    encoder = own_encoder(tokenizer)
    example = encoder.encode(record(*TURNS))
    learned = [label != IGNORE_INDEX for label in example.labels]
    begins = [i + 1 for i, (one, two) in enumerate(pairwise(learned)) if two and not one]
    ends = [i + 1 for i, (one, two) in enumerate(pairwise([*learned, False])) if one and not two]
    assert len(begins) == len(ends) == len(TURNS)
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        history = [(turn.question, turn.answer) for turn in TURNS[:number]]
        assert encoder.prompt(history, TURNS[number].question)[0] == example.input_ids[:begin]
        text = str(tokenizer.decode(example.input_ids[begin:end]))
        assert text.strip().startswith(TURNS[number].answer)
        assert tokenizer.added_tokens_decoder[example.input_ids[end - 1]].special
        assert text.removeprefix(encoder.template.lead + TURNS[number].answer) == encoder.template.suffix


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_writes_the_same_template(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    template = own_template(tokenizer)
    written = FAMILIES[name].tokenizer()
    written.chat_template = jinja(template, str(tokenizer.bos_token or ""), str(tokenizer.eos_token))
    assert own_template(written) == template
    assert asked(written, TURNS, " Now? ") == asked(tokenizer, TURNS, " Now? ")
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = written.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
    assert template.instruction.format(input="<image>\nWhat?") in text


def test_blanks_are_kept_or_taken_away_as_the_template_does() -> None:
    for name, kept in (("internlm2", True), ("llama3", False)):
        encoder = own_encoder(FAMILIES[name].tokenizer())
        ids = encoder.encode(record(Turn(question=" Q ", answer=" A\n"))).input_ids
        assert (" A\n" in encoder.tokenizer.decode(ids)) is kept
        assert encoder.prompt([], " Q ")[0] == asked(encoder.tokenizer, (), " Q ")


def test_a_date_stands_still() -> None:
    assert "Today: 26 Jul 2024" in own_template(FAMILIES["llama3.2"].tokenizer()).begin


def test_texts_as_content_parts_are_understood() -> None:
    """As in the templates of LLaVAs on the hub, which end an answer with nothing but a blank."""
    tokenizer = Family(chat_templates.PARTS).tokenizer()
    assert choose_template(tokenizer) == "vicuna"
    with pytest.raises(ModelError, match="no special token after an answer"):
        own_template(tokenizer)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        pytest.param(Family(chat_templates.SHOUTS, IM), "each message once, as it is", id="rewrites"),
        pytest.param(Family(chat_templates.CUTS, IM), "otherwise when it is the last one", id="cuts earlier turns"),
        pytest.param(Family(chat_templates.REASONS), "as templates that think do", id="thinks"),
        pytest.param(Family("{{ messages[0]['content'] }}" + "{{ 1 / 0 }}"), "cannot be rendered", id="fails"),
        pytest.param(Family("{% for"), "cannot be rendered", id="broken"),
        pytest.param(Family(None), "no chat template", id="none"),
    ],
)
def test_a_template_whose_turns_cannot_be_told_apart_is_refused(family: Family, reason: str) -> None:
    with pytest.raises(TurnsError, match=reason):
        read_turns(family.tokenizer())
    with pytest.raises(ModelError, match=f'template "own" cannot be used: .*{reason}'):
        template_for(family.tokenizer(), OWN)


@pytest.mark.parametrize("text", [chat_templates.ESCAPES, chat_templates.RUNS])
def test_a_template_that_leaves_its_sandbox_is_stopped(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="asks for what it may not have, and was stopped"):
        own_template(Family(text).tokenizer())
    template, how = template_for(Family(text, IM).tokenizer())
    assert template.name == "internlm2_chat"
    assert "was stopped" in how
    with pytest.raises(ModelError, match=r"unclear: .* was stopped"):
        template_for(Family(text).tokenizer())
    assert not list(tmp_path.iterdir())


def test_marks_of_another_family_in_the_vocabulary_are_not_taken_for_the_llms() -> None:
    """A tokenizer may hold the marks of the LLM that it was made from."""
    pipes = Family(chat_templates.PIPES, ("<|stop|>", *IM)).tokenizer()
    assert choose_template(pipes) == OWN
    with pytest.raises(ModelError, match=r"unclear: .*as templates that think do"):
        choose_template(Family(chat_templates.REASONS, IM).tokenizer())


@pytest.mark.parametrize("text", [chat_templates.INST_EACH, chat_templates.INST_TOKENS, chat_templates.VICUNA])
def test_a_blank_at_the_beginning_of_a_text_is_not_put_before_an_answer(text: str) -> None:
    """Tokenised alone, each span would get the blank that sentencepiece puts before a whole text."""
    tokenizer = load_tokenizer(XTUNER / "tokenizers" / "tiny_llama_spm")
    tokenizer.chat_template = text
    encoder = own_encoder(tokenizer)
    example = encoder.encode(record(*TURNS))
    messages = [
        {"role": role, "content": said}
        for turn in TURNS
        for role, said in (("user", turn.question), ("assistant", turn.answer))
    ]
    assert example.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    for size in range(3):
        history = [(turn.question, turn.answer) for turn in TURNS[:size]]
        ids, _ = encoder.prompt(history, TURNS[size].question)
        assert ids == asked(tokenizer, TURNS[:size], TURNS[size].question) == example.input_ids[: len(ids)]


NAMESPACE = "{% set ns = namespace(x=START) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"


@pytest.mark.parametrize(
    "greedy",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        NAMESPACE.replace("START", "'aaaaaaaa'").replace("ns.x + ns.x", "ns.x ~ ns.x"),
        NAMESPACE.replace("START", "[1, 1, 1, 1]"),
        "{% set x = 'x' * 10**10 %}",
        "{% set x = 10 ** (10 ** 10) %}",
        "{% set x = 'x' | center(3000000000) %}",
        "{% set x = 'x'.ljust(3000000000) %}",
        "{% set x = '%3000000000d' % 1 %}",
        "{% set x = '{:>3000000000}'.format(1) %}",
        "{% set x = 'a\\nb' | indent(3000000000) %}",
        "{% set x = messages | tojson(indent=300000000) %}",
    ],
)
def test_a_template_that_takes_too_much_time_or_memory_is_stopped(greedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 2.0)
    fork, children, begin = os.fork, list[int](), time.monotonic()
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    with pytest.raises(TurnsError, match=r"takes more than 2 s or .* bytes of memory .*, and was stopped"):
        read_turns(Family(greedy + "{{ bos_token }}" + chat_templates.CHATML, IM).tokenizer())
    assert time.monotonic() - begin < 10
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


@pytest.mark.parametrize("text", ["{{ raise_exception('Z') }}", "Z"], ids=["error", "text"])
def test_a_template_that_writes_too_much_is_refused_in_few_words(text: str) -> None:
    with pytest.raises(TurnsError, match="its chat template") as caught:
        read_turns(Family(text.replace("Z", "z" * 1_000_000) + chat_templates.CHATML, IM).tokenizer())
    assert len(str(caught.value)) < 1100


def test_a_template_may_multiply_a_little() -> None:
    turns = read_turns(Family("{{ '-' * 2**3 }}{{ 'x' | center(3) }}" + chat_templates.CHATML, IM).tokenizer())
    assert turns.begin == "-" * 8 + " x "


def test_a_fault_of_ours_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "check_turns", None)
    with pytest.raises(TurnsError, match="TypeError: 'NoneType' object is not callable"):
        read_turns(FAMILIES["internlm2"].tokenizer())


@pytest.mark.parametrize(
    ("templates", "complaint"),
    [
        ({"a": "{{ 1 }}"}, 'none of the chat templates of its tokenizer is named "default", but "a"'),
        ({"a": "{{ 1 }}", "b": "{{ 2 }}"}, 'none of .* is named "default", but "a", "b"'),
        ({"a": 1}, 'none of .* is named "default", but "a"'),
        ({"default": 1}, "is not text, but of type int"),
        (5, "is not text, but of type int"),
    ],
)
def test_chat_templates_without_a_default_text_are_refused_by_folder(templates: Any, complaint: str) -> None:
    tokenizer: Any = FAMILIES["internlm2"].tokenizer()
    tokenizer.chat_template = templates
    tokenizer.name_or_path = "models/llm"
    with pytest.raises(ModelError, match=f'template "own" cannot be used: models/llm: .*{complaint}; name another'):
        template_for(tokenizer, OWN)
    tokenizer.chat_template = {"default": FAMILIES["internlm2"].chat_template, "other": "{% for"}
    assert choose_template(tokenizer) == "internlm2_chat"
