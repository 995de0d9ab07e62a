"""Text, numbers and images as HTML."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from html import escape

_SIGNATURES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
)


# what HTML cannot hold: lone surrogates, control characters other than tab and newline
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _text(value: object) -> str:
    return escape(_UNPRINTABLE.sub("\ufffd", str(value)))


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "no score"
    if math.isinf(value):
        return "∞" if value > 0 else "\u2212∞"
    text = f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "\u2212", 1) if value < 0 else text


def _quantity(value: float, digits: int = 1) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "\u2013"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _data_uri(image: bytes) -> str:
    for signature, mime in _SIGNATURES:
        if signature.match(image):
            return f"data:{mime};base64,{b64encode(image).decode()}"
    raise ValueError(f"a picture must be PNG, WebP or JPEG, got bytes that begin {image[:12]!r}")
