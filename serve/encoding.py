"""Encoding a batch of images with one model, without Ray; the tasks and results that the API and replicas exchange."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from alit.encoding.criteria import CRITERIA, parse
from alit.encoding.results import ImageResult
from alit.images.encode import encode_image, to_uint8
from alit.images.tensors import to_tensor
from alit.metrics import pixel
from alit.model.config import AlitConfig, VQGANConfig
from alit.tokenizer import Alit
from serve.schemas import Attention, Length, Model


@dataclass(frozen=True, eq=False, slots=True)
class EncodeTask:
    """One image to encode.

    Attributes:
        model: The model's name.
        pixels: uint8 [S, S, 3].
        criterion: A criterion that the model supports.
        cost: The maximum number of tokens that encoding the image computes, over all lengths.
        timeout_seconds: Seconds until the request's deadline.
        max_tokens: The maximum code length; None for the model's longest.
        extras: Values of `serve.schemas.Extra`.
    """

    model: str
    pixels: np.ndarray
    criterion: str
    cost: int
    timeout_seconds: float
    max_tokens: int | None = None
    extras: frozenset[str] = frozenset()


@dataclass(eq=False, slots=True)
class EncodedImage:
    """The tokens of one image.

    Attributes:
        num_tokens: The code's length.
        score: The criterion's value at this length; None for `fixed`.
        satisfied: Whether the criterion's threshold was reached.
        ids: The token ids.
        trace: The criterion's value at every length tried.
        reconstruction: A PNG file in base64, if the task's extras include it.
        every_length: All lengths, if the task's extras include them.
        input: With `every_length`, the encoded square as a PNG file in base64.
        attention: The attention maps of all lengths, if the task's extras include them.
        deadline_exceeded: The deadline passed while the image was queued; there are no tokens.
        fingerprint: The fingerprint of the weights.
    """

    num_tokens: int = 0
    score: float | None = None
    satisfied: bool = False
    ids: list[int] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    reconstruction: str | None = None
    every_length: list[Length] | None = None
    input: str | None = None
    attention: list[Attention] | None = None
    deadline_exceeded: bool = False
    fingerprint: str = ""


def describe_model(name: str, config: AlitConfig, fingerprint: str) -> Model:
    """Returns a model's description for `/v1/models`."""
    assert config.codebook_size is not None
    criteria = list(CRITERIA)
    if not isinstance(config.base, VQGANConfig):
        criteria.remove("code")
    return Model(
        name=name,
        fingerprint=fingerprint,
        image_size=config.image_size,
        lengths=list(config.lengths),
        codebook_size=config.codebook_size,
        latents_per_iteration=config.latents_per_iteration,
        base_grid=config.grid,
        default_criterion=config.criterion,
        criteria=criteria,
    )


class EncodeBatch:
    """Encodes a batch of images with one model, without Ray.

    Args:
        model: The model.
        tasks: The images and their criteria.
    """

    def __init__(self, model: Alit, tasks: Sequence[EncodeTask]) -> None:
        self.model, self.tasks = model, tasks

    def run(self) -> Iterator[dict[int, EncodedImage]]:
        """Yields the images that an iteration of the rollout completes, by position in the batch."""
        pixels = to_tensor(np.stack([task.pixels for task in self.tasks]))
        criteria = [parse(task.criterion, functions=False) for task in self.tasks]
        for completed in self.model.encode_each(pixels, criteria, [task.max_tokens for task in self.tasks]):
            if completed:
                yield {position: self._encoded(self.tasks[position], result) for position, result in completed}

    def _encoded(self, task: EncodeTask, result: ImageResult) -> EncodedImage:
        assert result.tokens is not None
        ids, score = result.tokens.tolist(), result.trace[-1] if result.trace else None
        encoded = EncodedImage(len(ids), score, result.satisfied, ids, result.trace)
        if "reconstruction" in task.extras:
            (reconstruction,) = to_uint8(self.model.decode([result.tokens]))
            encoded.reconstruction = _png(reconstruction)
        if "every_length" in task.extras:
            encoded.every_length, encoded.input = self._every_length(task), _png(task.pixels)
        if "attention" in task.extras:
            encoded.attention = self._attention(task)
        return encoded

    @torch.inference_mode()
    def _every_length(self, task: EncodeTask) -> list[Length]:
        image = to_tensor(task.pixels[None].copy())
        original = image.to(self.model.encoder.positions.device).float() / 255
        lengths = []
        for ids in self.model.encode_all(image):
            reconstruction = self.model.decode(list(ids))
            (pixels,) = to_uint8(reconstruction)
            length = Length(
                num_tokens=ids.shape[1],
                ids=ids[0].tolist(),
                l1=float(pixel.l1(original, reconstruction)),
                mse=float(pixel.mse(original, reconstruction)),
                psnr=min(100.0, float(pixel.psnr(original, reconstruction))),
                ssim=float(pixel.ssim(original, reconstruction)),
                reconstruction=_png(pixels),
            )
            lengths.append(length)
        return lengths

    @torch.inference_mode()
    def _attention(self, task: EncodeTask) -> list[Attention]:
        image = to_tensor(task.pixels[None].copy())
        return [_scaled_maps(maps[0]) for maps in self.model.attention_maps(image)]


def _scaled_maps(maps_Ngg: torch.Tensor) -> Attention:
    largest = maps_Ngg.flatten(1).max(-1).values.clamp_min(1e-12)[:, None, None]
    levels = (255 * maps_Ngg / largest).round().to(torch.uint8).cpu().numpy()
    maps = base64.b64encode(levels.tobytes()).decode()
    return Attention(num_tokens=len(levels), grid=levels.shape[-1], maps=maps)


def _png(pixels: np.ndarray) -> str:
    return base64.b64encode(encode_image(np.ascontiguousarray(pixels))).decode()
