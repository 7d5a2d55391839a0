"""A short answer -> how far it agrees with the references, by the rules of VQA, GQA, ChartQA and MMMU."""

from __future__ import annotations

import re
import statistics
import string
from collections.abc import Sequence

_COUNTED = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED.split())}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"(?<=\d),+(?=\d)")
POINT = re.compile(r"\.(?!\d)")
POINTS = 32
"""VQA's own program takes no more full stops than this out of an answer."""
CHART_TOLERANCE = 0.05
"""ChartQA: numbers within 5 % are right."""
_INSTEAD = """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've couldnt've=couldn't've
didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't
hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's isnt=isn't itd=it'd itd've=it'd've
it'dve=it'd've itll=it'll maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've
mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at
'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've shouldve=should've shouldnt=shouldn't
shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've
somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's someoned=someone'd someoned've=someone'd've
someone'dve=someone'd've someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
something'dve=something'd've somethingll=something'll thats=that's thered=there'd thered've=there'd've
there'dve=there'd've therere=there're theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll
theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't
whatll=what'll whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've
whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's
wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
you'dve=you'd've youll=you'll youre=you're youve=you've
"""
CONTRACTIONS: dict[str, str] = {short: full for short, _, full in (pair.partition("=") for pair in _INSTEAD.split())}


def vqa_words(text: str) -> str:
    """Return an answer as VQAv2 compares it: punctuation and articles gone, numbers as digits, lower case."""
    out = text
    for mark in PUNCTUATION:
        alone = mark + " " in text or " " + mark in text or THOUSANDS.search(text)
        out = out.replace(mark, "" if alone else " ")
    words = [NUMBERS.get(word, word) for word in POINT.sub("", out, count=POINTS).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def evalai_words(text: str) -> str:
    """Return an answer as TextVQA and VizWiz compare it: as VQAv2, its commas and question marks gone before."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_words(text.replace("\n", " ").replace("\t", " ").strip())


def vqa_score(answer: str, references: Sequence[str]) -> float:
    """Return VQA's accuracy: over all but one of the people's answers at a time, a third for each that agrees."""
    if not references:
        return 0.0
    agree = [reference == answer for reference in references]
    return statistics.mean(min(1, (sum(agree) - one) / 3) for one in agree)


def same_words(answer: str, reference: str) -> bool:
    """Return whether two answers are equal but for case and ASCII punctuation (GQA, AI2D)."""
    none = str.maketrans("", "", string.punctuation)
    return answer.lower().translate(none) == reference.lower().translate(none)


def chart_agrees(answer: str, reference: str) -> bool:
    """Return ChartQA's relaxed correctness: numbers within 5 %, everything else equal but for case."""
    given, wanted = _number(answer), _number(reference)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= CHART_TOLERANCE
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""MMMU: after one of these an open answer says its result."""
NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_open(answer: str) -> list[str | float]:
    """Return what MMMU reads from an open answer: each sentence's shortest end after a key word, and its numbers."""
    sentences = re.split(r"\.\s(?=[A-Z])|\n", answer.strip().strip(".").lower())
    keys, results = KEYS, []
    for number, sentence in enumerate(sentences, 1):
        if number == len(sentences):
            keys = (*KEYS, "=")
        ends = [sentence.split(key)[-1].strip() for key in keys if key in sentence]
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            results.append(shortest)
    results = results or [answer.strip().strip(".").lower()]
    results += [number for result in results for form in NUMBER_FORMS for number in re.findall(form, result)]
    return [*dict.fromkeys(form for result in results for form in mmmu_forms(result))]


def mmmu_forms(text: str) -> list[str | float]:
    """Return a reference or a result as MMMU compares it: a number of two decimals, or lower case."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]
