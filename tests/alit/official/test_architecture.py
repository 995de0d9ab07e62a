"""The architecture is derived from the shapes of the tensors."""

from __future__ import annotations

from published import (
    golden,
    refusal,
    write,
)


def test_heads_are_required_for_unknown_widths(tmp_path):
    """A width and depth of no published preset need the number of heads, which must fit."""
    message = refusal(write(tmp_path, golden("official-mini")), heads=None)
    assert "width 96 with 2 blocks is not a published preset" in message
    assert "pass heads=N" in message
    assert "width must be a multiple of heads=5" in refusal(tmp_path / "alit.pth", heads=5)
