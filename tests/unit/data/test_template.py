from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dianjing.data.encode import load_tokenizer
from dianjing.data.record import Turn
from dianjing.data.template import (
    TEMPLATES,
    Span,
    check_template,
    choose_template,
    get_template,
    prompt,
    spans,
    special_strings_missing,
)
from dianjing.errors import ModelError
from tests.xtuner import small_tokenizer


def tokenizer_with(*special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes that knows these special strings."""
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0] if special else None)


def test_the_template_of_the_course() -> None:
    turns = [Turn(question="Q {x}", answer="A"), Turn(question="R", answer="B")]
    assert spans(get_template("internlm2_chat"), turns) == [
        Span("<|im_start|>user\nQ {x}<|im_end|>\n<|im_start|>assistant\n", supervised=False, bos=True),
        Span("A<|im_end|>", supervised=True),
        Span("\n", supervised=False),
        Span("<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n", supervised=False),
        Span("B<|im_end|>", supervised=True),
        Span("\n", supervised=False),
    ]


def test_a_template_that_ends_turns_with_eos_begins_each_with_bos() -> None:
    found = spans(get_template("vicuna"), [Turn(question="Q", answer="A"), Turn(question="R", answer="B")])
    assert [(span.text, span.bos, span.eos) for span in found] == [
        ("USER: Q ASSISTANT:", True, False),
        ("A", False, True),
        ("\n", False, False),
        ("USER: R ASSISTANT:", True, False),
        ("B", False, True),
        ("\n", False, False),
    ]


def test_rounds_are_counted_from_one() -> None:
    found = spans(get_template("chatglm2"), [Turn(question="{round}", answer="A"), Turn(question="R", answer="B")])
    assert found[0].text == "[Round 1]\n\n问：{round}\n\n答："
    assert found[3].text == "[Round 2]\n\n问：R\n\n答："


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_where_the_answer_begins(name: str) -> None:
    template = get_template(name)
    first, last = Turn(question="Q", answer="A"), Turn(question="R", answer="B")
    whole = spans(template, [first, last])
    assert prompt(template, [first], "R") == whole[:4]
    assert whole[4].supervised


def test_all_of_xtuners_templates_are_there() -> None:
    assert len(TEMPLATES) == 26
    assert get_template("gemma").suffix == "<end_of_turn>"
    assert not get_template("gemma").suffix_as_eos
    assert get_template("llama3_chat").sep == ""
    assert get_template("chatglm3").suffix == ""
    assert get_template("qwen_chat").stop_words == ("<|im_end|>", "<|endoftext|>")


def test_special_strings_are_strings_of_the_template() -> None:
    for template in TEMPLATES.values():
        for string in template.special_strings:
            assert string in template.instruction + template.suffix


def test_an_unknown_template_suggests_a_near_one() -> None:
    with pytest.raises(ModelError, match=r'unknown template "internlm2-chat"; did you mean "internlm2_chat"\?'):
        get_template("internlm2-chat")
    with pytest.raises(ModelError, match=r'unknown template "xyz"; There are: default, .*phi3_chat'):
        get_template("xyz")


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.mark.parametrize(
    ("special", "name"),
    [
        (CHATML, "internlm2_chat"),
        ((*CHATML, "<|endoftext|>"), "qwen_chat"),
        (LLAMA3, "llama3_chat"),
        (("<start_of_turn>", "<end_of_turn>"), "gemma"),
        (("<|user|>", "<|assistant|>", "<|end|>"), "phi3_chat"),
        (("<|user|>", "<|assistant|>"), "chatglm3"),
        (("<eoh>", "<eoa>"), "internlm_chat"),
    ],
)
def test_the_template_is_chosen_by_what_the_tokenizer_knows(special: tuple[str, ...], name: str) -> None:
    tokenizer = tokenizer_with(*special)
    assert choose_template(tokenizer) == name
    check_template(get_template(name), tokenizer)


@pytest.mark.parametrize("special", [(), ("<|im_start|>",), ("<｜end▁of▁sentence｜>",)])
def test_an_unclear_template_is_asked_for(special: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match=r"name it \(language_model.template, or --template\), one of: default,"):
        choose_template(tokenizer_with(*special))


def test_two_templates_that_fit_are_both_named() -> None:
    with pytest.raises(ModelError, match=r"more than one fits \(.*\)"):
        choose_template(tokenizer_with(*CHATML, "<start_of_turn>", "<end_of_turn>"))


def test_a_template_of_another_llm_is_refused() -> None:
    tokenizer = small_tokenizer("tiny_bbpe_qwen")
    assert special_strings_missing(get_template("llama3_chat"), tokenizer) == list(LLAMA3)
    with pytest.raises(ModelError, match=r'"llama3_chat" does not belong to this LLM: <\|start_header_id\|>,'):
        check_template(get_template("llama3_chat"), tokenizer)
    check_template(get_template("qwen_chat"), tokenizer)
    check_template(get_template("vicuna"), tokenizer)


def test_an_unknown_string_that_becomes_one_unknown_token_is_missing() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert special_strings_missing(get_template("internlm2_chat"), tokenizer) == list(CHATML)


def test_the_tiny_llm_of_the_tests_gets_the_template_of_the_course(tiny_llm: Path) -> None:
    assert choose_template(load_tokenizer(tiny_llm)) == "internlm2_chat"
