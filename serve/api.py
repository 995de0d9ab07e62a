"""What the endpoints do: check what is asked, decode image files off the event loop, ask the replicas with models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import metrics

from alit.errors import CriterionError
from alit.images import DecodedImage, ImageError, Limits, decode_image
from alit.selection import parse
from serve.config import Settings
from serve.encoder import Done, Work
from serve.problems import ProblemError
from serve.schemas import DecodeRequest, EncodeAnswer, EncodeRequest, Problem, Result

LATE = "the deadline passed before this image's turn"


class Api:
    """What the endpoints share: the settings, the models' descriptions and the way to them."""

    def __init__(self, settings: Settings, encoder: DeploymentHandle) -> None:
        self.settings, self.encoder = settings, encoder
        self.limits = Limits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels)
        self.threads = ThreadPoolExecutor(4)
        self.models: dict[str, dict[str, Any]] = {}
        self.rejects = metrics.Counter("alit_rejects_total", "Image files that were refused.", ("reason",))

    async def load(self, *, again: bool = False) -> None:
        """Asks for the models, once they are there."""
        if again or not self.models:
            self.models = {model["name"]: model for model in await self.encoder.describe.remote()}

    def model(self, name: str | None) -> dict[str, Any]:
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ProblemError(
                422, f"there is no model {name!r:.70}; there are {', '.join(self.models)}", "unknown_model"
            )
        return self.models[name]

    def work(self, request: EncodeRequest, model: dict[str, Any]) -> Work:
        """What is asked for of every image, pixels still missing."""
        try:
            criterion = parse(request.criterion or model["default_criterion"], functions=False)
        except CriterionError as error:
            raise ProblemError(422, str(error), "unknown_criterion") from error
        name = criterion.spec.partition(":")[0]
        if name not in model["criteria"] or (criterion.length and criterion.length not in model["lengths"]):
            lengths = ", ".join(map(str, model["lengths"]))
            detail = f"this model gives {lengths} tokens, by {', '.join(model['criteria'])}; got {criterion.spec!r}"
            raise ProblemError(422, detail, "unknown_criterion")
        most = request.max_tokens
        if most is not None:
            if most < model["lengths"][0]:
                raise ProblemError(422, f"max_tokens must be at least {model['lengths'][0]}, got {most}")
            most = max(length for length in model["lengths"] if length <= most)
        extras = frozenset(request.returns)
        longest = most or model["lengths"][-1]
        cost = sum(length for length in model["lengths"] if length <= longest)
        if extras & {"every_length", "attention"}:
            cost += sum(model["lengths"])
        deadline = time.time() + self.settings.deadline_seconds
        return Work(model["name"], np.empty(0, np.uint8), criterion.spec, cost, deadline, most, extras)

    async def encode(self, request: EncodeRequest, files: Sequence[bytes | ProblemError]) -> EncodeAnswer:
        """One result per image, in order."""
        await self.load()
        self.check_number(len(files))
        model = self.model(request.model)
        work = self.work(request, model)
        names = [image.id for image in request.images] or [None] * len(files)
        images = await asyncio.gather(*(self.decoded(file, model["image_size"]) for file in files))
        works = [replace(work, pixels=image.pixels) for image in images if isinstance(image, DecodedImage)]
        fingerprint, done = model["fingerprint"], iter(())
        if works:
            answered = await self.ask(self.replicas(model["name"]).encode.remote(works), work.deadline)
            if answered is None:
                raise self.busy("more images wait already than can be encoded soon; come back later")
            fingerprint, done = answered.fingerprint, iter(answered.images)
        results = []
        for i, image in enumerate(images):
            if isinstance(image, DecodedImage):
                result = self.result(i, next(done), image, work.extras)
            else:
                result = Result(index=i, error=Problem(**image.document()))
            result.id = names[i]
            results.append(result)
        if all(result.error is not None and result.error.status == 503 for result in results):
            raise self.busy(LATE)  # nothing was done: the whole request may come again
        return EncodeAnswer(model=model["name"], fingerprint=fingerprint, criterion=work.criterion, results=results)

    async def decode(self, model: str, tokens: list[np.ndarray]) -> np.ndarray:
        """Pixels of images, uint8 [B, S, S, 3], from checked ids."""
        deadline = time.time() + self.settings.deadline_seconds
        return await self.ask(self.replicas(model).decode.remote(model, tokens), deadline)

    def check_number(self, images: int) -> None:
        if images > self.settings.max_images:
            detail = f"a request may hold {self.settings.max_images} images, got {images}"
            raise ProblemError(413, detail, "too_many_images")

    def check_tokens(self, asked: DecodeRequest, model: dict[str, Any]) -> None:
        """Refuses what this model cannot decode."""
        self.check_number(len(asked.images))
        if asked.fingerprint is not None and asked.fingerprint != model["fingerprint"]:
            detail = f"model {model['name']!r} has the weights {model['fingerprint']}, not {asked.fingerprint!r}"
            raise ProblemError(422, detail, "other_weights")
        for number, tokens in enumerate(asked.images):
            if len(tokens.ids) not in model["lengths"]:
                lengths = ", ".join(map(str, model["lengths"]))
                raise ProblemError(422, f"images.{number}: this model decodes {lengths} tokens, got {len(tokens.ids)}")
            if max(tokens.ids) >= model["codebook_size"]:
                most = model["codebook_size"] - 1
                raise ProblemError(422, f"images.{number}: ids must lie from 0 to {most}, got {max(tokens.ids)}")

    def replicas(self, model: str) -> DeploymentHandle:
        """The way to the replicas that hold this model, before others that would have to load it."""
        return self.encoder.options(multiplexed_model_id=model)

    def busy(self, detail: str) -> ProblemError:
        return ProblemError(503, detail, "busy", {"Retry-After": str(self.settings.retry_after_seconds)})

    def result(self, index: int, done: Done, image: DecodedImage, extras: frozenset[str]) -> Result:
        if done.late:
            return Result(index=index, error=Problem(**self.busy(LATE).document()))
        return Result(
            index=index,
            num_tokens=done.num_tokens,
            score=done.score,
            satisfied=done.satisfied,
            width=image.width,
            height=image.height,
            ids=done.ids if "ids" in extras else None,
            trace=done.trace if "trace" in extras else None,
            **done.more,
        )

    async def ask(self, answer: Any, deadline: float) -> Any:
        """An answer of the models, while somebody waits for it.

        Raises:
            ProblemError: there is none in time, or they have enough to do.
        """
        try:
            return await asyncio.wait_for(answer, max(0.01, deadline - time.time()))
        except BackPressureError as error:
            raise self.busy("there is more to do than can be done; come back later") from error
        except TimeoutError as error:
            raise self.busy(f"nothing within {self.settings.deadline_seconds:g} seconds") from error
        except (RayActorError, DeploymentUnavailableError) as error:
            raise self.busy("a process of the service was lost while it worked on this; send it again") from error

    async def decoded(self, file: bytes | ProblemError, size: int) -> DecodedImage | ProblemError:
        if isinstance(file, ProblemError):
            return file
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.threads, decode_image, file, size, self.limits)
        except ImageError as error:
            self.rejects.inc(1, {"reason": error.reason})
            status = 413 if error.reason in ("too_many_bytes", "too_many_pixels") else 422
            return ProblemError(status, str(error), error.reason)
