"""Batches that this process makes: the same from any step on, no image lost or shown twice."""

import threading
from itertools import chain

import numpy as np
import pytest
import torch
from feeds import SIZE, assert_same, feed_of, folder_of, joined, same, table_of
from image_files import blocks_image

from alit.errors import TrainingError
from alit.training.data import crop_randomness, random_crop
from jobs.training.local_feed import local_batches

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_local_batches_show_each_image_once_per_epoch(write, tmp_path):
    """An epoch of batches shows no image twice, and epochs differ."""
    feed = feed_of(write(tmp_path / "in", [blocks_image(i) for i in range(22)]))
    assert feed.steps_per_epoch == 5
    batches = list(local_batches(feed, 0, 15))
    assert all(batch.images.shape == (4, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8 for batch in batches)
    epochs = [tuple(chain.from_iterable(batch.ids for batch in batches[i : i + 5])) for i in (0, 5, 10)]
    assert [len(set(epoch)) for epoch in epochs] == [20] * 3
    assert len(set(epochs)) == 3
    assert all(not batch.rejects for batch in batches)


def test_local_batches_hold_the_crops_of_their_ids(write, tmp_path):
    """A batch holds the crops of the images that its ids name."""
    images = [blocks_image(i) for i in range(10)]
    feed = feed_of(write(tmp_path / "in", images))
    for step, batch in enumerate(local_batches(feed, 0, 4)):
        for place, (name, pixels) in enumerate(zip(batch.ids, batch.images, strict=True)):
            file, _, row = name.partition("#")
            data = images[int(file.partition(".")[0]) + int(row or 0)]
            crop = random_crop(data, SIZE, crop_randomness(3, step, place))
            np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), crop)


@pytest.mark.parametrize("threads", [1, 3])
def test_local_batches_are_the_same_after_a_resume(write, tmp_path, threads):
    """A resumed run sees the same batches as an undisturbed one, with any number of threads."""
    feed = feed_of(write(tmp_path / "in", [blocks_image(i) for i in range(22)]))
    undisturbed = list(local_batches(feed, 0, 12))
    for first in (0, 1, 3, 4, 5, 9, 11):
        assert_same(list(local_batches(feed, first, 12, threads=threads)), undisturbed[first:])
    assert not same(next(local_batches(feed_of(tmp_path / "in", seed=4), 0, 1)), undisturbed[0])


def test_local_batches_of_workers_join_to_one(write, tmp_path):
    """The shares of several workers join to the batch of one worker, with bad images too."""
    images = [blocks_image(i) if i % 3 else b"text" for i in range(22)]
    feed = feed_of(write(tmp_path / "in", images))
    alone = list(local_batches(feed, 2, 8))
    assert any(batch.rejects for batch in alone)
    for workers in (2, 4):
        shares = [local_batches(feed, 2, 8, worker=worker, workers=workers) for worker in range(workers)]
        assert_same([joined(batch) for batch in zip(*shares, strict=True)], alone)


def test_local_batches_replace_and_report_bad_images(write, tmp_path):
    """A bad image is reported and replaced by the next good one of the batch."""
    images = [blocks_image(i) for i in range(16)]
    images[3], images[8] = b"", blocks_image(8)[:-30]
    good = feed_of(write(tmp_path / "good", [blocks_image(i) for i in range(16)]))
    bad = feed_of(write(tmp_path / "bad", images))
    told = []
    for intended, shown in zip(local_batches(good, 0, 8), local_batches(bad, 0, 8), strict=True):
        replaced = {name for name, _, _ in shown.rejects}
        told += shown.rejects
        for place, name in enumerate(intended.ids):
            following = [other for other in intended.ids[place:] + intended.ids[:place] if other not in replaced]
            assert shown.ids[place] == following[0]
            if name not in replaced:
                assert torch.equal(shown.images[place], intended.images[place])
    names = {name for name, _, _ in told}
    assert len(names) == 2
    assert len(told) == 4, "each once in each of the two epochs"
    assert {reason for _, reason, _ in told} == {"empty", "truncated"}
    assert all(message for _, _, message in told)


def test_local_batches_report_unreadable_images(tmp_path):
    """Images whose bytes cannot be read are reported as bad images."""
    images = [blocks_image(i) for i in range(8)]
    feed = feed_of(table_of(tmp_path / "table", [*images[:7], None]))
    assert ("unreadable", "the column 'image' is null here") in {
        (reason, message) for batch in local_batches(feed, 0, 2) for _, reason, message in batch.rejects
    }
    feed = feed_of(folder_of(tmp_path / "files", images))
    (tmp_path / "files" / "005.png").unlink()
    told = [reject for batch in local_batches(feed, 0, 2) for reject in batch.rejects]
    assert told == [("005.png", "unreadable", "the file cannot be read: No such file or directory")]


def test_local_batches_refuse_a_step_without_images(write, tmp_path):
    """A step without any good image is refused with one sentence."""
    feed = feed_of(write(tmp_path / "in", [b"text"] * 8))
    with pytest.raises(TrainingError, match=r"none of the 4 images of step 1 can be decoded; the first one, '0.*text"):
        next(local_batches(feed, 1, 2))


def test_local_batches_end_their_threads_on_close(tmp_path):
    """Closing the iterator of batches ends its threads."""
    batches = local_batches(feed_of(folder_of(tmp_path / "in", [blocks_image(i) for i in range(10)])), 0, 10**9)
    next(batches)
    before = threading.active_count()
    batches.close()
    assert threading.active_count() < before


def test_local_batches_on_s3_equal_local_ones(bucket, tmp_path):
    """Batches of an input on S3 equal those of its local copy."""
    query, folder, _ = bucket
    images = [blocks_image(i) for i in range(22)]
    for place in (folder, tmp_path):
        folder_of(place / "files", images)
        table_of(place / "table", images)
    for name in ("files", "table"):
        there, here = feed_of(f"s3://photos/{name}?{query}"), feed_of(tmp_path / name)
        assert_same(list(local_batches(there, 3, 12)), list(local_batches(here, 3, 12)))
