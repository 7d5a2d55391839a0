"""The first bytes of a file that Pillow does not open -> a picture that needs a package, or not a picture at all."""

from __future__ import annotations

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
STARTS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the picture: fetch it with `git lfs pull`"),
    (b"<!doctype html", "a web page, not a picture: download the picture again"),
    (b"<html", "a web page, not a picture: download the picture again"),
    (b"<?xml", "XML text, not a picture"),
    (b"<svg", "a drawing (SVG): save it as PNG"),
    (b"{", "text, not a picture: download the picture again"),
    (b"%pdf", "a PDF: save its page as PNG"),
    (b"8bps", "a Photoshop file: save it as PNG or TIFF"),
    (b"\xff\x0a", "JPEG XL, which is not read: save it as PNG"),
    (b"\0\0\0\x0cjxl ", "JPEG XL, which is not read: save it as PNG"),
    (b"\0\5\x16\7", "not a picture: macOS keeps what belongs to another file in it (._): remove it"),
    (b"\x93numpy", "a NumPy array: save it as PNG or TIFF"),
    (b"pk\3\4", "a ZIP archive: unpack it"),
    (b"\x1f\x8b", "compressed with gzip: unpack it"),
    (b"v/1\1", "OpenEXR, which is not read: save it with 8 or 16 bits"),
    (b"#?radiance", "Radiance HDR, which is not read: save it with 8 or 16 bits"),
    (b"\x1aE\xdf\xa3".lower(), "a video: save a frame of it"),
)


def is_heif(start: bytes) -> bool:
    """Return whether a file that begins so is HEIC or HEIF."""
    return start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS


def is_dicom(start: bytes) -> bool:
    """Return whether a file that begins so is DICOM: with its mark, or bare as old machines write it."""
    if start[128:132] == b"DICM":
        return True
    group, element = start[:2], start[2:4]
    first = group in (b"\x02\0", b"\x08\0") and element[1:2] in (b"\0",) and element[0] % 4 in (0, 1, 2)
    little = first and (start[4:6] in (b"UL", b"UI", b"CS", b"SH", b"DA", b"LO") or start[6:8] == b"\0\0")
    return bool(little or (start[:2] == b"\0\x08" and start[2:3] == b"\0" and start[4:6] in (b"UL", b"UI", b"CS")))


def is_tiff(start: bytes) -> bool:
    """Return whether a file that begins so is a TIFF."""
    return start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def description(start: bytes) -> str:
    """Return what a file of an unknown format is, and the way out."""
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        what = "a raw photo (CR3): develop it to JPEG" if brand == b"crx " else "a video: save a frame of it"
        return "AVIF, which the installed Pillow does not read" if brand in (b"avif", b"avis") else what
    beginning = start.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    return next((what for mark, what in STARTS if beginning.startswith(mark)), "")
