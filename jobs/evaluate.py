"""What weights are worth: the error at every length, how lengths follow the pictures, how codebooks are used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from alit import metrics
from alit.data import center_crops, read_photographs
from alit.errors import ConfigError
from alit.images import encode_image
from alit.tokenizer import Alit
from alit.weights import load_weights

BATCH = 64
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptive:
    """The lengths that `l1:threshold` chooses.

    Attributes:
        counts: images per length, shortest first.
        l1: at the chosen lengths.
        spearman: rank correlation of the chosen length with the bytes of the model-size input as JPEG, quality 75.
    """

    threshold: float
    mean_tokens: float
    counts: list[int]
    satisfied: float
    l1: float
    spearman: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Numbers over one set of images.

    Attributes:
        l1, psnr: mean at every length, shortest first.
        change: of the mean L1 from each length to the next, with its paired bootstrap's 95 % interval (low, high).
        base_l1: of the base tokenizer's own reconstruction.
        mean_color_l1, thumbnail_l1: of one colour per image, and of a 4 x 4 thumbnail enlarged bicubically.
        perplexity, base_perplexity: codes used as if evenly, of the latent codebook (at every length) and the base's.
    """

    fingerprint: str
    images: int
    lengths: list[int]
    l1: list[float]
    psnr: list[float]
    change: list[tuple[float, float, float]]
    base_l1: float
    mean_color_l1: float
    thumbnail_l1: float
    codebook_size: int
    perplexity: list[float]
    base_codebook_size: int
    base_perplexity: float
    adaptive: list[Adaptive]


def perplexity(ids: Tensor, size: int) -> float:
    """The number of codes that are used as if evenly: e to the entropy of how often each is chosen."""
    share = torch.bincount(ids.flatten(), minlength=size).double()
    return float(torch.exp(torch.special.entr(share / share.sum()).sum()))


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side is constant."""
    ranks = []
    for values in (np.asarray(a), np.asarray(b)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if min(rank.std() for rank in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def bootstrap(differences: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The mean of paired differences and its 95 % percentile interval."""
    random = np.random.default_rng(seed)
    rows = random.integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[rows].mean(1), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


@torch.inference_mode()
def evaluate(model: Alit, images: Tensor, fingerprint: str, thresholds: Sequence[float] = ()) -> Evaluation:
    """Evaluates a discrete model on uint8 images [B, 3, S, S].

    Args:
        thresholds: of the criterion `l1`; when none are given, those at which each length is the middle one's equal.

    Raises:
        ConfigError: continuous latents or a continuous base.
    """
    config = model.config
    if model.codebook is None or not hasattr(model.base, "codebook"):
        raise ConfigError("evaluation counts codes: it needs quantized latents over a discrete base")
    lengths = config.lengths
    l1: list[Tensor] = []
    psnr: list[Tensor] = []
    base_l1, color_l1, thumbnail_l1, base_ids = [], [], [], []
    ids: list[list[Tensor]] = [[] for _ in lengths]
    for part in track(images.split(BATCH), description="evaluating", transient=True):
        x = part.float() / 255
        base = model.base.encode(x)
        base_l1.append(metrics.l1(x, model.base.decode(base.target_BDhw)))
        base_ids.append(base.ids_BG)
        color_l1.append(metrics.l1(x, x.mean(dim=(2, 3), keepdim=True).expand_as(x)))
        small = F.interpolate(x, size=4, mode="area")
        thumbnail_l1.append(metrics.l1(x, F.interpolate(small, size=x.shape[-1], mode="bicubic").clamp(0, 1)))
        pictures = []
        for k, step in enumerate(model.rollout(x, base=base)):
            pictures.append(model.reconstruct(step.codes_BNC))
            assert step.ids_BN is not None
            ids[k].append(step.ids_BN)
        l1.append(torch.stack([metrics.l1(x, picture) for picture in pictures]))
        psnr.append(torch.stack([metrics.psnr(x, picture.clamp(0, 1)) for picture in pictures]))
    errors = torch.cat(l1, 1).numpy()
    sizes = [len(encode_image(p, "jpeg", 75)) for p in images.permute(0, 2, 3, 1).contiguous().numpy()]
    if not thresholds:
        middle = np.median(errors, axis=1)
        thresholds = sorted({round(float(t), 4) for t in (*middle, (middle[0] + middle[-1]) / 2)}, reverse=True)
    return Evaluation(
        fingerprint=fingerprint,
        images=len(images),
        lengths=list(lengths),
        l1=errors.mean(1).tolist(),
        psnr=torch.cat(psnr, 1).mean(1).tolist(),
        change=[bootstrap(b - a) for a, b in pairwise(errors)],
        base_l1=float(torch.cat(base_l1).mean()),
        mean_color_l1=float(torch.cat(color_l1).mean()),
        thumbnail_l1=float(torch.cat(thumbnail_l1).mean()),
        codebook_size=len(model.codebook.weight),
        perplexity=[perplexity(torch.cat(part), len(model.codebook.weight)) for part in ids],
        base_codebook_size=model.base.prediction_dim,
        base_perplexity=perplexity(torch.cat(base_ids), model.base.prediction_dim),
        adaptive=[adaptive(errors, lengths, sizes, threshold) for threshold in thresholds],
    )


def adaptive(errors: np.ndarray, lengths: Sequence[int], sizes: Sequence[int], threshold: float) -> Adaptive:
    """What `l1:threshold` chooses, from the L1 of every image at every length, [K, B]."""
    met = errors <= np.float32(threshold)
    chosen = np.where(met.any(0), met.argmax(0), len(lengths) - 1)
    tokens = np.asarray(lengths)[chosen]
    return Adaptive(
        threshold=threshold,
        mean_tokens=float(tokens.mean()),
        counts=np.bincount(chosen, minlength=len(lengths)).tolist(),
        satisfied=float(met.any(0).mean()),
        l1=float(errors[chosen, np.arange(errors.shape[1])].mean()),
        spearman=spearman(tokens, np.asarray(sizes)),
    )


def markdown(result: Evaluation) -> str:
    """The evaluation as tables."""
    lines = [
        f"{result.images} images, weights `{result.fingerprint[:12]}`",
        "",
        "| tokens | L1 | change, 95 % interval | PSNR | codes used |",
        "| --- | --- | --- | --- | --- |",
    ]
    for k, length in enumerate(result.lengths):
        change = "" if k == 0 else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*result.change[k - 1])
        used = f"{result.perplexity[k]:.0f} of {result.codebook_size}"
        lines.append(f"| {length} | {result.l1[k]:.4f} | {change} | {result.psnr[k]:.2f} dB | {used} |")
    lines += [
        f"| base tokenizer | {result.base_l1:.4f} | | | {result.base_perplexity:.0f} of {result.base_codebook_size} |",
        f"| 4 x 4 thumbnail | {result.thumbnail_l1:.4f} | | | |",
        f"| mean colour | {result.mean_color_l1:.4f} | | | |",
        "",
        "| criterion | mean tokens | images per length | satisfied | L1 | Spearman with JPEG bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result.adaptive:
        counts = " / ".join(map(str, row.counts))
        lines.append(
            f"| l1:{row.threshold:g} | {row.mean_tokens:.1f} | {counts} | {row.satisfied:.0%} | {row.l1:.4f} | "
            f"{row.spearman:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def run(images: str, output: Path | None, *, weights: str | None, thresholds: Sequence[float]) -> Evaluation:
    """Evaluates a weights folder and prints the tables; with `output`, also writes them there as .json and .md."""
    loaded = load_weights(weights)
    pixels = center_crops(read_photographs(images), loaded.model.config.image_size)
    result = evaluate(loaded.model, pixels, loaded.fingerprint, thresholds)
    print(markdown(result))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(asdict(result), indent=1) + "\n")
        output.with_suffix(".md").write_text(markdown(result))
    return result
