"""The operations behind the endpoints: validate requests, decode image files, and call the replicas."""

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
from serve.encoding import EncodedImage, EncodeTask
from serve.problems import ProblemError
from serve.schemas import DecodeRequest, EncodeAnswer, EncodeRequest, Model, Problem, Result
from serve.settings import Settings

DEADLINE_EXCEEDED = "deadline exceeded while queued"
READINESS_SECONDS = 1
"""How long a successful readiness check is cached."""
T = TypeVar("T")


class EncodingService:
    """The operations of one process that serves HTTP.

    Args:
        settings: The service's settings.
        encoder: The deployment with the models.

    Attributes:
        executor: Runs blocking work: parsing, image decoding, rendering.
        models: The models by name, the default first; empty until `load_models` has run.
    """

    def __init__(self, settings: Settings, encoder: DeploymentHandle) -> None:
        self.settings, self.encoder = settings, encoder
        self.executor = ThreadPoolExecutor(4)
        self.models: dict[str, Model] = {}
        self._limits = Limits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels)
        self._files_in_progress = 0
        self._last_ready = -1.0
        self._rejects = metrics.Counter("alit_rejects_total", "Image files that were rejected.", ("reason",))

    async def load_models(self, *, refresh: bool = False) -> None:
        """Fetches the models' descriptions from a replica, unless they are known.

        Args:
            refresh: Fetch them in any case.

        Raises:
            ProblemError: No replica is available.
        """
        if refresh or not self.models:
            self.models = {model.name: model for model in await self._result_of(self.encoder.describe.remote())}

    async def check_ready(self) -> None:
        """Checks that a replica has loaded its models; asks a replica at most once a second.

        Raises:
            ProblemError: No replica is ready.
        """
        if time.monotonic() < self._last_ready + READINESS_SECONDS:
            return
        try:
            await asyncio.wait_for(self.load_models(refresh=True), 5)
        except TimeoutError as error:
            raise self._unavailable("the models are not loaded yet") from error
        self._last_ready = time.monotonic()

    def model(self, name: str | None) -> Model:
        """Returns a model by name; the default model if None.

        Raises:
            ProblemError: There is no model of this name.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            detail = f"there is no model {name!r:.70}; there are {', '.join(self.models)}"
            raise ProblemError(422, detail, "unknown_model")
        return self.models[name]

    async def encode(self, request: EncodeRequest, files: Sequence[bytes | ProblemError]) -> EncodeAnswer:
        """Encodes image files.

        Args:
            request: The options, and the images' ids.
            files: The image files in order, or the error of a file that could not be read.

        Returns:
            One result per image, in order.

        Raises:
            ProblemError: The request is invalid, or the service is overloaded.
        """
        await self.load_models()
        self._check_image_count(len(files))
        model = self.model(request.model)
        template = self._task_template(request, model)
        images = await self._decode_files(files, model.image_size)
        template = replace(template, timeout_seconds=seconds_left())
        tasks = [replace(template, pixels=image.pixels) for image in images if isinstance(image, DecodedImage)]
        encoded = iter(await self._result_of(self._replicas(model.name).encode.remote(tasks)) if tasks else ())
        results, fingerprint = [], model.fingerprint
        for index, (image, source) in enumerate(zip(images, request.images, strict=True)):
            if isinstance(image, DecodedImage):
                tokens = next(encoded)
                result = self._make_result(index, tokens, image, template.extras)
                fingerprint = tokens.fingerprint or fingerprint
            else:
                result = Result(index=index, error=Problem(**image.document()))
            result.id = source.id
            results.append(result)
        if all(result.error is not None and result.error.status == 503 for result in results):
            raise self._unavailable(DEADLINE_EXCEEDED)  # no image was encoded: the client may retry the whole request
        return EncodeAnswer(model=model.name, fingerprint=fingerprint, criterion=template.criterion, results=results)

    async def decode(self, model: str, tokens: list[np.ndarray]) -> np.ndarray:
        """Decodes tokens.

        Args:
            model: The model's name.
            tokens: Token ids that `check_tokens` has accepted, one array per image.

        Returns:
            Pixels, uint8 [B, S, S, 3].

        Raises:
            ProblemError: The service is overloaded.
        """
        return await self._result_of(self._replicas(model).decode.remote(model, tokens))

    async def run_in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs blocking work in a thread, so that the event loop stays responsive; returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, function, *arguments)

    def check_tokens(self, request: DecodeRequest, model: Model) -> None:
        """Checks that a model can decode the tokens of a request.

        Raises:
            ProblemError: There are too many images, or the weights, a length or an id do not match the model.
        """
        self._check_image_count(len(request.images))
        if request.fingerprint is not None and request.fingerprint != model.fingerprint:
            detail = f"model {model.name!r} has the weights {model.fingerprint}, not {request.fingerprint!r}"
            raise ProblemError(422, detail, "other_weights")
        largest = model.codebook_size - 1
        for number, tokens in enumerate(request.images):
            if len(tokens.ids) not in model.lengths:
                detail = f"this model decodes {_listed(model.lengths)} tokens, got {len(tokens.ids)}"
                raise ProblemError(422, f"images.{number}: {detail}")
            if max(tokens.ids) > largest:
                detail = f"ids must be between 0 and {largest}, got {max(tokens.ids)}"
                raise ProblemError(422, f"images.{number}: {detail}")

    def _check_image_count(self, images: int) -> None:
        if images > self.settings.max_images:
            detail = f"a request may hold {self.settings.max_images} images, got {images}"
            raise ProblemError(413, detail, "too_many_images")

    def _task_template(self, request: EncodeRequest, model: Model) -> EncodeTask:
        """Returns the task that all images of a request share, without pixels and timeout."""
        try:
            criterion = parse(request.criterion or model.default_criterion, functions=False)
        except CriterionError as error:
            raise ProblemError(422, str(error), "unknown_criterion") from error
        if criterion.name not in model.criteria or (criterion.length and criterion.length not in model.lengths):
            criteria = ", ".join(model.criteria)
            detail = f"this model produces {_listed(model.lengths)} tokens, by {criteria}; got {criterion.spec!r}"
            raise ProblemError(422, detail, "unknown_criterion")
        max_tokens = request.max_tokens
        if max_tokens is not None:
            if max_tokens < model.lengths[0]:
                raise ProblemError(422, f"max_tokens must be at least {model.lengths[0]}, got {max_tokens}")
            max_tokens = max(length for length in model.lengths if length <= max_tokens)
        extras = frozenset(request.returns)
        longest = min(max_tokens or model.lengths[-1], criterion.length or model.lengths[-1])
        cost = sum(length for length in model.lengths if length <= longest)
        if extras & {"every_length", "attention"}:
            cost += sum(model.lengths)
        return EncodeTask(model.name, np.empty(0, np.uint8), criterion.spec, cost, 0, max_tokens, extras)

    async def _decode_files(
        self, files: Sequence[bytes | ProblemError], size: int
    ) -> list[DecodedImage | ProblemError]:
        """Decodes image files in threads, unless too many are in progress already."""
        if self._files_in_progress + len(files) > max(self.settings.queue, len(files)):
            raise self._unavailable(
                "server overloaded: too many image files are waiting to be decoded; try again later"
            )
        self._files_in_progress += len(files)
        try:
            return await asyncio.gather(*(self._decode_file(file, size) for file in files))
        finally:
            self._files_in_progress -= len(files)

    async def _decode_file(self, file: bytes | ProblemError, size: int) -> DecodedImage | ProblemError:
        if isinstance(file, ProblemError):
            return file
        try:
            return await self.run_in_thread(decode_image, file, size, self._limits)
        except ImageError as error:
            self._rejects.inc(1, {"reason": error.reason})
            status = 413 if error.reason in ("too_many_bytes", "too_many_pixels") else 422
            return ProblemError(status, str(error), error.reason)

    def _make_result(self, index: int, encoded: EncodedImage, image: DecodedImage, extras: frozenset[str]) -> Result:
        if encoded.deadline_exceeded:
            return Result(index=index, error=Problem(**self._unavailable(DEADLINE_EXCEEDED).document()))
        return Result(
            index=index,
            num_tokens=encoded.num_tokens,
            score=encoded.score,
            satisfied=encoded.satisfied,
            width=image.width,
            height=image.height,
            ids=encoded.ids if "ids" in extras else None,
            trace=encoded.trace if "trace" in extras else None,
            reconstruction=encoded.reconstruction,
            every_length=encoded.every_length,
            attention=encoded.attention,
            input=encoded.input,
        )

    def _replicas(self, model: str) -> DeploymentHandle:
        """Returns a handle that prefers replicas which have this model loaded."""
        return self.encoder.options(multiplexed_model_id=model)

    async def _result_of(self, response: Any) -> Any:
        """Awaits the result of a call to a replica.

        Raises:
            ProblemError: The replicas' queues are full, or the replica was lost.
        """
        try:
            result = await response
        except BackPressureError:
            result = None
        except asyncio.CancelledError:  # the client disconnected or the deadline passed: the replica may stop
            response.cancel()
            raise
        except (RayActorError, DeploymentUnavailableError) as error:
            raise self._unavailable("a process of the service was lost during this request; send it again") from error
        if result is None:
            raise self._unavailable("server overloaded: queue is full; try again later")
        return result

    def _unavailable(self, detail: str) -> ProblemError:
        return ProblemError(503, detail, "busy", {"Retry-After": str(self.settings.retry_after_seconds)})


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
