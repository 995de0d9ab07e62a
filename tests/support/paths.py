"""Folders of the checkout that tests read."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
CLUSTER = ROOT / "cluster"
GOLDEN = TESTS / "golden"
SHARED = ROOT.parent / "shared"
"""Photographs and reference material beside the checkout; no part of it, so often absent."""
