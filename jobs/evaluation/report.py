"""What an evaluation says: means, intervals and correlations out of what was measured of every image.

Shapes: B images, K lengths, V versions of an image, as in `jobs.samples`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import alit
from alit.errors import AlitError
from alit.metrics.fid import frechet_distance
from alit.model.config import VQGANConfig
from alit.reconstruction import first_within, perplexity
from jobs.evaluation.bootstrap import Interval, adaptive_gain, bootstrap, spearman
from jobs.evaluation.image_codecs import CODECS
from jobs.evaluation.models import Rulers
from jobs.evaluation.per_image import Collected, Measured, Reject, bits_per_base_token, bits_per_token


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Distances from the images, means over images; `rfid` is of all of them together. None where not measured."""

    l1: float
    mse: float
    psnr: float
    ssim: float
    lpips: float | None = None
    rfid: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """What one way of encoding is worth.

    Attributes:
        tokens: per image.
        bits_per_pixel: of the tokens at log2 of the codebook's size each; None for continuous ones.
        codes_used: of the codebook, as if evenly; None for continuous ones.
        change: of the mean L1 from the next shorter length; None for the shortest, and for the base.
    """

    tokens: int
    bits_per_pixel: float | None
    quality: Quality
    codes_used: float | None
    change: Interval | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptive:
    """The lengths that `l1:threshold` chooses.

    Attributes:
        mean_tokens, bits_per_pixel: over images; which length was chosen is not counted.
        counts: images per length, shortest first.
        satisfied: the share of images that meet the threshold at some length.
        l1, psnr, ssim: at the chosen lengths.
        gain: L1 minus that of one length for all images, at the same mean tokens; negative where choosing pays. See
            `jobs.statistics.adaptive_gain`.
        spearman_jpeg: rank correlation of the chosen length with the bytes of the model-size image as JPEG, quality 75.
        spearman_gradient: with its gradient entropy, `jobs.measure.gradient_entropy`.
    """

    threshold: float
    mean_tokens: float
    bits_per_pixel: float | None
    counts: list[int]
    satisfied: float
    l1: float
    psnr: float
    ssim: float
    gain: Interval
    spearman_jpeg: float
    spearman_gradient: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecPoint:
    """An image codec at the files that are nearest in size to the tokens; means over images."""

    tokens: int
    token_bytes: float
    bytes: float
    bits_per_pixel: float
    l1: float
    psnr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """An image codec, its files' headers included.

    Attributes:
        images: how many it was tried on.
        smallest_bytes: mean at the lowest quality.
    """

    name: str
    images: int
    smallest_bytes: float
    points: list[CodecPoint]


@dataclass(frozen=True, kw_only=True, slots=True)
class Against:
    """L1 minus that of other weights on the same images; negative where the evaluated ones are better.

    Attributes:
        lengths: those that both have.
        differences: one per length.
        base: of the base tokenizers' own reconstructions.
    """

    fingerprint: str
    lengths: list[int]
    differences: list[Interval]
    base: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Numbers over one set of images.

    Attributes:
        software: the version that measured.
        criterion: the weights' default.
        images: how many were measured; `rejects` are those that could not be decoded.
        codebook_size, base_codebook_size: None for continuous ones.
        lengths: shortest first.
        base: the base tokenizer's own reconstruction.
        thumbnail, mean_color: of a 4 x 4 thumbnail enlarged bicubically, and of one colour per image.
    """

    software: str
    fingerprint: str
    criterion: str
    image_size: int
    images: int
    rejects: list[Reject]
    codebook_size: int | None
    base_codebook_size: int | None
    lengths: list[Code]
    base: Code
    thumbnail: Quality
    mean_color: Quality
    adaptive: list[Adaptive]
    codecs: list[Codec]
    against: Against | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"rejects": [reject._asdict() for reject in self.rejects]}


def default_thresholds(errors: np.ndarray) -> list[float]:
    """Of L1, to spread lengths: where each length is the middle image's, and half way between the outer two."""
    middle = np.median(errors, axis=1)
    return sorted({round(float(t), 4) for t in (*middle, (middle[0] + middle[-1]) / 2)}, reverse=True)


def adaptive(measured: Measured, lengths: Sequence[int], threshold: float, bits: float | None = None) -> Adaptive:
    """What `l1:threshold` chooses, `bits` being those of a token per pixel."""
    errors = measured.l1[:, : len(lengths)].T
    chosen = first_within(errors, threshold)
    tokens, rows = np.asarray(lengths)[chosen], np.arange(len(chosen))
    return Adaptive(
        threshold=threshold,
        mean_tokens=float(tokens.mean()),
        bits_per_pixel=None if bits is None else float(tokens.mean()) * bits,
        counts=np.bincount(chosen, minlength=len(lengths)).tolist(),
        satisfied=float((errors <= np.float32(threshold)).any(0).mean()),
        l1=float(measured.l1[rows, chosen].mean(dtype=np.float64)),
        psnr=float(measured.psnr[rows, chosen].mean(dtype=np.float64)),
        ssim=float(measured.ssim[rows, chosen].mean(dtype=np.float64)),
        gain=adaptive_gain(errors, lengths, chosen),
        spearman_jpeg=spearman(tokens, measured.jpeg_bytes),
        spearman_gradient=spearman(tokens, measured.gradient_entropy),
    )


def report(collected: Collected, rulers: Rulers, thresholds: Sequence[float] = ()) -> Evaluation:
    """Puts together what was measured.

    Args:
        collected: of all images.
        rulers: that it was measured with.
        thresholds: of the criterion `l1`; when none are given, those of `default_thresholds`.

    Raises:
        AlitError: no image was measured, or a threshold is not a positive number.
    """
    require_thresholds(thresholds)
    measured, config = collected.measured(), rulers.model.config
    lengths, pixels = config.lengths, config.image_size**2
    bits, base_bits = bits_per_token(config), bits_per_base_token(config)
    per_token = None if bits is None else bits / pixels
    errors = measured.l1[:, : len(lengths)].T
    ids = np.split(measured.ids, np.cumsum(lengths)[:-1], axis=1) if config.codebook_size else []
    base_size = config.base.codebook_size if isinstance(config.base, VQGANConfig) else None
    codes = [
        Code(
            tokens=length,
            bits_per_pixel=None if per_token is None else length * per_token,
            quality=_quality(measured, k, _rfid(collected, k)),
            codes_used=perplexity(ids[k], config.codebook_size) if config.codebook_size else None,
            change=None if k == 0 else bootstrap(errors[k] - errors[k - 1]),
        )
        for k, length in enumerate(lengths)
    ]
    base = Code(
        tokens=config.grid**2,
        bits_per_pixel=None if base_bits is None else config.grid**2 * base_bits / pixels,
        quality=_quality(measured, len(lengths), _rfid(collected, len(lengths))),
        codes_used=None if base_size is None else perplexity(measured.base_ids, base_size),
    )
    return Evaluation(
        software=f"alit {alit.__version__}",
        fingerprint=rulers.fingerprint,
        criterion=config.criterion,
        image_size=config.image_size,
        images=len(measured.l1),
        rejects=collected.rejects,
        codebook_size=config.codebook_size,
        base_codebook_size=base_size,
        lengths=codes,
        base=base,
        thumbnail=_quality(measured, len(lengths) + 1),
        mean_color=_quality(measured, len(lengths) + 2),
        adaptive=[adaptive(measured, lengths, t, per_token) for t in thresholds or default_thresholds(errors)],
        codecs=_codecs(measured, lengths, bits, pixels),
        against=_against(measured, rulers),
    )


def require_thresholds(thresholds: Sequence[float]) -> None:
    """Raises AlitError: one of them is not a positive number."""
    for threshold in thresholds:
        if not 0 < threshold < float("inf"):
            raise AlitError(f"--thresholds must be positive numbers, such as 0.1, got {threshold:g}")


def _quality(measured: Measured, version: int, rfid: float | None = None) -> Quality:
    def mean(values: np.ndarray) -> float:
        return float(values[:, version].mean(dtype=np.float64))

    return Quality(
        l1=mean(measured.l1),
        mse=mean(measured.mse),
        psnr=mean(measured.psnr),
        ssim=mean(measured.ssim),
        lpips=mean(measured.lpips) if measured.lpips.size else None,
        rfid=rfid,
    )


def _rfid(collected: Collected, version: int) -> float | None:
    moments = collected.moments
    return frechet_distance(moments[version], moments[-1]) if moments and moments[-1].count > 1 else None


def _codecs(measured: Measured, lengths: Sequence[int], bits: float | None, pixels: int) -> list[Codec]:
    count = len(measured.coded_bytes)
    if bits is None or count == 0:
        return []
    size, l1, psnr = (
        values.mean(axis=0, dtype=np.float64)  # [C, K]
        for values in (measured.coded_bytes, measured.coded_l1, measured.coded_psnr)
    )
    smallest = measured.smallest_bytes.mean(axis=0, dtype=np.float64)
    return [
        Codec(
            name=name,
            images=count,
            smallest_bytes=float(smallest[c]),
            points=[
                CodecPoint(
                    tokens=length,
                    token_bytes=length * bits / 8,
                    bytes=float(size[c, k]),
                    bits_per_pixel=float(size[c, k]) * 8 / pixels,
                    l1=float(l1[c, k]),
                    psnr=float(psnr[c, k]),
                )
                for k, length in enumerate(lengths)
            ],
        )
        for c, name in enumerate(CODECS)
    ]


def _against(measured: Measured, rulers: Rulers) -> Against | None:
    if rulers.against is None:
        return None
    lengths, common = rulers.model.config.lengths, rulers.common_lengths
    versions = [*(lengths.index(length) for length in common), len(lengths)]
    *differences, base = (bootstrap(d) for d in (measured.l1[:, versions] - measured.against_l1).T)
    return Against(fingerprint=rulers.against_fingerprint, lengths=list(common), differences=differences, base=base)
