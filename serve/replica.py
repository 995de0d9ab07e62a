"""The replicas that hold the models: batches by the work in them, images of all criteria in one rollout.

A request's images come in one call. A batch is gathered of all requests for one model. It runs in a thread, and every
image is answered in the iteration in which it is done, while the others go on.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.util import metrics

from alit.encoding.criteria import parse
from alit.encoding.results import ImageResult
from alit.images.encode import encode_image, to_uint8
from alit.images.tensors import to_tensor
from alit.metrics import pixel
from alit.model.config import AlitConfig, VQGANConfig
from alit.tokenizer import Alit
from alit.weights import Weights, load_weights, read_config
from serve.batching import Batcher, Late, Waiting
from serve.settings import Settings

SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]
"""Of histograms."""


@dataclass(frozen=True, eq=False, slots=True)
class Work:
    """One image to encode.

    Attributes:
        model: its name.
        pixels: uint8 [S, S, 3].
        criterion: already checked.
        cost: tokens that encoding it may take.
        seconds: for which somebody waits for it.
        most: the longest code that it may get.
        extras: of `serve.schemas.Extra`.
    """

    model: str
    pixels: np.ndarray
    criterion: str
    cost: int
    seconds: float
    most: int | None = None
    extras: frozenset[str] = frozenset()


@dataclass(eq=False, slots=True)
class Done:
    """Its tokens, and the fingerprint of the weights that gave them; `late` where the time was over before its turn."""

    num_tokens: int = 0
    score: float | None = None
    satisfied: bool = False
    ids: list[int] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    late: bool = False
    fingerprint: str = ""


def describe(name: str, config: AlitConfig, fingerprint: str) -> dict[str, Any]:
    """A model as /v1/models tells of it."""
    assert config.codebook_size is not None
    criteria = ["fixed", "l1", "mse", "psnr", "ssim", "code", "latent"]
    if not isinstance(config.base, VQGANConfig):
        criteria.remove("code")
    return {
        "name": name,
        "fingerprint": fingerprint,
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
        pixels = to_tensor(np.stack([work.pixels for work in self.work]))
        criteria = [parse(work.criterion, functions=False) for work in self.work]
        for found in self.model.encode_each(pixels, criteria, [work.most for work in self.work]):
            if found:
                yield {number: self._done(self.work[number], answer) for number, answer in found}

    def _done(self, work: Work, answer: ImageResult) -> Done:
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
        image = to_tensor(work.pixels[None].copy())
        more: dict[str, Any] = {}
        if "every_length" in work.extras:
            floats = image.to(self.model.encoder.positions.device).float() / 255
            every = []
            for ids in self.model.encode_all(image):
                picture = self.model.decode(list(ids))
                found = {name: float(getattr(pixel, name)(floats, picture)) for name in ("l1", "mse", "ssim")}
                found["psnr"] = min(100.0, float(pixel.psnr(floats, picture)))
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
    """Holds models; answers a request's images, computes those of many requests together.

    Raises:
        WeightsError: a weights folder cannot be used.
    """

    async def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.models = [describe(name, *read_config(folder)) for name, folder in settings.models.items()]
        self.thread = ThreadPoolExecutor(1)  # all that computes
        self.waiting = 0

        async def load(name: str) -> Weights:
            return await asyncio.get_running_loop().run_in_executor(self.thread, self._load, name)

        self.load: Any = serve.multiplexed(load, max_num_models_per_replica=settings.models_per_replica)
        self._make_metrics()
        self.batcher = Batcher(
            self._begin,
            self.thread,
            most=settings.max_batch_tokens,
            wait=settings.batch_wait_seconds,
            watch=self._watch,
        )
        first = list(settings.models)[: settings.models_per_replica]
        for name in reversed(first):  # the default one last: it stays longest
            await self.load(name)

    def _load(self, name: str) -> Weights:
        """Loads a model and encodes one image with it: the first is slow."""
        weights = load_weights(self.settings.models[name])
        size = weights.model.to(self.device).config.image_size
        work = Work(name, np.zeros((size, size, 3), np.uint8), weights.model.config.criterion, 1, 0)
        with self._precision():
            list(Batch(weights.model, [work]).run())
        return weights

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def _make_metrics(self) -> None:
        self.images = metrics.Counter("alit_images_total", "Images encoded.", ("model",))
        self.tokens = metrics.Counter("alit_tokens_total", "Tokens given.", ("model",))
        self.admitted = metrics.Gauge("alit_waiting", "Images of requests that are not answered yet.")
        self.late = metrics.Counter("alit_late_total", "Images whose time was over before their turn.")
        buckets = [0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
        self.fill = metrics.Histogram("alit_batch_fill", "A batch's work over the largest allowed.", buckets)
        self.queued = metrics.Histogram("alit_queue_seconds", "An image's wait for its batch.", SECONDS)
        self.seconds = metrics.Histogram("alit_encode_seconds", "Computing a batch.", SECONDS)
        lengths = sorted({length for model in self.models for length in model["lengths"]})
        self.lengths = metrics.Histogram(
            "alit_chosen_length", "Tokens per image.", [float(n) for n in lengths], ("model",)
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every model, the default one first."""
        return self.models

    async def encode(self, works: list[Work]) -> list[Done] | None:
        """The images of one request, in order; None where too many wait already."""
        with self._admitted(len(works)) as admitted:  # where the client leaves, Serve cancels what is awaited here
            return list(await asyncio.gather(*map(self._one, works))) if admitted else None

    @contextmanager
    def _admitted(self, images: int) -> Iterator[bool]:
        """Whether there is room for so many more images; they count as waiting until their request ends."""
        if self.waiting and self.waiting + images > self.settings.queue:
            yield False
            return
        self._count(images)
        try:
            yield True
        finally:
            self._count(-images)

    def _count(self, images: int) -> None:
        self.waiting += images
        self.admitted.set(self.waiting)

    async def _one(self, work: Work) -> Done:
        until = time.monotonic() + work.seconds
        try:
            return await self.batcher.add(work, group=work.model, cost=work.cost, until=until)
        except Late:
            return Done(late=True)

    def _watch(self, batch: Sequence[Waiting], late: int) -> None:
        now = time.monotonic()
        if late:
            self.late.inc(late)
        for waiting in batch:
            self.queued.observe(now - waiting.arrived)
        if batch:
            self.fill.observe(sum(waiting.cost for waiting in batch) / self.settings.max_batch_tokens)

    async def _begin(self, name: str, works: list[Work]) -> Iterator[dict[int, Done]]:
        return self._rounds(await self.load(name), works)

    def _rounds(self, weights: Weights, works: list[Work]) -> Iterator[dict[int, Done]]:
        """A batch's answers, after every iteration."""
        started, tags = time.monotonic(), {"model": works[0].model}
        rounds = Batch(weights.model, works).run()
        try:
            while True:
                with self._precision():
                    found = next(rounds, None)
                if found is None:
                    break
                for done in found.values():
                    done.fingerprint = weights.fingerprint
                    self.lengths.observe(done.num_tokens, tags)
                self.images.inc(len(found), tags)
                self.tokens.inc(sum(done.num_tokens for done in found.values()), tags)
                yield found
        finally:  # nobody asks for more once all images are answered
            self.seconds.observe(time.monotonic() - started)

    async def decode(self, model: str, tokens: list[np.ndarray]) -> np.ndarray | None:
        """Pixels of images, uint8 [B, S, S, 3]; None where too many wait already."""
        with self._admitted(len(tokens)) as admitted:
            if not admitted:
                return None
            weights: Weights = await self.load(model)

            def run() -> np.ndarray:
                with self._precision():
                    return to_uint8(weights.model.decode(tokens))

            return await asyncio.get_running_loop().run_in_executor(self.thread, run)
