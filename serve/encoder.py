"""The replicas that hold the models: batches by the work in them, images of all criteria in one rollout.

A batch is what `ray.serve.batch` gathers. It runs in a thread, and every image is answered in the iteration in which it
is done, while the others go on.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.util import metrics

from alit import metrics as distances
from alit.config import VQGANConfig
from alit.images import encode_image, to_uint8
from alit.pooling import Answer
from alit.selection import parse
from alit.tokenizer import Alit
from alit.weights import Weights, load_weights
from serve.config import Settings


@dataclass(frozen=True, eq=False, slots=True)
class Work:
    """One image to encode.

    Attributes:
        model: its name.
        pixels: uint8 [S, S, 3].
        criterion: already checked.
        cost: tokens that encoding it may take.
        deadline: `time.time()` after which nobody waits for it.
        most: the longest code that it may get.
        extras: of `serve.schemas.Extra`.
    """

    model: str
    pixels: np.ndarray
    criterion: str
    cost: int
    deadline: float
    most: int | None = None
    extras: frozenset[str] = frozenset()


@dataclass(eq=False, slots=True)
class Done:
    """Its tokens; `late` where the deadline passed before its turn."""

    num_tokens: int = 0
    score: float | None = None
    satisfied: bool = False
    ids: list[int] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    late: bool = False


def describe(name: str, weights: Weights) -> dict[str, Any]:
    """A model as /v1/models tells of it."""
    config = weights.model.config
    assert config.codebook_size is not None
    criteria = ["fixed", "l1", "mse", "psnr", "ssim", "code", "latent"]
    if not isinstance(config.base, VQGANConfig):
        criteria.remove("code")
    return {
        "name": name,
        "fingerprint": weights.fingerprint,
        "image_size": config.image_size,
        "lengths": list(config.lengths),
        "codebook_size": config.codebook_size,
        "latents_per_iteration": config.latents_per_iteration,
        "base_grid": config.grid,
        "default_criterion": config.criterion,
        "criteria": criteria,
    }


class Batch:
    """One batch, without Ray: images of one model, encoded together."""

    def __init__(self, model: Alit, work: Sequence[Work]) -> None:
        self.model, self.work = model, work

    def run(self) -> Iterator[dict[int, Done]]:
        """After every iteration the images that are done, by their numbers in the batch."""
        pixels = torch.from_numpy(np.stack([work.pixels for work in self.work])).permute(0, 3, 1, 2)
        criteria = [parse(work.criterion, functions=False) for work in self.work]
        for found in self.model.encode_each(pixels, criteria, [work.most for work in self.work]):
            if found:
                yield {number: self._done(self.work[number], answer) for number, answer in found}

    def _done(self, work: Work, answer: Answer) -> Done:
        assert answer.tokens is not None
        ids = answer.tokens.tolist()
        done = Done(len(ids), answer.trace[-1] if answer.trace else None, answer.satisfied, ids, answer.trace)
        if "reconstruction" in work.extras:
            (picture,) = to_uint8(self.model.decode([answer.tokens]))
            done.more["reconstruction"] = _png(picture)
        if work.extras & {"every_length", "attention"}:
            done.more |= self._every(work)
        return done

    @torch.inference_mode()
    def _every(self, work: Work) -> dict[str, Any]:
        image = torch.from_numpy(work.pixels.copy()).permute(2, 0, 1)[None]
        more: dict[str, Any] = {}
        if "every_length" in work.extras:
            floats = image.to(self.model.encoder.positions.device).float() / 255
            every = []
            for ids in self.model.encode_all(image):
                picture = self.model.decode(list(ids))
                found = {name: float(getattr(distances, name)(floats, picture)) for name in ("l1", "mse", "ssim")}
                found["psnr"] = min(100.0, float(distances.psnr(floats, picture)))
                (pixels,) = to_uint8(picture)
                every.append(
                    {"num_tokens": ids.shape[1], "ids": ids[0].tolist(), "reconstruction": _png(pixels)} | found
                )
            more |= {"every_length": every, "input": _png(work.pixels)}
        if "attention" in work.extras:
            more["attention"] = [_maps(maps[0]) for maps in self.model.attention_maps(image)]
        return more


def _maps(maps_Ngg: torch.Tensor) -> dict[str, Any]:
    largest = maps_Ngg.flatten(1).max(-1).values.clamp_min(1e-12)[:, None, None]
    levels = (255 * maps_Ngg / largest).round().to(torch.uint8).cpu().numpy()
    return {
        "num_tokens": len(levels),
        "grid": levels.shape[-1],
        "maps": base64.b64encode(levels.tobytes()).decode(),
    }


def _png(pixels: np.ndarray) -> str:
    return base64.b64encode(encode_image(np.ascontiguousarray(pixels))).decode()


@serve.deployment
class Encoder:
    """Holds every model; answers one image at a time, computes many together."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.models = {name: load_weights(folder) for name, folder in settings.models.items()}
        if torch.cuda.is_available():
            for weights in self.models.values():
                weights.model.cuda()
        self.thread = ThreadPoolExecutor(1)
        self._make_metrics()
        for name, weights in self.models.items():  # warm before it says that it is ready
            size = weights.model.config.image_size
            work = Work(name, np.zeros((size, size, 3), np.uint8), weights.model.config.criterion, 1, 0)
            list(Batch(weights.model, [work]).run())
        gather: Any = self._gather
        gather.set_max_batch_size(settings.max_batch_tokens)
        gather.set_batch_wait_timeout_s(settings.batch_wait_seconds)

    def _make_metrics(self) -> None:
        self.images = metrics.Counter("alit_images_total", "Images encoded.", ("model",))
        self.tokens = metrics.Counter("alit_tokens_total", "Tokens given.", ("model",))
        self.late = metrics.Counter("alit_late_total", "Images whose deadline passed before their turn.", ("model",))
        buckets = [0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
        self.fill = metrics.Histogram("alit_batch_fill", "A batch's work over the largest allowed.", buckets)
        self.queued = metrics.Histogram("alit_queue_seconds", "An image's wait for its batch.", [0.01, 0.1, 1, 10], ())
        self.seconds = metrics.Histogram("alit_encode_seconds", "Computing a batch.", [0.01, 0.03, 0.1, 0.3, 1, 3, 10])
        lengths = sorted({n for weights in self.models.values() for n in weights.model.config.lengths})
        self.lengths = metrics.Histogram(
            "alit_chosen_length", "Tokens per image.", [float(n) for n in lengths], ("model",)
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every model, the default one first."""
        return [describe(name, weights) for name, weights in self.models.items()]

    async def encode(self, work: Work) -> Done:
        """One image's tokens, as soon as it is done."""
        arrived = time.time()
        gather: Any = self._gather
        async for done in gather((work, arrived)):
            if done is not None:
                return done
        raise AssertionError("every image of a batch is answered")

    @serve.batch(  # pyright: ignore[reportCallIssue, reportArgumentType]
        max_batch_size=1 << 30,
        batch_wait_timeout_s=0.01,
        batch_size_fn=lambda items: sum(work.cost for work, _ in items),
    )
    async def _gather(self, items: list[tuple[Work, float]]) -> AsyncIterator[list[Any]]:
        now, loop = time.time(), asyncio.get_running_loop()
        for _, arrived in items:
            self.queued.observe(now - arrived)
        self.fill.observe(sum(work.cost for work, _ in items) / self.settings.max_batch_tokens)
        rounds = self._rounds([work for work, _ in items])
        waiting = set(range(len(items)))
        while (found := await loop.run_in_executor(self.thread, next, rounds, None)) is not None:
            yield [found.get(i) if i in waiting else StopIteration for i in range(len(items))]
            waiting -= set(found)

    def _rounds(self, items: list[Work]) -> Iterator[dict[int, Done]]:
        now = time.time()
        if late := {i: Done(late=True) for i, work in enumerate(items) if work.deadline < now}:
            yield late
        for name in self.models:
            numbers = [i for i, work in enumerate(items) if work.model == name and i not in late]
            if not numbers:
                continue
            started = time.monotonic()
            for found in Batch(self.models[name].model, [items[i] for i in numbers]).run():
                for done in found.values():
                    self.images.inc(1, {"model": name})
                    self.tokens.inc(done.num_tokens, {"model": name})
                    self.lengths.observe(done.num_tokens, {"model": name})
                yield {numbers[i]: done for i, done in found.items()}
            self.seconds.observe(time.monotonic() - started)

    async def decode(self, model: str, tokens: list[np.ndarray]) -> np.ndarray:
        """Pixels of images, uint8 [B, S, S, 3]."""
        loop = asyncio.get_running_loop()
        weights = self.models[model]
        return await loop.run_in_executor(self.thread, lambda: to_uint8(weights.model.decode(tokens)))
