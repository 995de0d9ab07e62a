"""Promises of the training feed: the same batches whoever makes them, from any step on; no image lost or twice."""

import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import alit.training.data
import jobs.training.feed
import jobs.training.ray_feed
from alit.errors import TrainingError
from alit.images.decode import decode_image
from alit.images.formats import ImageError, Limits
from alit.training.data import Order, crop_randomness, random_crop
from alit.training.trainer import TrainingBatch
from jobs.runtime.session import ray_session as session_of_jobs
from jobs.sources.open import make_plan
from jobs.sources.read import read_rows
from jobs.sources.records import InputError, Row
from jobs.training.feed import Feed, held_out, make_feed
from jobs.training.local_feed import local_batches
from jobs.training.ray_feed import shared_batches

SIZE = 8


def file_of(pixels: np.ndarray, orientation: int | None = None) -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(out, "PNG", exif=exif)
    return out.getvalue()


def picture(number: int) -> bytes:
    """A picture that no other one looks like."""
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)
    return file_of(coarse.repeat(8, 0).repeat(8, 1))


def folder_of(path: Path, images: list[bytes]) -> Path:
    path.mkdir()
    for number, data in enumerate(images):
        (path / f"{number:03}.png").write_bytes(data)
    return path


def table_of(path: Path, images: list[bytes | None], rows: int = 9) -> Path:
    """Parquet files of some rows each, in row groups of 2."""
    path.mkdir()
    for start in range(0, len(images), rows):
        table = pa.table({"image": pa.array(images[start : start + rows], pa.binary())})
        pq.write_table(table, path / f"{start:03}.parquet", row_group_size=2)
    return path


@pytest.fixture(params=["files", "Parquet"])
def write(request, monkeypatch):
    """Writes images as files or as Parquet, of whose rows 4 stay together."""
    monkeypatch.setattr(jobs.training.feed, "SLICE", 4)
    return folder_of if request.param == "files" else table_of


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(alit.training.data, "CHUNK", 12)


def feed_of(source: Path | str, batch_size: int = 4, seed: int = 3, **options: object) -> Feed:
    return make_feed(str(source), size=SIZE, batch_size=batch_size, seed=seed, **options)


def same(one: TrainingBatch, other: TrainingBatch) -> bool:
    return torch.equal(one.images, other.images) and one[1:] == other[1:]


def assert_same(some: list[TrainingBatch], others: list[TrainingBatch]) -> None:
    assert len(some) == len(others)
    assert all(map(same, some, others))


def joined(shares: tuple[TrainingBatch, ...]) -> TrainingBatch:
    """The batch that several workers' shares are, in the order of their ranks."""
    images = torch.cat([share.images for share in shares])
    ids, rejects = (list(chain.from_iterable(lists)) for lists in zip(*(share[1:] for share in shares), strict=True))
    return TrainingBatch(images, ids, rejects)


# -------------------------------------------------------------------- order

ORDERS = st.tuples(
    st.lists(st.integers(1, 7), min_size=1, max_size=12),  # slices
    st.integers(1, 9),  # batch size
    st.integers(1, 20),  # images of a chunk
    st.integers(0, 5),  # seed
)


def order_of(given: tuple[list[int], int, int, int]) -> Order:
    slices, batch_size, chunk, seed = given
    with mock.patch.object(alit.training.data, "CHUNK", chunk):
        return Order(np.array(slices), min(batch_size, sum(slices)), seed)


def steps_of(order: Order, first: int, last: int) -> list[list[int]]:
    images = np.concatenate([order.images(part) for part in order.step_ranges(first, last)])
    return images.reshape(last - first, order.batch_size).tolist()


@settings(max_examples=50, deadline=None)
@given(ORDERS)
def test_order_shows_each_image_once_per_epoch(given):
    """An epoch shows no image twice and leaves out less than a batch."""
    order = order_of(given)
    steps = steps_of(order, 0, 2 * order.steps_per_epoch)
    for epoch in (steps[: order.steps_per_epoch], steps[order.steps_per_epoch :]):
        shown = set(chain.from_iterable(epoch))
        assert len(shown) == order.steps_per_epoch * order.batch_size > order.total - order.batch_size
        assert shown <= set(range(order.total))


@settings(max_examples=50, deadline=None)
@given(ORDERS, st.data())
def test_order_is_independent_of_the_first_step(given, data):
    """The images of a step do not depend on where a run begins or ends."""
    order = order_of(given)
    last = data.draw(st.integers(1, 3 * order.steps_per_epoch))
    first = data.draw(st.integers(0, last - 1))
    assert steps_of(order_of(given), first, last) == steps_of(order, 0, 3 * order.steps_per_epoch)[first:last]


@pytest.mark.parametrize("slices", [[1] * 30, [4] * 7 + [2]])
def test_order_differs_by_epoch_and_seed(slices):
    """Epochs and seeds have different orders, and every image is shown eventually."""

    def epoch(seed: int, number: int) -> tuple[int, ...]:
        order = order_of((slices, 4, 12, seed))
        return tuple(chain.from_iterable(steps_of(order, number * 7, (number + 1) * 7)))

    epochs = [epoch(seed, number) for seed in (0, 1) for number in range(6)]
    assert len(set(epochs)) == 12
    assert set(chain.from_iterable(epochs)) == set(range(30))


def test_order_mixes_few_slices_per_chunk():
    """A chunk shuffles the images of a few slices, so that reading stays local."""
    order = order_of(([4] * 100, 2, 12, 0))
    for part in order.step_ranges(0, order.steps_per_epoch):
        images = order.images(part)
        assert len(images) == 12 or part.last == order.steps_per_epoch
        assert len(set(images // 4)) <= 4
        assert sorted(images) != list(images)


# -------------------------------------------------------------------- crops


@pytest.mark.parametrize("shape", [(30, 20, 3), (20, 30), (5, 5, 3), (20, 20, 4), (8, 90, 3), (90, 8, 3), (1, 1, 3)])
def test_random_crop_has_the_requested_shape(shape):
    """A random crop of any image is a square RGB image of the requested size."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for seed in range(20):
        crop = random_crop(file_of(pixels), 16, np.random.default_rng(seed))
        assert (crop.shape, crop.dtype) == ((16, 16, 3), np.uint8)


def test_random_crop_mirrors_half_of_the_time():
    """About half of the crops are mirrored, and the generator determines each crop."""
    ramp = file_of(np.broadcast_to(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (30, 30, 3)).copy())
    crops = [random_crop(ramp, 8, np.random.default_rng(i)) for i in range(40)]
    mirrored = sum(bool(crop[0, 0, 0] > crop[0, -1, 0]) for crop in crops)
    assert 10 <= mirrored <= 30
    np.testing.assert_array_equal(crops[7], random_crop(ramp, 8, np.random.default_rng(7)))
    assert len({crop.tobytes() for crop in crops}) > 20


@pytest.mark.parametrize("sideways", [False, True])
def test_random_crop_covers_the_whole_image(sideways):
    """Of a picture of 200 x 100 whose grey tells the column."""
    pixels = np.zeros((100, 200, 3), np.uint8) + np.arange(200, dtype=np.uint8)[None, :, None]
    pixels = pixels.swapaxes(0, 1).copy() if sideways else pixels
    lows, sides = [], []
    for seed in range(100):
        crop = random_crop(file_of(pixels), 50, np.random.default_rng(seed))[..., 0].astype(float)
        line = np.sort(crop.mean(1 if sideways else 0))
        scale = (line[40] - line[10]) / 30
        lows.append(line[25] - 25 * scale)
        sides.append(50 * scale)
    assert 88 <= min(sides) < 91
    assert 98 < max(sides) <= 101
    assert min(lows) < 5
    assert max(lows) > 100


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 1), (8, 3)])
def test_random_crop_applies_the_orientation(orientation, turn):
    """Crops are taken from the image as its EXIF orientation turns it."""
    upright = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    stored = np.rot90(upright, turn).copy()
    for seed in range(5):
        expected = random_crop(file_of(upright), SIZE, np.random.default_rng(seed))
        found = random_crop(file_of(stored, orientation), SIZE, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, expected)


def test_random_crop_refuses_what_decoding_refuses():
    """Crops refuse the images that inference refuses."""
    random = np.random.default_rng(0)
    with pytest.raises(ImageError, match="the file starts with b'text'"):
        random_crop(b"text", SIZE, random)
    with pytest.raises(ImageError, match="at most 500 are read"):
        random_crop(picture(0), SIZE, random, Limits(max_pixels=500))


# -------------------------------------------------------------------- batches


def test_local_batches_show_each_image_once_per_epoch(write, tmp_path):
    """An epoch of batches shows no image twice, and epochs differ."""
    feed = feed_of(write(tmp_path / "in", [picture(i) for i in range(22)]))
    assert feed.steps_per_epoch == 5
    batches = list(local_batches(feed, 0, 15))
    assert all(batch.images.shape == (4, 3, SIZE, SIZE) and batch.images.dtype == torch.uint8 for batch in batches)
    epochs = [tuple(chain.from_iterable(batch.ids for batch in batches[i : i + 5])) for i in (0, 5, 10)]
    assert [len(set(epoch)) for epoch in epochs] == [20] * 3
    assert len(set(epochs)) == 3
    assert all(not batch.rejects for batch in batches)


def test_local_batches_hold_the_crops_of_their_ids(write, tmp_path):
    """A batch holds the crops of the images that its ids name."""
    images = [picture(i) for i in range(10)]
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
    feed = feed_of(write(tmp_path / "in", [picture(i) for i in range(22)]))
    undisturbed = list(local_batches(feed, 0, 12))
    for first in (0, 1, 3, 4, 5, 9, 11):
        assert_same(list(local_batches(feed, first, 12, threads=threads)), undisturbed[first:])
    assert not same(next(local_batches(feed_of(tmp_path / "in", seed=4), 0, 1)), undisturbed[0])


def test_local_batches_of_workers_join_to_one(write, tmp_path):
    """The shares of several workers join to the batch of one worker, with bad images too."""
    images = [picture(i) if i % 3 else b"text" for i in range(22)]
    feed = feed_of(write(tmp_path / "in", images))
    alone = list(local_batches(feed, 2, 8))
    assert any(batch.rejects for batch in alone)
    for workers in (2, 4):
        shares = [local_batches(feed, 2, 8, worker=worker, workers=workers) for worker in range(workers)]
        assert_same([joined(batch) for batch in zip(*shares, strict=True)], alone)


def test_local_batches_replace_and_report_bad_images(write, tmp_path):
    """A bad image is reported and replaced by the next good one of the batch."""
    images = [picture(i) for i in range(16)]
    images[3], images[8] = b"", picture(8)[:-30]
    good = feed_of(write(tmp_path / "good", [picture(i) for i in range(16)]))
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
    images = [picture(i) for i in range(8)]
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


def test_make_feed_refuses_impossible_batches(tmp_path):
    """Batches that cannot be filled or shared, and wrong seeds and inputs, are refused with one sentence."""
    folder = folder_of(tmp_path / "in", [picture(i) for i in range(10)])
    feed_of(folder, batch_size=10)
    with pytest.raises(TrainingError, match="batch_size 12 is larger than the data: 10 photographs"):
        feed_of(folder, batch_size=12)
    with pytest.raises(TrainingError, match="batch_size 10 cannot be shared equally by 3 workers; 9 or 12 can"):
        next(local_batches(feed_of(folder, batch_size=10), 0, 1, worker=0, workers=3))
    with pytest.raises(TrainingError, match="seed must be at least 0, got -1"):
        feed_of(folder, seed=-1)
    with pytest.raises(InputError, match="does not exist"):
        feed_of(tmp_path / "absent")


def test_local_batches_end_their_threads_on_close(tmp_path):
    """Closing the iterator of batches ends its threads."""
    batches = local_batches(feed_of(folder_of(tmp_path / "in", [picture(i) for i in range(10)])), 0, 10**9)
    next(batches)
    before = threading.active_count()
    batches.close()
    assert threading.active_count() < before


def test_held_out_gives_the_first_good_images(tmp_path):
    """Held-out images are the first good ones, decoded as for inference."""
    folder = folder_of(tmp_path / "in", [b"text", *(picture(i) for i in range(5))])
    found = held_out(str(folder), size=SIZE, most=3)
    assert (found.shape, found.dtype) == ((3, 3, SIZE, SIZE), torch.uint8)
    for number, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), decode_image(picture(number), SIZE).pixels)
    assert len(held_out(str(folder), size=SIZE, most=99)) == 5
    with pytest.raises(TrainingError, match="can be decoded: the file starts with b'text'"):
        held_out(str(folder / "000.png"), size=SIZE, most=1)


# -------------------------------------------------------------------- reading


def test_read_rows_reads_each_row_group_once(tmp_path, monkeypatch):
    """Of a Parquet file, only the row groups of the requested rows are read, each once."""
    folder = table_of(tmp_path / "in", [f"image {i}".encode() for i in range(9)])
    source = make_plan(str(folder), rows_per_file=100).source
    groups, read = [], pq.ParquetFile.read_row_groups

    def counted(self: pq.ParquetFile, asked: list[int], columns: list[str]) -> pa.Table:
        groups.extend(asked)
        return read(self, asked, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    wanted = [7, 2, 6, 2, 7, 8]
    with ThreadPoolExecutor(2) as pool:
        rows = read_rows(source, [Row(b"000.parquet", number) for number in wanted], 1000, pool)
    assert rows.data == [f"image {number}".encode() for number in wanted]
    assert rows.ids == [f"000.parquet#{number}" for number in wanted]
    assert groups == [1, 3, 4]


def test_read_rows_reports_damaged_tables_as_errors(tmp_path):
    """Tables that were damaged or shortened since planning give rows with errors."""
    folder = table_of(tmp_path / "in", [picture(i) for i in range(27)])
    source = make_plan(str(folder), rows_per_file=100).source
    (folder / "009.parquet").write_bytes(b"text")
    pq.write_table(pa.table({"image": pa.array([b"1"])}), folder / "018.parquet")
    wanted = [Row(name, number) for name in (b"000.parquet", b"009.parquet", b"018.parquet") for number in (0, 5)]
    with ThreadPoolExecutor(2) as pool:
        rows = read_rows(source, wanted, 1000, pool)
    assert [data is not None for data in rows.data] == [True, True, False, False, True, False]
    assert "the table cannot be read" in str(rows.errors[2])
    assert rows.errors[5] == "the table has no such row any more"


def test_make_feed_reads_structs_of_bytes_and_path(tmp_path):
    """A column of structs with bytes and path gives its images."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": picture(i), "path": "x"} for i in range(4)]
    pq.write_table(pa.table({"photo": pa.array(cells, kind)}), tmp_path / "t.parquet")
    (batch,) = local_batches(feed_of(tmp_path / "t.parquet", image_column="photo"), 0, 1)
    assert sorted(batch.ids) == [f"t.parquet#{i}" for i in range(4)]
    assert not batch.rejects


def test_local_batches_on_s3_equal_local_ones(bucket, tmp_path):
    """Batches of an input on S3 equal those of its local copy."""
    query, folder, _ = bucket
    images = [picture(i) for i in range(22)]
    for place in (folder, tmp_path):
        folder_of(place / "files", images)
        table_of(place / "table", images)
    for name in ("files", "table"):
        there, here = feed_of(f"s3://photos/{name}?{query}"), feed_of(tmp_path / name)
        assert_same(list(local_batches(there, 3, 12)), list(local_batches(here, 3, 12)))


# -------------------------------------------------------------------- Ray


class Rows:
    """In place of Ray Data's iterator: rows that come late, or wrong ones."""

    def __init__(self, *rows: pa.Table, seconds: float = 0.0) -> None:
        self.rows, self.seconds = rows, seconds

    def iter_batches(self, **options: object) -> Iterator[pa.Table]:
        time.sleep(self.seconds)
        yield from self.rows


def test_read_share_refuses_wrong_rows(tmp_path, monkeypatch):
    """Rows that are late, missing or another worker's are refused with one sentence."""
    feed = feed_of(folder_of(tmp_path / "in", [picture(i) for i in range(8)]))
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
    monkeypatch.setattr(jobs.training.ray_feed, "PATIENCE", 0.05)
    with pytest.raises(TrainingError, match=r"no images for step 0 after 0.05 s; Ray needs free CPUs"):
        batches(Rows(good, seconds=0.5))


def test_tasks_hold_about_a_chunk_each(tmp_path, monkeypatch):
    """Tasks hold about a chunk of images each, and a dataset a limited number of tasks."""
    folder = folder_of(tmp_path / "in", [picture(i) for i in range(22)])
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
    images = [picture(i) if i % 7 else b"text" for i in range(22)]
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
