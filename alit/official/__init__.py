"""Conversion of the published checkpoints to weights folders."""

from alit.official.conversion import Converted, convert, from_official

__all__ = ["Converted", "convert", "from_official"]
