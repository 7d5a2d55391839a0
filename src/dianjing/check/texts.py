"""Properties of one question or answer: repetition, excuses, script, yes or no."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import Literal

Script = Literal["zh", "en", "other"]

REPEATED_WORDS = 4
"""A phrase of this many words..."""
REPEATED_TIMES = 5
"""...that comes so often..."""
REPEATED_SHARE = 0.3
"""...and makes up so much of a text is a loop."""
LOOP_WORDS = 40
EXCUSES = (
    "as an ai language model",
    "as a language model",
    "i'm sorry, but i can",
    "i am sorry, but i can",
    "i cannot see the image",
    "i can't see the image",
    "i'm unable to view",
    "i am unable to view",
)
EXCUSES_ZH = (
    "作为一个人工智能",
    "作为一名人工智能",
    "作为ai",
    "作为一个ai",
    "我无法查看图",
    "我看不到图",
    "我无法看到图",
)
EXCUSE_CHARACTERS = 200
"""An excuse stands at the beginning of an answer."""
_PUNCTUATION = b" \t\r\n.,;:!?'\"()[]{}-_`*~"
_CJK = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_YES_NO = re.compile(r"(?:(yes|是|是的|对)|(no|不是|否|不对))[\s,.!，。！]*+$", re.IGNORECASE)


_UNSEEN = "\x01-\x08\x0b\x0c\x0e-\x1f\x7f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff"
"""Control characters and invisible ones, but for those that join letters or emoji."""
ODD = re.compile(rf"[<＜&\\{_UNSEEN}]|\.[A-Za-z]{{3}}\b|!\[")
"""In every text that `oddities` or the marks of other programs are about."""
_CONTROL = re.compile(f"[{_UNSEEN}]")
_ESCAPE = re.compile(r"\\[nrt](?![a-z])|\\u[0-9a-fA-F]{4}|\\[\"/]")
_HTML = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{1,6}|#x[0-9a-f]{1,5});"
    r"|</?(?:br|p|div|span|b|i|u|em|strong|ul|ol|li|h[1-6]|table|t[rdh]|font|su[bp]|center|hr|pre|a)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)


def oddities(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield code and sentence of what a question or answer (its `name`) holds that is learned as it stands."""
    if found := _CONTROL.search(text):
        yield "text_control", f"the {name} holds U+{ord(found.group()):04X}"
    if "\n" not in text and (found := _ESCAPE.search(text)):
        yield "text_escapes", f"the {name} holds {found.group()} as {len(found.group())} characters"
    if found := _HTML.search(text):
        yield "text_html", f"the {name} holds {found.group()[:40]}"
    if name == "answer" and (found := _THOUGHT.search(text)):
        yield "text_thought", f"the answer holds {found.group()}"


def normalised(text: str) -> bytes:
    """Return a text without capitals, spaces and punctuation, for comparing."""
    return text.encode(errors="surrogatepass").lower().translate(None, _PUNCTUATION)


def digest(data: bytes) -> int:
    """Return 64 bits that stand for the data."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def script(text: str) -> Script:
    """Return in which script a text is written, English standing for Latin letters."""
    if text.isascii():
        return "en"
    if 3 * len(_CJK.findall(text)) >= len(text):
        return "zh"
    return "en" if 5 * sum(map(str.isascii, text)) >= 4 * len(text) else "other"


def yes_or_no(answer: str) -> Literal["yes", "no", ""]:
    """Return what an answer of one word says."""
    found = _YES_NO.match(answer) if len(answer) < 8 else None
    return "" if not found else "yes" if found.group(1) else "no"


def loops(text: str) -> str:
    """Return the phrase that a text repeats over and over; "" when it does not."""
    if len(text) < LOOP_WORDS * (2 if text.isascii() else 1):
        return ""
    words = text.split()
    if 8 * len(words) < len(text):
        words = list(text)  # a script without spaces
    if len(words) < LOOP_WORDS or 2 * len(set(words)) > len(words):
        return ""
    enough = max(REPEATED_TIMES, REPEATED_SHARE * len(words) / REPEATED_WORDS)
    if len(words) - len(set(pairwise(words))) < enough:  # too few pairs of words come again
        return ""
    grams = Counter(zip(*(words[i:] for i in range(REPEATED_WORDS)), strict=False))
    phrase, times = grams.most_common(1)[0]
    if times < enough:
        return ""
    return (" " if len(max(phrase, key=len)) > 1 else "").join(phrase)


def excuse(answer: str) -> str:
    """Return the words with which an assistant excuses itself; "" when it does not."""
    beginning = answer[:EXCUSE_CHARACTERS].lower()
    for words in EXCUSES if answer.isascii() else EXCUSES + EXCUSES_ZH:
        if words in beginning:
            return words
    return ""
