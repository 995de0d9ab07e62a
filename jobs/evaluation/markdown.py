"""An evaluation as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.evaluation.bootstrap import ConfidenceInterval
from jobs.evaluation.results import CodecCurve, Evaluation, RateDistortion, ReconstructionQuality

NAMES = {"jpeg": "JPEG", "webp": "WebP"}


def markdown(result: Evaluation) -> str:
    """Returns the whole evaluation as Markdown."""
    parts = [_heading(result), _lengths(result), _adaptive(result)]
    if result.codecs:
        parts += [_codecs(result), *(_too_large(codec) for codec in result.codecs)]
    if result.against is not None:
        parts.append(_against(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows under a heading, the first row; columns that are empty below it are left out."""
    columns = [c for c in range(len(rows[0])) if any(row[c] for row in rows[1:])]
    lines = ["| " + " | ".join(row[c] for c in columns) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(columns), *lines[1:]])


def _interval(value: ConfidenceInterval | None) -> str:
    return "" if value is None else f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _heading(result: Evaluation) -> str:
    size, rejects = result.image_size, len(result.rejects)
    text = f"{result.images} images of {size} x {size} pixels, weights `{result.fingerprint[:12]}`, {result.software}, "
    text += f"default criterion `{result.criterion}`"
    if rejects:
        text += f"; {rejects} more could not be decoded"
    return text


def _lengths(result: Evaluation) -> str:
    rows = [["tokens", "bits per pixel", "L1", "change, 95 % interval", "MSE", "PSNR", "SSIM", "LPIPS", "rFID"]]
    rows[0].append("codes used")

    def row(
        label: str, quality: ReconstructionQuality, code: RateDistortion | None = None, size: int | None = None
    ) -> list[str]:
        return [
            label,
            "" if code is None else _number(code.bits_per_pixel, ".3f"),
            f"{quality.l1:.4f}",
            "" if code is None else _interval(code.change),
            f"{quality.mse:.4f}",
            f"{quality.psnr:.2f} dB",
            f"{quality.ssim:.3f}",
            _number(quality.lpips, ".4f"),
            _number(quality.rfid, ".2f"),
            "" if code is None or code.codes_used is None else f"{code.codes_used:.0f} of {size}",
        ]

    rows += [row(str(code.tokens), code.quality, code, result.codebook_size) for code in result.lengths]
    base = f"base tokenizer, {result.base.tokens}"
    rows.append(row(base, result.base.quality, result.base, result.base_codebook_size))
    rows += [row("4 x 4 thumbnail", result.thumbnail), row("mean colour", result.mean_color)]
    return _table(rows)


def _adaptive(result: Evaluation) -> str:
    rows = [["criterion", "mean tokens", "bits per pixel", "images per length", "satisfied", "L1", "PSNR", "SSIM"]]
    rows[0] += ["L1 minus one length's, same mean tokens", "Spearman with JPEG bytes", "with gradient entropy"]
    rows += [
        [
            f"l1:{row.threshold:g}",
            f"{row.mean_tokens:.1f}",
            _number(row.bits_per_pixel, ".3f"),
            " / ".join(map(str, row.counts)),
            f"{row.satisfied:.0%}",
            f"{row.l1:.4f}",
            f"{row.psnr:.2f} dB",
            f"{row.ssim:.3f}",
            _interval(row.gain),
            f"{row.spearman_jpeg:+.2f}",
            f"{row.spearman_gradient:+.2f}",
        ]
        for row in result.adaptive
    ]
    return _table(rows)


def _codecs(result: Evaluation) -> str:
    heading = ["tokens", "bytes"]
    for codec in result.codecs:
        heading += [f"{NAMES[codec.name]} {column}" for column in ("bytes", "L1", "PSNR")]
    rows = [heading]
    for k, code in enumerate(result.lengths):
        row = [str(code.tokens), f"{result.codecs[0].points[k].token_bytes:.0f}"]
        for codec in result.codecs:
            point = codec.points[k]
            row += [f"{point.bytes:.0f}", f"{point.l1:.4f}", f"{point.psnr:.2f} dB"]
        rows.append(row)
    return _table(rows)


def _too_large(codec: CodecCurve) -> str:
    """Returns a sentence if the codec's smallest files are larger than some lengths' tokens, else an empty string."""
    below = [point for point in codec.points if point.token_bytes < codec.smallest_bytes]
    if not below:
        return ""
    span = f"{below[0].tokens}" if len(below) == 1 else f"{below[0].tokens} to {below[-1].tokens}"
    images = f"{codec.images} image{'' if codec.images == 1 else 's'}"
    return (
        f"{NAMES[codec.name]} cannot get as small as {span} tokens: at its lowest quality its files, headers "
        f"included, have {codec.smallest_bytes:.0f} bytes, mean over {images}."
    )


def _against(result: Evaluation) -> str:
    against = result.against
    assert against is not None
    rows = [["tokens", f"L1 minus that of weights `{against.fingerprint[:12]}`, 95 % interval"]]
    for length, difference in zip(against.lengths, against.differences, strict=True):
        rows.append([str(length), _interval(difference)])
    return _table([*rows, ["base tokenizer", _interval(against.base)]])
