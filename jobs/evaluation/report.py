"""Aggregation of measurements over images: means, confidence intervals and correlations.

Shapes: B images, K lengths, V reconstructions of an image, C codecs, as in `jobs.evaluation.per_image`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import alit
from alit.metrics.fid import frechet_distance
from alit.model.config import AlitConfig, VQGANConfig
from alit.reconstruction import first_within, perplexity
from jobs.evaluation.bootstrap import adaptive_gain, bootstrap_mean, spearman
from jobs.evaluation.image_codecs import CODECS
from jobs.evaluation.models import EvaluationModels
from jobs.evaluation.options import require_thresholds
from jobs.evaluation.per_image import MeasurementCollector, Measurements, bits_per_base_token, bits_per_token
from jobs.evaluation.results import (
    AdaptiveEncoding,
    CodecCurve,
    CodecPoint,
    Evaluation,
    PairedComparison,
    RateDistortion,
    ReconstructionQuality,
)


def default_thresholds(errors: np.ndarray) -> list[float]:
    """Returns L1 thresholds that spread the lengths, from errors [K, B]: each length's median and one in between."""
    medians = np.median(errors, axis=1)
    return sorted({round(float(t), 4) for t in (*medians, (medians[0] + medians[-1]) / 2)}, reverse=True)


def measure_adaptive(
    measurements: Measurements, lengths: Sequence[int], threshold: float, bits: float | None = None
) -> AdaptiveEncoding:
    """Applies the criterion `l1:threshold` to measured lengths.

    Args:
        measurements: Measurements of all images.
        lengths: Shortest first.
        threshold: The criterion's threshold.
        bits: Bits per token and pixel; None for continuous tokens.
    """
    errors = measurements.l1[:, : len(lengths)].T
    chosen = first_within(errors, threshold)
    tokens, rows = np.asarray(lengths)[chosen], np.arange(len(chosen))
    return AdaptiveEncoding(
        threshold=threshold,
        mean_tokens=float(tokens.mean()),
        bits_per_pixel=None if bits is None else float(tokens.mean()) * bits,
        counts=np.bincount(chosen, minlength=len(lengths)).tolist(),
        satisfied=float((errors <= np.float32(threshold)).any(0).mean()),
        l1=float(measurements.l1[rows, chosen].mean(dtype=np.float64)),
        psnr=float(measurements.psnr[rows, chosen].mean(dtype=np.float64)),
        ssim=float(measurements.ssim[rows, chosen].mean(dtype=np.float64)),
        gain=adaptive_gain(errors, lengths, chosen),
        spearman_jpeg=spearman(tokens, measurements.jpeg_bytes),
        spearman_gradient=spearman(tokens, measurements.gradient_entropy),
    )


def build_report(
    collector: MeasurementCollector, models: EvaluationModels, thresholds: Sequence[float] = ()
) -> Evaluation:
    """Aggregates the measurements of all images.

    Args:
        collector: The measurements.
        models: The models that they were made with.
        thresholds: Thresholds of the criterion `l1`; those of `default_thresholds` when empty.

    Raises:
        AlitError: No image was measured, or a threshold is not a positive number.
    """
    require_thresholds(thresholds)
    measurements, config = collector.measurements(), models.model.config
    lengths, pixels, bits = config.lengths, config.image_size**2, bits_per_token(config)
    bits_per_pixel = None if bits is None else bits / pixels  # of one token
    thresholds = thresholds or default_thresholds(measurements.l1[:, : len(lengths)].T)
    return Evaluation(
        software=f"alit {alit.__version__}",
        fingerprint=models.fingerprint,
        criterion=config.criterion,
        image_size=config.image_size,
        images=len(measurements.l1),
        rejects=collector.rejects,
        codebook_size=config.codebook_size,
        base_codebook_size=_base_codebook_size(config),
        lengths=_lengths(collector, measurements, config, bits_per_pixel),
        base=_base(collector, measurements, config),
        thumbnail=_quality(measurements, len(lengths) + 1),
        mean_color=_quality(measurements, len(lengths) + 2),
        adaptive=[measure_adaptive(measurements, lengths, t, bits_per_pixel) for t in thresholds],
        codecs=_codecs(measurements, lengths, bits, pixels),
        against=_compare(measurements, models),
    )


def _lengths(
    collector: MeasurementCollector, measurements: Measurements, config: AlitConfig, bits: float | None
) -> list[RateDistortion]:
    size, errors = config.codebook_size, measurements.l1.T
    ids = np.split(measurements.ids, np.cumsum(config.lengths)[:-1], axis=1) if size else []
    return [
        RateDistortion(
            tokens=length,
            bits_per_pixel=None if bits is None else length * bits,
            quality=_quality(measurements, k, _rfid(collector, k)),
            codes_used=perplexity(ids[k], size) if size else None,
            change=None if k == 0 else bootstrap_mean(errors[k] - errors[k - 1]),
        )
        for k, length in enumerate(config.lengths)
    ]


def _base(collector: MeasurementCollector, measurements: Measurements, config: AlitConfig) -> RateDistortion:
    bits, size, version = bits_per_base_token(config), _base_codebook_size(config), len(config.lengths)
    return RateDistortion(
        tokens=config.grid**2,
        bits_per_pixel=None if bits is None else config.grid**2 * bits / config.image_size**2,
        quality=_quality(measurements, version, _rfid(collector, version)),
        codes_used=None if size is None else perplexity(measurements.base_ids, size),
    )


def _base_codebook_size(config: AlitConfig) -> int | None:
    return config.base.codebook_size if isinstance(config.base, VQGANConfig) else None


def _quality(measurements: Measurements, version: int, rfid: float | None = None) -> ReconstructionQuality:
    """Averages the distances of one of the V reconstructions."""

    def mean(values: np.ndarray) -> float:
        return float(values[:, version].mean(dtype=np.float64))

    return ReconstructionQuality(
        l1=mean(measurements.l1),
        mse=mean(measurements.mse),
        psnr=mean(measurements.psnr),
        ssim=mean(measurements.ssim),
        lpips=mean(measurements.lpips) if measurements.lpips.size else None,
        rfid=rfid,
    )


def _rfid(collector: MeasurementCollector, version: int) -> float | None:
    moments = collector.moments
    return frechet_distance(moments[version], moments[-1]) if moments and moments[-1].count > 1 else None


def _codecs(measurements: Measurements, lengths: Sequence[int], bits: float | None, pixels: int) -> list[CodecCurve]:
    count = len(measurements.codec_bytes)
    if bits is None or count == 0:
        return []
    size, l1, psnr = (
        values.mean(axis=0, dtype=np.float64)  # [C, K]
        for values in (measurements.codec_bytes, measurements.codec_l1, measurements.codec_psnr)
    )
    smallest = measurements.codec_smallest_bytes.mean(axis=0, dtype=np.float64)
    return [
        CodecCurve(
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


def _compare(measurements: Measurements, models: EvaluationModels) -> PairedComparison | None:
    if models.against is None:
        return None
    lengths, common = models.model.config.lengths, models.common_lengths
    versions = [*(lengths.index(length) for length in common), len(lengths)]
    *differences, base = (bootstrap_mean(d) for d in (measurements.l1[:, versions] - measurements.against_l1).T)
    return PairedComparison(
        fingerprint=models.against_fingerprint, lengths=list(common), differences=differences, base=base
    )
