"""Which questions and answers do not belong in a data set, each with the reason it is dropped for."""

from __future__ import annotations

import re

from dianjing.eval.score import exact_match, normalise, token_f1
from dianjing.make.prompts import Language

REASONS = {
    "refusal": "the model refuses, or speaks of itself as an AI",
    "leak": "the text speaks of a caption or of instructions, or holds marks of a template such as <image>",
    "preamble": 'the answer begins with an introduction ("Sure! Here is ...")',
    "empty": "there is no word in it",
    "too_long": "the question or the answer is longer than any should be",
    "echo": "the answer only repeats the question",
    "language": "it is not in the language asked for (Chinese or not, by the script)",
    "same_question": "the question was put to this picture before",
    "blind": "the model gives the same answer without the picture",
}
"""Reason code -> what it means, in the order in which they are looked for."""

MAX_QUESTION_CHARACTERS = 600
MAX_ANSWER_CHARACTERS = 6000
BLIND_F1 = 0.8
"""From this token F1 on, an answer given without the picture counts as the same."""
JUDGED_WORDS = 8
"""Shorter texts are not judged for their language: they may be a name or a number."""
CHINESE_SHARE = {"zh": (0.3, 1.0), "en": (0.0, 0.2)}
"""Least and greatest share of Chinese characters among words, each character counted as a word."""

_REFUSALS = re.compile(
    r"""\A["'\s]*(
        (i['’]?\s?a?m\s+|i\s+am\s+)?(very\s+|so\s+|really\s+)?sorry\b | i\s+apologi[sz]e | unfortunately,?\s+i\b
      | i\s*(can['’]?t|cannot|can\s+not|am\s+unable|['’]m\s+unable|am\s+not\s+able|['’]m\s+not\s+able|won['’]?t)\b
      | (很|非常|十分)?(抱歉|对不起|不好意思|遗憾)
      | (很遗憾[，,]?)?我?(无法|不能|没有?办法)
        (看|查看|识别|提供|回答|描述|协助|帮|访问|处理|完成)
    )
    | \bas\s+an?\s+(ai|artificial\s+intelligence|language\s+model|large\s+language)\b
    | \bi['’]?\s?a?m\s+(just\s+|only\s+)?an?\s+(ai|language\s+model)\b
    | 作为(一个|一名|一款)?(AI|人工智能|大?语言模型|大模型) | 我(只)?是(一个|一名|一款)?(AI|人工智能|大?语言模型)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LEAKS = re.compile(
    r"""\b(the|this|your|given|provided)\s+(caption|description|prompt|instructions?)\s+
        (says?|states?|mentions?|describes?|provided|given|indicates?|suggests?|does\s+not)\b
    | \b(according\s+to|based\s+on|as\s+(mentioned|described|stated)\s+in)\s+the\s+
        (given\s+|provided\s+|above\s+)?(caption|description|prompt|text\s+description)\b
    | (根据|按照|依据|正如)(所?给的?|提供的|上述|以上)?(图片)?(描述|说明文字|标题|提示词?)
    | (描述|标题|说明文字|提示词?)(中|里)?(提到|写道|指出|显示|没有提)
    | <image> | </?s> | <\|[^|<>\n]{1,40}\|> | <(im_start|im_end|start_of_turn|end_of_turn|bos|eos|pad|unk)>
    | \[/?INST\] | <</?SYS>> | \[UNUSED_TOKEN_\d+\] | </?think> | \A\s*(USER|ASSISTANT|HUMAN|GPT)\s*:
    | \{pairs\} | <img\b | data:image/
    """,
    re.IGNORECASE | re.VERBOSE,
)
_PREAMBLES = re.compile(
    r"""\A["'\s]*(
        (sure|certainly|of\s+course|absolutely|okay|ok)\b[!,.:]
      | here\s+(is|are|['’]s)\s+(a|an|the|your|one|some)\b[^.\n]*:
      | (当然|好的|没问题|可以)[！!，,。:：] | (以下|下面)是
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_CHINESE = re.compile("[\u3400-\u9fff]")
_WORD = re.compile("[^\\W\\d_\u3400-\u9fff]+")


def is_refusal(text: str) -> bool:
    """Return whether a text refuses to answer."""
    return bool(_REFUSALS.search(text))


def why_dropped(question: str, answer: str, language: Language | None) -> str:
    """Return the reason code for which a turn is dropped, by itself; "" if it is kept."""
    both = (question, answer)
    if is_refusal(answer):
        return "refusal"
    if any(_LEAKS.search(text) for text in both):
        return "leak"
    if _PREAMBLES.search(answer):
        return "preamble"
    if not all(re.search(r"\w", text) for text in both):
        return "empty"
    if len(question) > MAX_QUESTION_CHARACTERS or len(answer) > MAX_ANSWER_CHARACTERS:
        return "too_long"
    if normalise(question) == normalise(answer):
        return "echo"
    if language and not all(is_in(text, language) for text in both):
        return "language"
    return ""


def is_in(text: str, language: Language) -> bool:
    """Return whether a text can be in a language, as far as its script tells."""
    chinese = len(_CHINESE.findall(text))
    words = chinese + len(_WORD.findall(text))
    least, most = CHINESE_SHARE[language]
    return words < JUDGED_WORDS or least <= chinese / words <= most


def same_answer(answer: str, blind: str) -> bool:
    """Return whether an answer given without the picture says the same."""
    return exact_match(answer, blind) or token_f1(answer, blind) >= BLIND_F1
