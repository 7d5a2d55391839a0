"""The bytes of a data file that is not JSON in UTF-8 -> what it is instead."""

from __future__ import annotations

import codecs
import mmap
import re

CONVERTS = "; `dianjing check FILE --convert OUT.json` reads it"
KINDS = (
    (b"\x1f\x8b", f"compressed with gzip{CONVERTS}"),
    (b"\x28\xb5\x2f\xfd", f"compressed with zstd{CONVERTS}"),
    (b"BZh", f"compressed with bzip2{CONVERTS}"),
    (b"\xfd7zXZ\0", f"compressed with xz{CONVERTS}"),
    (b"PAR1", f"parquet{CONVERTS}"),
    (b"ARROW1", f"an Arrow file{CONVERTS}"),
    (b"\xff\xff\xff\xff", f"an Arrow stream{CONVERTS}"),
    (b"PK\3\4", "a ZIP archive (Excel's and torch's files are such); unpack it, or save the table as CSV"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"\x89PNG", "a picture; name the file with the records"),
    (b"\xff\xd8\xff", "a picture; name the file with the records"),
    (b"%PDF", "a PDF; name the file with the records"),
    (b"SQLite format 3", "an SQLite database; export the table as CSV"),
    (b"\x89HDF", "an HDF5 file; save the records as JSON"),
    (b"\x93NUMPY", "a NumPy array; save the records as JSON"),
    (b"GGUF", "a GGUF model; name the file with the records"),
    *((bytes([0x80, protocol]), "a Python pickle, never read; save the records as JSON") for protocol in range(2, 6)),
)
"""First bytes -> the file in words, with a way out."""
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
REFUSED_DOWNLOAD = (
    b"Entry not found",
    b"Repository not found",
    b"Access to ",
    b"Invalid username",
    b"404: ",
    b"Not Found",
)
"""The bodies of failed downloads, saved under the file's name."""
LOOKED_AT = 256
"""Bytes of a file that show its kind."""

BLOCK = 2**20
FREQUENT = frozenset(
    "的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起"
    "什图片照颜色红绿蓝黄白黑车狗猫男女孩物问答描述张哪几请站坐左右边前面是否正面用着显示"
)
"""Characters that every Chinese text is full of, and those of questions about pictures."""
FREQUENT_SHARE = 0.15
"""Of the characters beyond ASCII. Other text read as GB18030 has hardly any of them."""


def kind_of_file(start: bytes) -> str:
    """Return what a file is that begins so and cannot be JSON, with a way out; "" when it may be JSON."""
    for mark, words in KINDS:
        if start.startswith(mark):
            return words
    if found := WEB_PAGE.match(start):
        page = "XML" if found[1] == b"?xml" else "a web page"
        return f"{page}, not JSON; download the file itself again (its raw or download address)"
    if start.lstrip().startswith(REFUSED_DOWNLOAD):
        return "the message of a failed download; download it again"
    return ""


def likely_encoding(data: mmap.mmap | bytes) -> str:
    """Return the encoding of a text that is not UTF-8, as Python names it; "" when nothing makes it certain.

    It is certain where all of it can be decoded, and reads as text afterwards.
    """
    start = data[:64]
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16" if decodes(data, "utf-16") else ""
    if len(start) > 3 and 0 in start[:2]:
        name = "utf-16-be" if start[0] == 0 else "utf-16-le"
        return name if decodes(data, name) else ""
    decoder = codecs.getincrementaldecoder("gb18030")()
    frequent = beyond = 0
    try:
        for at in range(0, len(data), BLOCK):
            text = decoder.decode(data[at : at + BLOCK], final=at + BLOCK >= len(data))
            strange = [character for character in text if not character.isascii()]
            beyond += len(strange)
            frequent += sum(character in FREQUENT for character in strange)
    except UnicodeDecodeError:
        return ""
    return "gb18030" if beyond and frequent >= FREQUENT_SHARE * beyond else ""


def decodes(data: mmap.mmap | bytes, encoding: str) -> bool:
    """Return whether all of a text is in an encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for at in range(0, len(data), BLOCK):
            decoder.decode(data[at : at + BLOCK], final=at + BLOCK >= len(data))
    except UnicodeDecodeError:
        return False
    return True


def named_encoding(encoding: str) -> str:
    """Return how a message names an encoding."""
    return {"gb18030": "GB18030 (GBK)"}.get(encoding, encoding.upper())
