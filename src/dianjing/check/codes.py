"""Every kind of finding: its code, how bad it is, what it means and what to do."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Literal, cast

from dianjing.language import language, say

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""error: training refuses it; warning: it trains, but hardly as meant; note: good to know."""

KEPT = 10_000


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of finding."""

    severity: Severity
    meaning: str
    fix: str
    fixed: bool
    """True if there are cases in which `--fix` corrects it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or worth knowing, and where."""

    code: str
    file: str
    text: str
    """The fault found here, in a sentence."""
    record: int | None = None
    """Its number in the file, from 0."""
    id: str = ""
    line: int = 0
    """From 1; 0 where a line says nothing."""
    column: int = 0
    field: str = ""
    picture: str = ""
    """The picture concerned, if it can be shown."""
    fixed: bool = False
    """True if `--fix` corrects it here, and leaves nothing else wrong with the record."""

    @property
    def severity(self) -> Severity:
        """Return how bad it is."""
        return CODES[self.code].severity

    @property
    def place(self) -> str:
        """Return file, record and line for a message."""
        line = f"line {self.line}" + (f", column {self.column}" if self.column else "") if self.line else ""
        record = "" if self.record is None else f'record {self.record} ("{self.id}")'
        return ": ".join(part for part in (self.file, line, record) if part)


class Findings:
    """All that was found; of a fault that is everywhere only the first KEPT are kept, and all are counted."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.fixed: Counter[str] = Counter()
        """Of these, the ones that `--fix` corrects."""
        self._kept: defaultdict[str, list[Finding]] = defaultdict(list)

    def add(self, finding: Finding) -> None:
        """Take note of a finding."""
        self.counts[finding.code] += 1
        self.fixed[finding.code] += finding.fixed
        if len(self._kept[finding.code]) < KEPT:
            self._kept[finding.code].append(finding)

    def of(self, code: str) -> list[Finding]:
        """Return the findings of a kind that were kept."""
        return self._kept[code]

    def codes(self) -> list[str]:
        """Return the kinds there are, errors first, else in the order of CODES."""
        order = list(CODES)
        return sorted(self.counts, key=lambda code: (SEVERITIES.index(CODES[code].severity), order.index(code)))

    def nothing_fixed(self, file: str) -> None:
        """Take back that `--fix` corrects findings of a file, which it refuses."""
        for code, kept in self._kept.items():
            self._kept[code] = [replace(one, fixed=one.fixed and one.file != file) for one in kept]
            self.fixed[code] = sum(one.fixed for one in self._kept[code])

    def fixes(self, code: str) -> str:
        """Return in words what `--fix` does about a kind of finding, "" for nothing."""
        fixed, number = self.fixed[code], self.counts[code]
        if fixed == number or not fixed:
            return say("--fix does") if fixed else ""
        return say("--fix does for {fixed:,} of {number:,}", fixed=fixed, number=number)

    def number(self, severity: Severity) -> int:
        """Return how many there are of a severity."""
        return sum(number for code, number in self.counts.items() if CODES[code].severity == severity)


_TABLE = """
not_json | error | the file is of another kind | as the finding says
encoding | error | the text is not UTF-8 | save the file as UTF-8
encoding_known | error | the text is in another encoding, GB18030 (GBK) or UTF-16 | save the file as UTF-8 | fixed
bom | note | the file begins with a byte order mark, which other readers stumble over | remove it | fixed
json_syntax | error | not JSON | correct the named place
json_unread | error | a part of the file that could not be told apart into records | correct the named place
json_comment | error | a comment; JSON has none | remove it | fixed
json_trailing_comma | error | a comma before a closing bracket | remove it | fixed
json_not_a_list | error | a .json file that is not a list in [ and ] | put them around | fixed
json_wrapped | error | the list of records is a part of an object | take it out | fixed
json_layout | error | one object of another layout, such as COCO's, not a list of records | convert it (--convert)
json_list_in_lines | error | a .jsonl file that is one JSON list | name it .json | fixed
file_empty | error | no record in the file | name another file
record_too_large | error | a record of more than 64 MB, which is not even parsed | look at what is in it
not_a_record | error | an element of the list that is not an object | remove it
id_missing | note | no id; XTuner refuses that | give it one | fixed
id_not_string | note | the id is a number | write it as a string | fixed
id_type | error | the id is neither a string nor a whole number | write a string
id_duplicate | warning | an id that an earlier record has | give each record its own
image_type | error | `image` is not a path, a list of paths or null | write the path of the picture
image_empty | error | `image` is an empty text | remove it, if the record has no picture | fixed
image_table | error | `image` is a table of marks and pictures | write a list of paths, and <image> in the text | fixed
images_key | error | the pictures stand under `images` | rename it to `image` | fixed
conversation_key | warning | `conversation` for `conversations`; others do not read it | rename it | fixed
messages_key | error | the conversation stands under `messages` | rename it to `conversations` | fixed
conversations_missing | error | no `conversations` | add them
conversations_type | error | `conversations` is not a list | write a list of messages
conversations_empty | error | `conversations` has no message | add a question and its answer
message_type | error | a message is not an object | write {"from": ..., "value": ...}
role_content | error | a message has `role` and `content` | rename them to `from` and `value` | fixed
role_alias | error | a role is called user, assistant or the like | call it human or gpt | fixed
role_unknown | error | a role of neither the asker nor the answerer, such as system | remove the message | fixed
turn_weight | error | the weight of an answer is neither 0 nor 1 | write 1 (learned) or 0 (shown only)
nothing_learned | error | each answer has weight 0 or loss false | remove the record
system_dropped | warning | a system text, which is dropped: a record has none | put it into the question if it matters
media_other | error | video, audio or another medium that is not read | use pictures, or remove the record
picture_in_text | error | a picture's path in the question, within marks | move it to `image` | fixed
picture_named | warning | a question names a picture file, and the record shows no picture | name it under `image`
value_type | error | the text of a message is not a string | write a string
text_surrogate | error | half a character (a lone surrogate) | remove it
text_broken | warning | U+FFFD in a text: characters were lost on the way | write the text again
text_escapes | note | \\n or \\t as two characters, which are learned as they stand | write the character itself
text_html | note | HTML tags or entities, which are learned as they stand | write the characters themselves
text_control | note | control or invisible characters | remove them
text_thought | note | <think> in an answer, which is learned as it stands | remove the thought, unless it is meant
text_repeats | warning | a text repeats the same few words over and over | write it again
no_answer | error | no question has an answer | add one
answer_empty | error | an answer without text | write it
answer_first | warning | an answer before the first question, which is dropped | remove it, or swap the roles
answer_twice | warning | an answer after an answer, which trains on an empty question | join them
question_unanswered | warning | a last question without answer, which is dropped | answer or remove it
answer_echo | warning | an answer that only repeats its question | write an answer
answer_refusal | warning | an answer in which an assistant excuses itself | write an answer, or remove the turn
marker_missing | error | a picture, but no `<image>` in an answered question | write <image> where it belongs | fixed
marker_foreign | error | another program's placeholder for the picture | write <image> | fixed
marker_as_text | warning | another program's placeholder stands in a question as text | remove it, or write <image>
marker_count | error | not as many `<image>` as pictures | add the picture or remove a marker
marker_in_answer | warning | `<image>` in an answer, which is learned as text | remove it
types_count | error | `types` is not a list with one string for each answered turn | correct it or remove it
type_unread | warning | a question type that is not read: another key, or not one string an answered turn | write `type`
special_string | warning | a text contains a mark of the chat template, which ends a turn | remove it
template_strings | error | special strings of the template that the tokenizer does not know | choose the LLM's own
path_absolute | error | an absolute path | write it relative to the image folder | fixed
path_outside | error | the path leads out of the image folder | put the picture inside
path_url | error | a URL or a data URI; nothing is fetched | store the picture as a file
path_backslash | error | a Windows path | write / for \\ | fixed
picture_case | error | the file's name has other capitals | write the name as it is | fixed
picture_missing | error | no such picture | add it, or name the right one
picture_truncated | error | the end of the file is missing | replace it
picture_broken | error | the file cannot be decoded | replace it
picture_format | error | no picture of a known format | save it as JPEG or PNG
picture_too_large | error | too many pixels, or too narrow (a decompression bomb is one) | scale or cut it
picture_32bit | error | 32-bit pixels, whose white is unknown | save it with 8 bits
picture_tiny | warning | a side shorter than 16 pixels | replace it
picture_narrow | warning | a side more than 10 times the other | cut it
picture_blank | warning | one colour and nothing else | replace it
picture_white | error | more than 8 bits, mostly dark, and nothing says which value is white | set data.white
picture_clipped | note | brighter than data.white in places, which become white | -
picture_preview | warning | the page that is read is a preview or a label | name another page (NAME#2), or save it alone
picture_channels | warning | channels that are not read | save a picture in RGB
picture_profile | note | an embedded colour profile, which not all readers apply | -
picture_rotated | note | stored lying, turned upright by EXIF: done here, not by all readers | -
picture_16bit | note | more than 8 bits, scaled to 8 | -
picture_alpha | note | transparent: laid on white, unless data.transparency says otherwise | -
picture_animated | note | several frames or pages, of which one is read | -
picture_suffix | note | the file is of another format than its name says | rename it
picture_duplicate | note | the same file under two names | -
picture_near_duplicate | note | looks the same as another picture | -
few_pictures | warning | fewer than ten different pictures in five records or more | add records with other pictures
record_duplicate | warning | the same pictures and texts as an earlier record | remove one
record_near_duplicate | note | as an earlier record but for capitals, spaces and punctuation | remove one
answer_everywhere | warning | the same long answer to many pictures | see where it comes from
answers_all_same | warning | every record has the same answer | nothing can be learned from it
yes_no_skew | warning | yes and no are far from balanced: always saying one of them is mostly right | add the other
language_switch | note | question and answer are in two scripts | -
leak_picture | warning | the picture is in the held-out set too | take it out of one of them
leak_near_picture | warning | a picture that looks the same is in the held-out set | take it out of one of them
leak_record | warning | the record is in the held-out set too | take it out of one of them
too_long | error | more tokens than max_tokens, which the recipe refuses | shorten it or raise data.max_tokens
too_long_skipped | warning | more tokens than max_tokens: the recipe skips it | shorten it or raise data.max_tokens
truncated | warning | more tokens than max_tokens: the recipe cuts its end off | shorten it or raise data.max_tokens
cut_too_deep | error | the cut takes a picture or all answers away | shorten it or raise data.max_tokens
beyond_pack | error | more positions than pack_tokens | raise data.pack_tokens
"""


def _rows() -> Iterator[tuple[str, Code]]:
    for line in _TABLE.strip().splitlines():
        name, severity, meaning, fix, *fixed = (cell.strip() for cell in line.split(" | "))
        yield name, Code(cast(Severity, severity), meaning, fix, bool(fixed))


CODES: Mapping[str, Code] = dict(_rows())


@cache
def translated(language: str) -> dict[str, list[str]]:
    """Return meaning and remedy of each code in a language other than English, {} for English."""
    if language == "en":
        return {}
    return json.loads((files("dianjing.check") / f"codes_{language}.json").read_text(encoding="utf-8"))


def in_words(code: str) -> tuple[str, str]:
    """Return meaning and remedy of a code in the user's language."""
    about = CODES[code]
    meaning, remedy = translated(language()).get(code, (about.meaning, about.fix))
    return meaning, remedy
