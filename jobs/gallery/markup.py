"""The templates' environment: escaping, and filters for text, numbers and images."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from importlib import resources

import jinja2
from markupsafe import Markup

_SIGNATURES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that HTML cannot hold: lone surrogates, and control characters other than tab and newline."""


def read_asset(name: str) -> str:
    """Returns the text of a file in this package: a template, the styles or the script."""
    return resources.files("jobs.gallery").joinpath(name).read_text("utf-8")


def environment() -> jinja2.Environment:
    """Returns an environment for the package's templates, in which every expression is cleaned and escaped."""
    templates = jinja2.Environment(
        loader=jinja2.FunctionLoader(read_asset),
        autoescape=True,
        finalize=_replace_unprintable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "data_uri": data_uri,
        "plural": plural,
        "px": "{:.1f}".format,
        "quantity": quantity,
        "score": format_score,
    }
    return templates


def _replace_unprintable(value: object) -> object:
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNPRINTABLE.sub("\ufffd", value)
    return value


def format_score(value: float | None) -> str:
    """Formats a score with three significant digits; None and NaN are "no score"."""
    if value is None or math.isnan(value):
        return "no score"
    if math.isinf(value):
        return "∞" if value > 0 else "\u2212∞"
    text = f"{value:#.3g}".rstrip(".")
    return text.replace("-", "\u2212", 1) if value < 0 else text


def quantity(value: float, digits: int = 0) -> str:
    """Formats a number with thousands separators; a dash where it is not finite."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "\u2013"


def plural(count: int, noun: str) -> str:
    """Returns the count and its noun, with an s unless the count is 1."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def data_uri(image: bytes) -> Markup:
    """Returns an encoded image as a data URI, whose characters need no escaping.

    Raises:
        ValueError: The bytes are neither PNG, WebP nor JPEG.
    """
    for signature, mime in _SIGNATURES:
        if signature.match(image):
            return Markup(f"data:{mime};base64,{b64encode(image).decode()}")
    raise ValueError(f"an image must be PNG, WebP or JPEG, got bytes that begin with {image[:12]!r}")
