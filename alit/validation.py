"""Validation of values that users give: one sentence per fault, which quotes the value."""

from __future__ import annotations

import math

from alit.errors import AlitError


def option(field: str) -> str:
    """Returns the command-line spelling of an option's field: `rows_per_file` is `--rows-per-file`."""
    return f"--{field.replace('_', '-')}"


def require(condition: bool, message: str, error: type[Exception] = AlitError) -> None:
    """Raises an error with a message unless the condition holds.

    Raises:
        Exception: the condition does not hold; of the type `error`.
    """
    if not condition:
        raise error(message)


def require_range(
    name: str,
    value: float | None,
    minimum: float,
    maximum: float = math.inf,
    *,
    error: type[Exception] = AlitError,
) -> None:
    """Checks that a number lies in a closed range; None, an option that was not given, passes.

    Args:
        name: What the sentence calls the value, such as `--workers` or `batch_size`.
        value: The number; NaN lies in no range.
        minimum: The smallest allowed value.
        maximum: The largest allowed value.
        error: The exception type.

    Raises:
        Exception: the value lies outside; of the type `error`.
    """
    if value is None or minimum <= value <= maximum:
        return
    bounds = f"at least {minimum:g}" if maximum == math.inf else f"between {minimum:g} and {maximum:g}"
    raise error(f"{name} must be {bounds}, got {value}")
