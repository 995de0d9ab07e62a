"""The command `alit evaluate`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from jobs.evaluation.options import EvaluateOptions

DEFAULTS = EvaluateOptions()


def evaluate(
    source: Positional[Annotated[str, arg(metavar="INPUT")]],
    output: Positional[Annotated[str | None, arg(metavar="[OUTPUT]")]] = None,
    /,
    *,
    options: Annotated[EvaluateOptions, arg(name="")] = DEFAULTS,
) -> None:
    """Evaluate reconstruction quality of a checkpoint, beside its base tokenizer, JPEG and WebP.

    Every image is measured at every length and at the lengths that adaptive encoding chooses. The tables are printed,
    with 95 % confidence intervals.

    Example: alit evaluate held-out/ report --thresholds 0.08 0.1 0.12

    Args:
        source: Images, as for tokenize.
        output: Also write OUTPUT.json, OUTPUT.md, and plots of rate and distortion, OUTPUT.png and OUTPUT.svg.
        options: See `EvaluateOptions`.
    """
    from jobs.evaluation import job

    job.run(source, output, options)
