"""The records that planning and reading exchange."""

import pyarrow as pa

from jobs.sources.records import Rows


def test_rows_slices_keep_columns_aligned() -> None:
    """Slices of rows keep ids, data, errors and kept columns aligned."""
    kept = pa.array(range(5))
    rows = Rows(
        ids=list("abcde"), data=[b"1", None, b"3", b"4", None], errors=[None, "x", None, None, "y"], kept=[kept]
    )
    parts = list(rows.slices(2))
    assert [part.ids for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert [part.errors for part in parts] == [[None, "x"], [None, None], ["y"]]
    assert [part.kept[0].to_pylist() for part in parts] == [[0, 1], [2, 3], [4]]
