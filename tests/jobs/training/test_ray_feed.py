"""Batches that Ray Data makes equal those of one process."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from feeds import SIZE, assert_same, feed_of, folder_of, joined, table_of
from image_files import blocks_image

import alit.training.data
import jobs.training.feed
import jobs.training.ray_feed
from alit.errors import TrainingError
from alit.training.trainer import TrainingBatch
from jobs.runtime.session import ray_session as session_of_jobs
from jobs.training.local_feed import local_batches
from jobs.training.ray_feed import shared_batches

pytestmark = pytest.mark.usefixtures("small_chunks")


class Rows:
    """In place of Ray Data's iterator: rows that come late, or wrong ones."""

    def __init__(self, *rows: pa.Table, seconds: float = 0.0) -> None:
        self.rows, self.seconds = rows, seconds

    def iter_batches(self, **options: object) -> Iterator[pa.Table]:
        time.sleep(self.seconds)
        yield from self.rows


def test_read_share_refuses_wrong_rows(tmp_path, monkeypatch):
    """Rows that are late, missing or another worker's are refused with one sentence."""
    feed = feed_of(folder_of(tmp_path / "in", [blocks_image(i) for i in range(8)]))
    tasks = jobs.training.ray_feed._tasks(feed, 0, 2)

    def batches(rows: Rows) -> list[TrainingBatch]:
        return list(jobs.training.ray_feed.read_share(rows, feed, tasks, worker=0, workers=1))

    cropped = [jobs.training.ray_feed.Cropped(np.zeros((4, SIZE, SIZE, 3), np.uint8), list("abcd"), [])]
    good, second = jobs.training.ray_feed._row(0, 0, cropped), jobs.training.ray_feed._row(1, 0, cropped)
    assert [batch.ids for batch in batches(Rows(good, second))] == [list("abcd")] * 2
    for wrong in (jobs.training.ray_feed._row(2, 0, cropped), jobs.training.ray_feed._row(1, 1, cropped)):
        with pytest.raises(TrainingError, match=r"as \(step, worker, rows\) at step 1"):
            batches(Rows(good, wrong))
    with pytest.raises(TrainingError, match="ended before step 1, 1 steps too early"):
        batches(Rows(good))
    monkeypatch.setattr(jobs.training.ray_feed, "IMAGE_TIMEOUT", 0.05)
    with pytest.raises(TrainingError, match=r"no images for step 0 after 0.05 s; Ray needs free CPUs"):
        batches(Rows(good, seconds=0.5))


def test_tasks_hold_about_a_chunk_each(tmp_path, monkeypatch):
    """Tasks hold about a chunk of images each, and a dataset a limited number of tasks."""
    folder = folder_of(tmp_path / "in", [blocks_image(i) for i in range(22)])
    monkeypatch.setattr(jobs.training.ray_feed, "SEGMENT", 3)
    for chunk, steps in ((4, [[1], [1], [1]]), (12, [[3], [2], [3]]), (100, [[5, 5, 5], [5, 5, 5], [5, 5, 5]])):
        monkeypatch.setattr(alit.training.data, "CHUNK", chunk)
        tasks = jobs.training.ray_feed._tasks(feed_of(folder), 0, 1000)
        assert [[part.last - part.first for part in task] for task in tasks] == steps
    assert sum(len(task) for task in jobs.training.ray_feed._tasks(feed_of(folder), 4, 6)) == 2


@pytest.mark.usefixtures("ray_session")
def test_shared_batches_equal_local_ones(tmp_path, monkeypatch):
    """Batches that Ray Data makes equal those of this process, for one or more workers."""
    monkeypatch.setattr(jobs.training.feed, "SLICE", 4)
    monkeypatch.setattr(jobs.training.ray_feed, "ROW_BYTES", 2 * 4 * SIZE**2 * 3)  # two steps of one worker
    images = [blocks_image(i) if i % 7 else b"text" for i in range(22)]
    feed = feed_of(table_of(tmp_path / "table", images))
    expected = list(local_batches(feed, 3, 14))
    assert any(batch.rejects for batch in expected)
    with session_of_jobs():
        tasks = jobs.training.ray_feed._tasks(feed, 3, 14)
        shares = jobs.training.ray_feed.ray_shares(feed, tasks, 2)
        found: list[list[TrainingBatch]] = [[], []]

        def consume(worker: int) -> None:
            found[worker] += jobs.training.ray_feed.read_share(shares[worker], feed, tasks, worker=worker, workers=2)

        threads = [threading.Thread(target=consume, args=(worker,)) for worker in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_same([joined(batch) for batch in zip(*found, strict=True)], expected)

        monkeypatch.setattr(jobs.training.ray_feed, "SEGMENT", 3)  # several datasets one after the other
        assert_same(list(shared_batches(feed, 3, 14, worker=0, workers=1)), expected)

        broken = feed_of(folder_of(tmp_path / "broken", [b"text"] * 8))
        with pytest.raises(TrainingError) as error:
            next(shared_batches(broken, 0, 2, worker=0, workers=1))
        assert str(error.value).startswith("none of the 4 images of step 0 can be decoded; the first one, '00")
