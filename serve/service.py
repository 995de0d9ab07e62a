"""What the endpoints do: check what is asked, decode image files off the event loop, ask the replicas with models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import metrics

from alit.encoding.criteria import parse
from alit.errors import CriterionError
from alit.images.decode import DecodedImage, decode_image
from alit.images.formats import ImageError, Limits
from serve.access import seconds_left
from serve.problems import ProblemError
from serve.replica import Done, Work
from serve.schemas import DecodeRequest, EncodeAnswer, EncodeRequest, Problem, Result
from serve.settings import Settings

LATE = "the time was over before this image's turn"
T = TypeVar("T")


class Api:
    """What the endpoints share: the settings, the models' descriptions and the way to them."""

    def __init__(self, settings: Settings, encoder: DeploymentHandle) -> None:
        self.settings, self.encoder = settings, encoder
        self.limits = Limits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels)
        self.threads = ThreadPoolExecutor(4)
        self.models: dict[str, dict[str, Any]] = {}
        self.decoding = 0  # image files
        self.known_ready = -1.0
        self.rejects = metrics.Counter("alit_rejects_total", "Image files that were refused.", ("reason",))

    async def load(self, *, again: bool = False) -> None:
        """Asks for the models, once they are there."""
        if again or not self.models:
            self.models = {model["name"]: model for model in await self.ask(self.encoder.describe.remote())}

    async def ready(self) -> None:
        """Whether a replica has its models loaded, looked up once a second at most.

        Raises:
            ProblemError: none has.
        """
        if time.monotonic() < self.known_ready + 1:
            return
        try:
            await asyncio.wait_for(self.load(again=True), 5)
        except TimeoutError as error:
            raise self.busy("the models are not loaded yet") from error
        self.known_ready = time.monotonic()

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
        name = criterion.name
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
        longest = min(most or model["lengths"][-1], criterion.length or model["lengths"][-1])
        cost = sum(length for length in model["lengths"] if length <= longest)
        if extras & {"every_length", "attention"}:
            cost += sum(model["lengths"])
        return Work(model["name"], np.empty(0, np.uint8), criterion.spec, cost, 0, most, extras)

    async def encode(self, request: EncodeRequest, files: Sequence[bytes | ProblemError]) -> EncodeAnswer:
        """One result per image, in order."""
        await self.load()
        self.check_number(len(files))
        model = self.model(request.model)
        work = self.work(request, model)
        if self.decoding + len(files) > max(self.settings.queue, len(files)):
            raise self.busy("more image files wait already than can be decoded soon; come back later")
        self.decoding += len(files)
        try:
            images = await asyncio.gather(*(self.decoded(file, model["image_size"]) for file in files))
        finally:
            self.decoding -= len(files)
        work = replace(work, seconds=seconds_left())
        works = [replace(work, pixels=image.pixels) for image in images if isinstance(image, DecodedImage)]
        done = iter(await self.ask(self.replicas(model["name"]).encode.remote(works)) if works else ())
        results, fingerprint = [], model["fingerprint"]
        for i, (image, asked) in enumerate(zip(images, request.images, strict=True)):
            if isinstance(image, DecodedImage):
                found = next(done)
                result, fingerprint = self.result(i, found, image, work.extras), found.fingerprint or fingerprint
            else:
                result = Result(index=i, error=Problem(**image.document()))
            result.id = asked.id
            results.append(result)
        if all(result.error is not None and result.error.status == 503 for result in results):
            raise self.busy(LATE)  # nothing was done: the whole request may come again
        return EncodeAnswer(model=model["name"], fingerprint=fingerprint, criterion=work.criterion, results=results)

    async def decode(self, model: str, tokens: list[np.ndarray]) -> np.ndarray:
        """Pixels of images, uint8 [B, S, S, 3], from checked ids."""
        return await self.ask(self.replicas(model).decode.remote(model, tokens))

    async def off_loop(self, work: Callable[..., T], *arguments: Any) -> T:
        """What takes long, in a thread, so that others are answered meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

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

    async def ask(self, answer: Any) -> Any:
        """An answer of the replicas with the models.

        Raises:
            ProblemError: they have enough to do, or were lost.
        """
        try:
            found = await answer
        except BackPressureError:
            found = None
        except asyncio.CancelledError:  # the client has left, or the time is over: whoever works on it may stop
            answer.cancel()
            raise
        except (RayActorError, DeploymentUnavailableError) as error:
            raise self.busy("a process of the service was lost while it worked on this; send it again") from error
        if found is None:
            raise self.busy("more waits already than can be done soon; come back later")
        return found

    async def decoded(self, file: bytes | ProblemError, size: int) -> DecodedImage | ProblemError:
        if isinstance(file, ProblemError):
            return file
        try:
            return await self.off_loop(decode_image, file, size, self.limits)
        except ImageError as error:
            self.rejects.inc(1, {"reason": error.reason})
            status = 413 if error.reason in ("too_many_bytes", "too_many_pixels") else 422
            return ProblemError(status, str(error), error.reason)
