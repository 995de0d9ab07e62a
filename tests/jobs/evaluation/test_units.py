"""Work units of an evaluation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobs.evaluation.units import evenly_spaced, work_units
from jobs.sources.records import Row


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 5), st.integers(1, 400))
def test_work_units_hold_every_image_once(count, size, workers, most):
    """Every selected image is in one batch, and batches do not depend on the number of workers."""
    kept = evenly_spaced(count, most)
    assert len(kept) == len(set(kept.tolist())) == min(count, most)
    rows = [Row(b"x", int(number)) for number in kept]
    found = work_units(rows, size, workers)
    assert [row for unit in found for row in unit.rows] == rows
    assert all(unit.first_batch * size == rows.index(unit.rows[0]) for unit in found)
