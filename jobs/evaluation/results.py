"""The results of an evaluation, as written to JSON: the fields' names are its keys."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jobs.evaluation.bootstrap import ConfidenceInterval
from jobs.evaluation.per_image import RejectedImage


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionQuality:
    """Distances between images and reconstructions, means over images; None where not measured.

    Attributes:
        l1: Mean absolute error of unclamped reconstructions; the other distances are those of clamped ones.
        mse: Mean squared error.
        psnr: In dB.
        ssim: Structural similarity.
        lpips: LPIPS with VGG.
        rfid: Fréchet Inception distance between the set of images and the set of reconstructions.
    """

    l1: float
    mse: float
    psnr: float
    ssim: float
    lpips: float | None = None
    rfid: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RateDistortion:
    """Rate and distortion of one encoding.

    Attributes:
        tokens: Tokens per image.
        bits_per_pixel: Rate at log2 of the codebook's size per token; None for continuous tokens.
        quality: The distortion.
        codes_used: Perplexity of the codes; None for continuous tokens.
        change: Change of the mean L1 from the next shorter length; None for the shortest, and for the base.
    """

    tokens: int
    bits_per_pixel: float | None
    quality: ReconstructionQuality
    codes_used: float | None
    change: ConfidenceInterval | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveEncoding:
    """Rate and distortion at the lengths that `l1:threshold` chooses.

    Attributes:
        threshold: The criterion's threshold.
        mean_tokens: Mean over images.
        bits_per_pixel: Mean over images, without the cost of signalling the length; None for continuous tokens.
        counts: Images per length, shortest first.
        satisfied: The share of images that meet the threshold at some length.
        l1: Mean at the chosen lengths.
        psnr: Mean at the chosen lengths, in dB.
        ssim: Mean at the chosen lengths.
        gain: L1 minus that of one fixed length at the same mean tokens; negative where adaptive lengths are better.
            See `jobs.evaluation.bootstrap.adaptive_gain`.
        spearman_jpeg: Rank correlation of the chosen length with the bytes of the image as JPEG of quality 75.
        spearman_gradient: Rank correlation of the chosen length with `alit.reconstruction.gradient_entropy`.
    """

    threshold: float
    mean_tokens: float
    bits_per_pixel: float | None
    counts: list[int]
    satisfied: float
    l1: float
    psnr: float
    ssim: float
    gain: ConfidenceInterval
    spearman_jpeg: float
    spearman_gradient: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecPoint:
    """Rate and distortion of an image codec at the files nearest in size to a length's tokens, means over images."""

    tokens: int
    token_bytes: float
    bytes: float
    bits_per_pixel: float
    l1: float
    psnr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecCurve:
    """Rate and distortion of an image codec, file headers included.

    Attributes:
        name: A name of `jobs.evaluation.image_codecs.CODECS`.
        images: Number of images measured.
        smallest_bytes: Mean size at the lowest quality.
        points: One per length.
    """

    name: str
    images: int
    smallest_bytes: float
    points: list[CodecPoint]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedComparison:
    """L1 minus that of other weights on the same images; negative where the evaluated weights are better.

    Attributes:
        fingerprint: The fingerprint of the other weights.
        lengths: The lengths that both have.
        differences: One per length.
        base: Difference of the base tokenizers' own reconstructions.
    """

    fingerprint: str
    lengths: list[int]
    differences: list[ConfidenceInterval]
    base: ConfidenceInterval


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result of an evaluation on one set of images.

    Attributes:
        software: Name and version of the software.
        fingerprint: The fingerprint of the weights.
        criterion: The weights' default criterion.
        image_size: Side of the model's images, in pixels.
        images: Number of images measured.
        rejects: Images that could not be decoded.
        codebook_size: None for continuous latents.
        base_codebook_size: None for a continuous base.
        lengths: One encoding per length, shortest first.
        base: The base tokenizer's own reconstruction.
        thumbnail: A 4 x 4 thumbnail, enlarged bicubically.
        mean_color: One colour per image.
        adaptive: One per threshold.
        codecs: One per image codec; empty for continuous latents.
        against: The comparison with other weights, if any.
    """

    software: str
    fingerprint: str
    criterion: str
    image_size: int
    images: int
    rejects: list[RejectedImage]
    codebook_size: int | None
    base_codebook_size: int | None
    lengths: list[RateDistortion]
    base: RateDistortion
    thumbnail: ReconstructionQuality
    mean_color: ReconstructionQuality
    adaptive: list[AdaptiveEncoding]
    codecs: list[CodecCurve]
    against: PairedComparison | None

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as values that JSON can hold."""
        return asdict(self) | {"rejects": [reject._asdict() for reject in self.rejects]}
