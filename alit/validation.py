"""Validation of user input: each error is one sentence that quotes the value."""

from __future__ import annotations

import math

from alit.errors import AlitError


def option(field: str) -> str:
    """Returns the command-line spelling of an option's field: `rows_per_file` is `--rows-per-file`."""
    return f"--{field.replace('_', '-')}"


def require(condition: bool, message: str, error: type[Exception] = AlitError) -> None:
    """Raises an error with a message unless the condition holds.

    Raises:
        Exception: The condition does not hold; of the type `error`.
    """
    if not condition:
        raise error(message)


def require_integer(
    name: str, value: object, minimum: int, maximum: int, *, error: type[Exception] = AlitError
) -> None:
    """Checks that a value from JSON is an integer in a closed range; booleans are not integers.

    Raises:
        Exception: The value has another type or lies outside; of the type `error`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise error(f"{name} must be a whole number from {minimum} to {maximum}, got {value!r}")


def require_range(
    name: str,
    value: float | None,
    minimum: float,
    maximum: float = math.inf,
    *,
    error: type[Exception] = AlitError,
) -> None:
    """Checks that a number lies in a closed range; None, the value of an absent option, passes.

    Args:
        name: The name of the value in the error message, such as `--workers` or `batch_size`.
        value: The number; NaN lies in no range.
        minimum: The smallest allowed value.
        maximum: The largest allowed value.
        error: The exception type.

    Raises:
        Exception: The value lies outside; of the type `error`.
    """
    if value is None or minimum <= value <= maximum:
        return
    low, high = (str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in (minimum, maximum))
    bounds = f"at least {low}" if maximum == math.inf else f"between {low} and {high}"
    raise error(f"{name} must be {bounds}, got {value}")
