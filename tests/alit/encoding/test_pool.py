"""Images of several batches share iterations: without a model, each image knowing how many it needs, and with one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively_models import CONFIGS, Work, batches, close, images, model_of, same, still_active, thresholds
from small_models import TINY
from torch import Tensor

from alit.encoding.criteria import parse
from alit.encoding.pool import Pool, RolloutState, pooled
from alit.encoding.results import Encoded, ImageResult
from alit.errors import CriterionError
from alit.model.base import BaseTokens

pytestmark = pytest.mark.numeric

ANY = parse("l1:0.5")
K = 4


@dataclass
class Toy:
    """Batches of images, each image the number of iterations that it needs; what it saw of its own rollout."""

    batches: list[list[int]]
    size: int | None
    pulled: int = 0
    finished: int = 0
    waiting: list[int] = field(default_factory=list)
    slices: list[list[list[int]]] = field(default_factory=lambda: [[] for _ in range(K)])

    @property
    def needs(self) -> list[int]:
        return [need for batch in self.batches for need in batch]

    def arrivals(self) -> Iterator[RolloutState]:
        """States whose every part holds the images' running numbers."""
        images = 0
        for batch in self.batches:
            self.waiting.append(images - self.finished)
            self.pulled += 1
            yield RolloutState.start(
                torch.arange(images, images + len(batch)).float().reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1), ANY
            )
            images += len(batch)
        self.waiting.append(images - self.finished)

    def advance(self, state: RolloutState, iteration: int) -> RolloutState | None:
        column = state.images[:, :1, 0, 0]
        numbers = column.squeeze(-1).long()
        if iteration == 0:
            assert state.base is state.x_BSD is None
            base = BaseTokens(column[:, :, None, None], column[:, :, None, None], numbers[:, None])
        else:
            assert state.base is not None
            assert state.x_BSD is not None
            base = state.base
            for part in (state.x_BSD[:, 0, 0], base.latents_BDhw.flatten(), base.target_BDhw.flatten(), base.ids_BG):
                assert part is not None
                assert torch.equal(part.flatten().long(), numbers)
        state.record(column.squeeze(-1) + iteration / 8, None)
        self.slices[iteration].append(numbers.tolist())
        done = torch.tensor([self.needs[number] == iteration + 1 for number in numbers])
        state.finish(done, numbers[:, None].expand(-1, iteration + 1), done)
        self.finished += int(done.sum())
        if done.all():
            return None
        return replace(state, base=base, x_BSD=column[:, :, None]).take((~done).nonzero().squeeze(-1))

    def run(self) -> Iterator[list[ImageResult]]:
        return pooled(self.arrivals(), self.advance, Pool(K, self.size))


NEEDS = st.lists(st.lists(st.integers(1, K), max_size=9), max_size=12)


@settings(max_examples=60, deadline=None)
@given(NEEDS, st.integers(1, 7))
def test_pooled_returns_own_result_in_own_batch(batches, size):
    """Every image gets its own result, in its own batch and position."""
    answered = list(Toy(batches, size).run())
    assert [len(answers) for answers in answered] == [len(batch) for batch in batches]
    every = [answer for answers in answered for answer in answers]
    for number, (answer, need) in enumerate(zip(every, Toy(batches, size).needs, strict=True)):
        assert isinstance(answer.tokens, Tensor)
        assert answer.tokens.tolist() == [number] * need
        assert answer.trace == [number + k / 8 for k in range(need)]
        assert answer.satisfied


@settings(max_examples=60, deadline=None)
@given(NEEDS, st.integers(1, 7))
def test_pooled_slices_are_full_and_ordered(batches, size):
    """Every slice of an iteration except the last one is full, and the images run in order of arrival."""
    toy = Toy(batches, size)
    list(toy.run())
    for k, slices in enumerate(toy.slices):
        needing = [number for number, need in enumerate(toy.needs) if need > k]
        assert [number for numbers in slices for number in numbers] == needing
        assert [len(numbers) for numbers in slices[:-1]] == [size] * (len(slices) - 1)
        assert len(slices) == math.ceil(len(needing) / size)


@settings(max_examples=60, deadline=None)
@given(NEEDS, st.integers(1, 7))
def test_pooled_limits_waiting_images(batches, size):
    """At most K * (size - 1) images wait when a batch is pulled."""
    toy = Toy(batches, size)
    list(toy.run())
    assert len(toy.waiting) == len(batches) + 1
    assert max(toy.waiting) <= K * (size - 1)


def test_pooled_yields_batch_once_it_and_earlier_are_complete():
    """A batch is yielded as soon as its images and all earlier batches are complete."""
    toy = Toy([[1, 1], [2, 1], [1, 1], [2, 1], [1, 1]], size=2)
    pulled = []
    for _ in toy.run():
        pulled.append(toy.pulled)
    assert pulled == [1, 4, 4, 4, 5]  # the two long ones share their second iteration


def test_pooled_runs_deepest_full_slice_first():
    """The full slice of the latest iteration runs first; at the end, the partial one of the earliest runs first."""
    toy, order = Toy([[4, 4, 1], [4, 3, 2], [4]], size=2), []
    advance = toy.advance

    def watched(state: RolloutState, iteration: int) -> RolloutState | None:
        order.append((iteration, len(state)))
        return advance(state, iteration)

    list(pooled(toy.arrivals(), watched, Pool(K, 2)))
    assert order == [(0, 2), (1, 2), (2, 2), (3, 2), (0, 2), (0, 2), (1, 2), (2, 2), (0, 1), (1, 2), (2, 1), (3, 2)]


def test_pooled_without_size_uses_first_batch_size():
    """Without a slice size, the size of the first batch that has images is used."""
    toy = Toy([[], [2, 2, 1], [2, 1, 1, 2], [1]], size=None)
    list(toy.run())
    assert [[len(numbers) for numbers in slices] for slices in toy.slices] == [[3, 3, 2], [3, 1], [], []]


@pytest.mark.parametrize("batches", [[], [[]], [[], []]])
def test_pooled_runs_nothing_without_images(batches):
    """No iteration runs where there are no images, and empty batches give empty results."""
    toy = Toy(batches, size=None)
    assert list(toy.run()) == batches
    assert toy.slices == [[], [], [], []]


def test_pool_take_releases_memory_of_taken_images():
    """The images that a slice holds occupy no memory beyond their own size."""
    pool = Pool(1, 4)
    pool.add(0, RolloutState.start(torch.zeros(100, 3, 8, 8), ANY))
    pool.take(0)
    pool.add(0, RolloutState.start(torch.zeros(3, 3, 8, 8), ANY))
    sizes = []
    while pool.ready(flush=True) is not None:
        images = pool.take(0).images
        sizes.append(len(images))
        assert images.untyped_storage().nbytes() == images.nbytes
    assert sizes == [4] * 24 + [3]


SIZES = (0, 3, 1, 0, 4, 0)


@cache
def alone(model_name: str, spec: str) -> list[Encoded]:
    """Returns the results of batches of these sizes, each encoded alone."""
    return [model_of(model_name).encode(batch, spec) for batch in batches(*SIZES)]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(
    ("model_name", "name"),
    [(model_name, name) for model_name in CONFIGS for name in ("l1", "psnr", "code", "latent")]
    + [("kl", "l1"), ("kl", "latent")],
)
def test_encode_batches_agrees_with_encode(model_name, name, batch_size):
    """`encode_batches` returns for every batch what `encode` returns for it alone, and the same result every time."""
    model, spec = model_of(model_name), thresholds(model_name, name)
    inputs = batches(*SIZES)
    together = list(model.encode_batches(inputs, spec, batch_size))
    assert len(together) == len(inputs)
    for one, other in zip(together, alone(model_name, spec), strict=True):
        close(one, other)
    for one, again in zip(together, model.encode_batches(inputs, spec, batch_size), strict=True):
        same(one, again)


@pytest.mark.parametrize("model_name", [*CONFIGS, "kl"])
@pytest.mark.parametrize("length", TINY.lengths)
def test_encode_batches_fixed_agrees_with_encode(model_name, length):
    """`encode_batches` with `fixed:N` returns for every batch what `encode` returns for it alone."""
    model, inputs = model_of(model_name), batches(3, 0, 6)
    for one, batch in zip(model.encode_batches(inputs, f"fixed:{length}", 4), inputs, strict=True):
        close(one, model.encode(batch, f"fixed:{length}"))


def test_encode_batches_accepts_none_and_empty_batches():
    """`encode_batches` returns no result for no batches, and an empty result for an empty batch."""
    model = model_of("quantized")
    assert list(model.encode_batches([])) == []
    assert [len(encoded) for encoded in model.encode_batches(batches(0, 0), "l1:0")] == [0, 0]
    same(next(model.encode_batches(batches(0))), model.encode(images()[:0]))


@pytest.mark.parametrize("model_name", ["quantized", "sampled"])
def test_encode_batches_fills_slices_of_late_iterations(work, monkeypatch, model_name):
    """Late iterations of small batches run on full slices, with less than 0.7 times the encoder calls."""
    model, spec = model_of(model_name), thresholds(model_name, "l1")
    inputs = batches(*[4] * 16)
    alone = [still_active(model.encode(batch, spec)) for batch in inputs]
    needed = [sum(rows[k] for rows in alone if len(rows) > k) for k in range(4)]
    assert needed[0] == 64
    assert needed[3] >= 8
    found, slices, base_rows, encode = work(model), [[] for _ in range(4)], [], model.base.encode
    iterate = model.encoder.iterate

    def watched(x_BSD: Tensor) -> Tensor:
        slices[(x_BSD.shape[1] - 1 - 64) // 4 - 1].append(len(x_BSD))
        return iterate(x_BSD)

    monkeypatch.setattr(model.encoder, "iterate", watched)
    monkeypatch.setattr(model.base, "encode", lambda x: (base_rows.append(len(x)), encode(x))[1])
    encoded = list(model.encode_batches(inputs, spec, 8))
    assert [still_active(one) for one in encoded] == alone
    assert slices == [[8] * (rows // 8) + ([rows % 8] if rows % 8 else []) for rows in needed]
    assert base_rows == [8] * 8
    assert found.encoder == found.latent_decoder == found.pixel_decoder
    assert len(found.encoder) < 0.7 * sum(map(len, alone))


def test_encode_batches_fixed_runs_no_decoder(work):
    """`encode_batches` with `fixed:N` runs no decoder, and no iteration beyond length N."""
    model = model_of("quantized")
    found = work(model)
    list(model.encode_batches(batches(4, 4, 4, 4, 3), "fixed:12", 8))
    assert found == Work([8] * 6 + [3] * 3, [], [])


def test_encode_batches_is_lazy_and_leaks_no_inference_mode():
    """`encode_batches` yields a complete batch before it pulls the next one, and never yields in inference mode."""
    pulled = []

    def source() -> Iterator[Tensor]:
        for batch in batches(2, 2, 2):
            assert not torch.is_inference_mode_enabled()
            pulled.append(len(batch))
            yield batch

    stream = model_of("quantized").encode_batches(source(), "fixed:8")
    assert pulled == []
    for count, encoded in enumerate(stream, 1):
        assert not torch.is_inference_mode_enabled()
        assert (len(encoded), len(pulled)) == (2, count)


@pytest.mark.unchecked
def test_encode_batches_rejects_invalid_arguments():
    """`encode_batches` rejects an invalid batch size or criterion at once, and invalid images when it pulls them."""
    model = model_of("quantized")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.encode_batches([], batch_size=0)
    with pytest.raises(CriterionError, match="fixed:5"):
        model.encode_batches([], "fixed:5")
    stream = model.encode_batches([images(), images()[:, :2]], "fixed:4")
    assert len(next(stream)) == 7
    with pytest.raises(ValueError, match=r"images must have the shape \(batch, 3, 16, 16\), got \(7, 2, 16, 16\)"):
        next(stream)
