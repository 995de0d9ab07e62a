"""Validation of values that users give."""

from __future__ import annotations

import math

import pytest

from alit.errors import AlitError, ConfigError
from alit.validation import option, require, require_integer, require_range


@pytest.mark.parametrize(
    ("value", "minimum", "maximum", "sentence"),
    [
        (0, 1, math.inf, "--workers must be at least 1, got 0"),
        (2, 0, 1, "--workers must be between 0 and 1, got 2"),
        (2e9, 0.5, 1_234_567_890, "--workers must be between 0.5 and 1234567890, got 2000000000.0"),
        (math.nan, 0, 1, "--workers must be between 0 and 1, got nan"),
    ],
)
def test_require_range_quotes_the_value(value: float, minimum: float, maximum: float, sentence: str) -> None:
    """A number outside of its range, NaN among them, is refused with the bounds and the value."""
    with pytest.raises(ConfigError) as error:
        require_range("--workers", value, minimum, maximum, error=ConfigError)
    assert str(error.value) == sentence


def test_require_range_accepts_its_bounds() -> None:
    """Both bounds, and None for an option that was not given, pass."""
    for value in (None, 1, 4):
        require_range("workers", value, 1, 4)


@pytest.mark.parametrize("value", [0, 5, True, 2.0, "2", None])
def test_require_integer_refuses_other_types_and_values(value: object) -> None:
    """Booleans, floats, texts and integers out of range are quoted."""
    with pytest.raises(ConfigError) as error:
        require_integer("depth", value, 1, 4, error=ConfigError)
    assert str(error.value) == f"depth must be a whole number from 1 to 4, got {value!r}"
    require_integer("depth", 4, 1, 4)


def test_require_raises_unless_the_condition_holds() -> None:
    """A condition that holds passes; another one raises the message."""
    require(True, "never")
    with pytest.raises(AlitError, match=r"^a sentence$"):
        require(False, "a sentence")


def test_option_is_spelled_as_on_the_command_line() -> None:
    """Fields of option classes are named as users type them."""
    assert option("rows_per_file") == "--rows-per-file"
