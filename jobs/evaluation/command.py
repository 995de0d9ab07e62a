"""The command `alit evaluate`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg


def evaluate(
    source: Positional[Annotated[str, arg(metavar="INPUT")]],
    output: Positional[Annotated[str | None, arg(metavar="[OUTPUT]")]] = None,
    /,
    *,
    weights: str | None = None,
    against: str | None = None,
    thresholds: tuple[float, ...] = (),
    vgg: str | None = None,
    lpips: str | None = None,
    inception: str | None = None,
    workers: int | None = None,
    most: int | None = None,
    image_column: str = "image",
    ray: bool = True,
) -> None:
    """Measure what weights are worth: every length, adaptive lengths, the base tokenizer, JPEG and WebP beside them.

    Every image is measured at every length. The tables are printed, together with how sure they are.

    Example: alit evaluate held-out/ report --thresholds 0.08 0.1 0.12

    Args:
        source: Images, as for tokenize.
        output: Also write OUTPUT.json, OUTPUT.md, and plots of rate and distortion, OUTPUT.png and OUTPUT.svg.
        weights: A weights folder; the packaged one when not given.
        against: Another weights folder, for a paired comparison on the same images.
        thresholds: Of the criterion l1; some that spread the lengths when not given.
        vgg: torchvision's VGG16 file (vgg16-397923af.pth); with --lpips, LPIPS is measured.
        lpips: The VGG heads of LPIPS v0.1 (lpips/weights/v0.1/vgg.pth).
        inception: pytorch-fid's Inception file (pt_inception-2015-12-05-6726825d.pth); with it, rFID is measured.
        workers: Processes that hold the models; one per CPU, or per GPU where there is one.
        most: Images at most, spread evenly over the input.
        image_column: As for tokenize.
        ray: Measure in worker processes; --no-ray does it in this one, to find mistakes.
    """
    from jobs.evaluation import job

    job.run(
        source,
        output,
        weights=weights,
        against=against,
        thresholds=thresholds,
        vgg=vgg,
        lpips=lpips,
        inception=inception,
        workers=workers,
        most=most,
        image_column=image_column,
        ray=ray,
    )
