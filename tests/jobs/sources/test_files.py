"""Image files are cut into shards."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import data_by_id, plan_of, write_files


@settings(max_examples=30, deadline=None)
@given(
    stems=st.sets(st.text("abcé /", min_size=1, max_size=5).filter(lambda s: s.strip("/ ") == s and "//" not in s)),
    rows_per_file=st.integers(1, 9),
)
def test_file_shards_partition_the_listing(
    tmp_path_factory: pytest.TempPathFactory, stems: set[str], rows_per_file: int
) -> None:
    """Every image is in exactly one shard, and shards depend on the listing alone."""
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    names = [f"{stem}.jpg" for stem in stems] + ["last.png"]
    write_files(one, *names)
    write_files(other, *reversed(names), "note.txt")
    plan = plan_of(one, rows_per_file)
    assert plan.shards == plan_of(other, rows_per_file).shards
    assert plan == plan_of(one, rows_per_file)
    listed = [name for shard in plan.shards for name in shard.ids]
    assert sorted(listed) == sorted(names)
    assert all(shard.rows == rows_per_file for shard in plan.shards[:-1])
    assert [shard.number for shard in plan.shards] == list(range(len(plan.shards)))
    assert data_by_id(plan) == {name: name.encode() for name in names}
