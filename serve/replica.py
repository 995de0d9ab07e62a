"""The replicas that hold the models: images of all requests in shared batches, of all criteria in one rollout.

A request's images arrive in one call. A batch gathers the images of all requests for one model and runs in a thread.
Every image is returned after the iteration that completes it, while the rest of the batch continues.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.util import metrics

from alit.images.encode import to_uint8
from alit.weights import Weights, load_weights, read_config
from serve.batching import Batcher, DeadlineExceededError, QueuedItem
from serve.encoding import EncodeBatch, EncodedImage, EncodeTask, describe_model
from serve.schemas import Model
from serve.settings import Settings

SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]
"""Histogram bucket boundaries, in seconds."""


@serve.deployment
class Encoder:
    """The Ray Serve deployment that holds the models, and encodes and decodes with them.

    Args:
        settings: The service's settings.

    Raises:
        WeightsError: A weights folder cannot be loaded.
    """

    async def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.executor = ThreadPoolExecutor(1)  # one thread for all computation
        self.images_in_progress = 0

        async def load(name: str) -> Weights:
            return await asyncio.get_running_loop().run_in_executor(self.executor, self._load, name)

        self.load: Any = serve.multiplexed(load, max_num_models_per_replica=settings.models_per_replica)
        preloaded = list(settings.models)[: settings.models_per_replica]
        # the default model last: the least recently used model is evicted first
        loaded = {name: await self.load(name) for name in reversed(preloaded)}
        self.models = [self._describe(name, loaded.get(name)) for name in settings.models]
        self._create_metrics()
        self.batcher = Batcher(
            self._begin_batch,
            self.executor,
            max_cost=settings.max_batch_tokens,
            wait_seconds=settings.batch_wait_seconds,
            on_batch=self._record_batch,
        )

    def _load(self, name: str) -> Weights:
        """Loads a model and encodes one image with it, because the first image is slow."""
        weights = load_weights(self.settings.models[name])
        size = weights.model.to(self.device).config.image_size
        task = EncodeTask(name, np.zeros((size, size, 3), np.uint8), weights.model.config.criterion, 1, 0)
        with self._autocast():
            list(EncodeBatch(weights.model, [task]).run())
        return weights

    def _describe(self, name: str, weights: Weights | None) -> Model:
        if weights is None:
            return describe_model(name, *read_config(self.settings.models[name]))
        return describe_model(name, weights.model.config, weights.fingerprint)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def _create_metrics(self) -> None:
        lengths = sorted({float(length) for model in self.models for length in model.lengths})
        fill = [0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
        self.images = metrics.Counter("alit_images_total", "Images encoded.", ("model",))
        self.tokens = metrics.Counter("alit_tokens_total", "Tokens produced.", ("model",))
        self.waiting = metrics.Gauge("alit_waiting", "Images of requests in progress, queued or being computed.")
        self.expired = metrics.Counter("alit_late_total", "Images whose deadline passed while they were queued.")
        self.fill = metrics.Histogram("alit_batch_fill", "Cost of a batch as a fraction of max_batch_tokens.", fill)
        self.queue_time = metrics.Histogram("alit_queue_seconds", "Time of an image in the queue.", SECONDS)
        self.batch_time = metrics.Histogram("alit_encode_seconds", "Time to encode a batch.", SECONDS)
        self.lengths = metrics.Histogram("alit_chosen_length", "Tokens per image.", lengths, ("model",))

    def describe(self) -> list[Model]:
        """Returns the descriptions of all models, the default model first."""
        return self.models

    async def encode(self, tasks: list[EncodeTask]) -> list[EncodedImage] | None:
        """Encodes the images of one request.

        Args:
            tasks: The images.

        Returns:
            The encoded images in order, or None if the queue is full.
        """
        with self._admit(len(tasks)) as admitted:  # if the client disconnects, Serve cancels this call where it awaits
            return list(await asyncio.gather(*map(self._encode_one, tasks))) if admitted else None

    @contextmanager
    def _admit(self, images: int) -> Iterator[bool]:
        """Yields whether the queue has room for more images, and counts them until the block ends."""
        if self.images_in_progress and self.images_in_progress + images > self.settings.queue:
            yield False
            return
        self._count(images)
        try:
            yield True
        finally:
            self._count(-images)

    def _count(self, images: int) -> None:
        self.images_in_progress += images
        self.waiting.set(self.images_in_progress)

    async def _encode_one(self, task: EncodeTask) -> EncodedImage:
        deadline = time.monotonic() + task.timeout_seconds
        try:
            return await self.batcher.add(task, group=task.model, cost=task.cost, deadline=deadline)
        except DeadlineExceededError:
            return EncodedImage(deadline_exceeded=True)

    def _record_batch(self, batch: Sequence[QueuedItem], expired: int) -> None:
        now = time.monotonic()
        if expired:
            self.expired.inc(expired)
        for queued in batch:
            self.queue_time.observe(now - queued.arrival)
        if batch:
            self.fill.observe(sum(queued.cost for queued in batch) / self.settings.max_batch_tokens)

    async def _begin_batch(self, name: str, tasks: list[EncodeTask]) -> Iterator[dict[int, EncodedImage]]:
        return self._run_batch(await self.load(name), tasks)

    def _run_batch(self, weights: Weights, tasks: list[EncodeTask]) -> Iterator[dict[int, EncodedImage]]:
        """Yields the images that an iteration completes, by position in the batch, and records metrics."""
        started, tags = time.monotonic(), {"model": tasks[0].model}
        steps = EncodeBatch(weights.model, tasks).run()
        try:
            while True:
                with self._autocast():
                    completed = next(steps, None)
                if completed is None:
                    break
                for image in completed.values():
                    image.fingerprint = weights.fingerprint
                    self.lengths.observe(image.num_tokens, tags)
                self.images.inc(len(completed), tags)
                self.tokens.inc(sum(image.num_tokens for image in completed.values()), tags)
                yield completed
        finally:  # also when the batcher drops the generator because all images are complete
            self.batch_time.observe(time.monotonic() - started)

    async def decode(self, model: str, tokens: list[np.ndarray]) -> np.ndarray | None:
        """Decodes tokens of mixed lengths.

        Args:
            model: The model's name.
            tokens: Valid token ids, one array per image.

        Returns:
            Pixels, uint8 [B, S, S, 3], or None if the queue is full.
        """
        with self._admit(len(tokens)) as admitted:
            if not admitted:
                return None
            weights: Weights = await self.load(model)

            def decode() -> np.ndarray:
                with self._autocast():
                    return to_uint8(weights.model.decode(tokens))

            return await asyncio.get_running_loop().run_in_executor(self.executor, decode)
