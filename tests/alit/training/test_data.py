"""The order of a training run's images, and their random crops."""

from itertools import chain
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import blocks_image, encoded

import alit.training.data
from alit.images.formats import ImageError, Limits
from alit.training.data import Order, random_crop

SIZE = 8

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


@pytest.mark.parametrize("shape", [(30, 20, 3), (20, 30), (5, 5, 3), (20, 20, 4), (8, 90, 3), (90, 8, 3), (1, 1, 3)])
def test_random_crop_has_the_requested_shape(shape):
    """A random crop of any image is a square RGB image of the requested size."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for seed in range(20):
        crop = random_crop(encoded(pixels), 16, np.random.default_rng(seed))
        assert (crop.shape, crop.dtype) == ((16, 16, 3), np.uint8)


def test_random_crop_mirrors_half_of_the_time():
    """About half of the crops are mirrored, and the generator determines each crop."""
    ramp = encoded(np.broadcast_to(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (30, 30, 3)).copy())
    crops = [random_crop(ramp, 8, np.random.default_rng(i)) for i in range(40)]
    mirrored = sum(bool(crop[0, 0, 0] > crop[0, -1, 0]) for crop in crops)
    assert 10 <= mirrored <= 30
    np.testing.assert_array_equal(crops[7], random_crop(ramp, 8, np.random.default_rng(7)))
    assert len({crop.tobytes() for crop in crops}) > 20


@pytest.mark.parametrize("sideways", [False, True])
def test_random_crop_covers_the_whole_image(sideways):
    """Crops of a 200 x 100 image, whose gray is its column, lie anywhere and hold most of the largest square."""
    pixels = np.zeros((100, 200, 3), np.uint8) + np.arange(200, dtype=np.uint8)[None, :, None]
    pixels = pixels.swapaxes(0, 1).copy() if sideways else pixels
    lows, sides = [], []
    for seed in range(100):
        crop = random_crop(encoded(pixels), 50, np.random.default_rng(seed))[..., 0].astype(float)
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
        expected = random_crop(encoded(upright), SIZE, np.random.default_rng(seed))
        found = random_crop(encoded(stored, orientation=orientation), SIZE, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, expected)


def test_random_crop_refuses_what_decoding_refuses():
    """Crops refuse the images that inference refuses."""
    random = np.random.default_rng(0)
    with pytest.raises(ImageError, match="the file starts with b'text'"):
        random_crop(b"text", SIZE, random)
    with pytest.raises(ImageError, match="at most 500 are read"):
        random_crop(blocks_image(0), SIZE, random, Limits(max_pixels=500))
