"""Marks of other programs in a text: their placeholders for pictures, and those for video and audio."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dianjing.constants import IMAGE_MARKER

PICTURE_SUFFIX = r"\.(?:jpe?g|jfif|png|webp|bmp|gif|tiff?|avif|heic|heif|jp2|dcm|p[gpbn]m)"
_WORD = r"(?:image|img|picture|pic)"
_LABEL = r"(?:(?:Picture|Image|File|图片?)[ \t]*+\d*+[ \t]*+[:：][ \t]*+)?"
_OPEN, _CLOSE = r"[<＜][ \t]*+[|｜]?[ \t]*+", r"[ \t]*+[|｜]?[ \t]*+[>＞]"
FOREIGN_MARK = re.compile(
    rf"(?:<\|vision_start\|>)?(?:<\|image_pad\|>)+(?:<\|vision_end\|>)?"
    rf"|\(?<{_WORD}>\./</{_WORD}>\)?"
    rf"|<Img>[ \t]*+(?:<ImageHere>|<image>)[ \t]*+</Img>"
    rf"|(?:<start_of_image>|<boi>)(?:<end_of_image>|<eoi>)?"
    rf"|<im_start>[ \t]*+<image>[ \t]*+<im_end>"
    rf"|{_OPEN}(?:{_WORD}s?(?:[ _-]?(?:here|placeholder|token|pad|patch|soft[ _]token|content))?|图片?|图像)"
    rf"[ _-]?(?P<angled>\d*){_CLOSE}"
    rf"|\[[ \t]*+{_WORD}[ _-]?(?P<square>\d*)[ \t]*+\]"
    rf"|\{{\{{?[ \t]*+{_WORD}[ _-]?\d*[ \t]*+\}}?\}}",
    re.IGNORECASE,
)
"""How others write `<image>`; the marker itself matches too."""
UNMISTAKABLE = re.compile(
    r"<\|(?:image|img)[\w ]*\|>|</(?:image|img)>|<start_of_image>|＜(?:image|图)"
    r"|<(?:image|img)(?:here|[ _](?:placeholder|pad|token|soft_token|\d+))>",
    re.IGNORECASE,
)
"""Placeholders that can be nothing else, not even a tag of HTML."""
NAMED_PICTURE = re.compile(
    rf"{_LABEL}<(?P<tag>{_WORD})>[ \t]*+(?P<path>[^<>\n]+{PICTURE_SUFFIX})[ \t]*+</(?P=tag)>", re.IGNORECASE
)
"""A picture's path within its mark, as Qwen-VL has it."""
PATH_ALONE = re.compile(
    rf"^[ \t]*+{_LABEL}[^\s<>|*?\"]+{PICTURE_SUFFIX}[ \t]*+$|!\[[^\]\n]{{0,200}}\]\([^)\s]{{1,500}}\)",
    re.IGNORECASE | re.MULTILINE,
)
"""A line that is a picture's path, or a picture in Markdown."""

MEDIA_KEYS = frozenset(
    ["video", "videos", "video_path", "video_file", "audio", "audios", "audio_path", "audio_file", "point_cloud"]
)
_MEDIUM = r"(?:video|audio|speech|sound|point[ _]?cloud)"
MEDIA_MARK = re.compile(
    rf"<\|?[ \t]*{_MEDIUM}s?(?:here|[ _-]?(?:placeholder|token|pad|bos))?[ _-]?\d*[ \t]*\|?>|＜{_MEDIUM}＞",
    re.IGNORECASE,
)
_AS_A_TAG = re.compile(rf"`<{_MEDIUM}>|\b(?:html\d?|css|tags?|elements?|jsx|dom|javascript)\b|标签|元素", re.IGNORECASE)


def foreign_marks(text: str) -> Iterator[re.Match[str]]:
    """Yield the places where a text has a picture's placeholder in another spelling."""
    return (found for found in FOREIGN_MARK.finditer(text) if found.group() != IMAGE_MARKER)


def medium_in(text: str) -> str:
    """Return the mark of another medium in a question, "" when there is none; a tag of HTML is not one."""
    found = MEDIA_MARK.search(text)
    if not found:
        return ""
    name = found.group().strip("<>|＜＞ \t").lower()
    if f"</{name}" in text.lower():
        inside = re.search(rf"<{name}>[^<>\n]+\.\w{{2,4}}</{name}>", text, re.IGNORECASE)
        return found.group() if inside else ""
    return "" if _AS_A_TAG.search(text) else found.group()
