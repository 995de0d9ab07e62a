"""A training feed: what it refuses, and its held-out images."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from feeds import SIZE, feed_of, folder_of
from image_files import blocks_image

from alit.errors import TrainingError
from alit.images.decode import decode_image
from jobs.sources.records import InputError
from jobs.training.feed import read_validation_images
from jobs.training.local_feed import local_batches

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_make_feed_refuses_impossible_batches(tmp_path):
    """Batches that cannot be filled or shared, and wrong seeds and inputs, are refused with one sentence."""
    folder = folder_of(tmp_path / "in", [blocks_image(i) for i in range(10)])
    feed_of(folder, batch_size=10)
    with pytest.raises(TrainingError, match="batch_size 12 is larger than the data: 10 images"):
        feed_of(folder, batch_size=12)
    with pytest.raises(TrainingError, match="batch_size 10 cannot be shared equally by 3 workers; 9 or 12 can"):
        next(local_batches(feed_of(folder, batch_size=10), 0, 1, worker=0, workers=3))
    with pytest.raises(TrainingError, match="seed must be at least 0, got -1"):
        feed_of(folder, seed=-1)
    with pytest.raises(InputError, match="does not exist"):
        feed_of(tmp_path / "absent")


def test_held_out_gives_the_first_good_images(tmp_path):
    """Held-out images are the first good ones, decoded as for inference."""
    folder = folder_of(tmp_path / "in", [b"text", *(blocks_image(i) for i in range(5))])
    found = read_validation_images(str(folder), size=SIZE, limit=3)
    assert (found.shape, found.dtype) == ((3, 3, SIZE, SIZE), torch.uint8)
    for number, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), decode_image(blocks_image(number), SIZE).pixels)
    assert len(read_validation_images(str(folder), size=SIZE, limit=99)) == 5
    with pytest.raises(TrainingError, match="can be decoded: the file starts with b'text'"):
        read_validation_images(str(folder / "000.png"), size=SIZE, limit=1)


def test_make_feed_reads_structs_of_bytes_and_path(tmp_path):
    """A column of structs with bytes and path gives its images."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": blocks_image(i), "path": "x"} for i in range(4)]
    pq.write_table(pa.table({"photo": pa.array(cells, kind)}), tmp_path / "t.parquet")
    (batch,) = local_batches(feed_of(tmp_path / "t.parquet", image_column="photo"), 0, 1)
    assert sorted(batch.ids) == [f"t.parquet#{i}" for i in range(4)]
    assert not batch.rejects
