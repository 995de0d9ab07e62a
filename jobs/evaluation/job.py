"""What weights are worth: every image measured at every length, in one streaming pass of Ray Data.

One row of the Ray dataset is a run of batches; actors hold the models, read, decode and measure, and send small numbers
back, batch by batch. The batches do not depend on how many actors there are, and neither do the numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console

from alit.errors import AlitError
from jobs.evaluation.actor import local_device, parts_through_ray
from jobs.evaluation.markdown import markdown
from jobs.evaluation.models import RulerFiles, Rulers
from jobs.evaluation.per_image import Collected, Part, measure
from jobs.evaluation.plot import draw
from jobs.evaluation.report import Evaluation, report, require_thresholds
from jobs.evaluation.units import Job, every_row, measure_unit, spread, units
from jobs.runtime.progress import job_bar
from jobs.sources.open import make_plan
from jobs.storage.path import parse_uri

LARGEST_BATCH = 64


PIXELS = 1 << 20
"""Of a batch, at most: LPIPS's first layers alone take half a KiB for each."""


def evaluate(rulers: Rulers, batches: Iterable[np.ndarray], thresholds: Sequence[float] = ()) -> Evaluation:
    """Evaluates a model on images in memory, uint8 [B, S, S, 3] each; the codecs are tried on all of them.

    Args:
        rulers: the model, and what else there is to measure with.
        batches: of any sizes, at least one image each.
        thresholds: of the criterion `l1`; some that spread the lengths when none are given.

    Raises:
        AlitError: no images, or a threshold is not a positive number.
    """
    require_thresholds(thresholds)
    collected = Collected()
    for number, pixels in enumerate(batches):
        collected.add(Part(number, measure(rulers, pixels, np.ones(len(pixels), bool)), []))
    return report(collected, rulers, thresholds)


def run(
    source: str,
    output: str | None = None,
    *,
    weights: str | None = None,
    against: str | None = None,
    thresholds: Sequence[float] = (),
    vgg: str | None = None,
    lpips: str | None = None,
    inception: str | None = None,
    workers: int | None = None,
    most: int | None = None,
    image_column: str = "image",
    ray: bool = True,
    console: Console | None = None,
) -> Evaluation:
    """Evaluates a weights folder and prints the tables; the arguments are those of `alit evaluate`.

    Raises:
        AlitError: whatever a person can put right, before anything is measured; or no image could be decoded.
    """
    for option, value in (("--workers", workers), ("--most", most)):
        if value is not None and value < 1:
            raise AlitError(f"{option} must be at least 1, got {value}")
    require_thresholds(thresholds)
    console = console or Console(stderr=True)
    given = RulerFiles(weights=weights, against=against, vgg=vgg, lpips=lpips, inception=inception)
    rulers = Rulers.load(
        given, "cpu" if ray else local_device()
    )  # here too: what is wrong costs a sentence, not a start
    plan = make_plan(source, rows_per_file=1024, image_column=image_column)
    target = parse_uri(output) if output is not None else None
    rows = every_row(plan)
    rows = [rows[index] for index in spread(len(rows), most)]
    size = rulers.model.config.image_size
    batch_size = max(1, min(LARGEST_BATCH, PIXELS // size**2))
    job = Job(source=plan.source, files=given.absolute(), batch_size=batch_size)
    console.print(f"{len(rows)} of {plan.images} images, at {len(rulers.model.config.lengths)} lengths")
    if ray:
        parts = parts_through_ray(job, rows, workers)
    else:
        parts = (part for unit in units(rows, batch_size, 1) for part in measure_unit(job, rulers, unit))
    result = report(_follow(parts, len(rows), console), rulers, thresholds)
    print(markdown(result))
    if target is not None:
        for ending, data in (
            (".json", (json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n").encode()),
            (".md", markdown(result).encode()),
            (".png", draw(result, "png")),
            (".svg", draw(result, "svg")),
        ):
            target.with_suffix(ending).write(data)
    return result


def _follow(parts: Iterable[Part], images: int, console: Console) -> Collected:
    """Gathers all parts, showing how far it is."""
    collected, started, before = Collected(), 0.0, 0
    with job_bar(console) as bar:
        task = bar.add_task("starting", total=images, rate="")
        for part in parts:
            collected.add(part)
            if not started:  # what came before took a start besides
                started, before = time.monotonic(), collected.through
            rate = (collected.through - before) / max(1e-9, time.monotonic() - started)
            text = f"{rate:.1f} images/s" if rate else ""
            bar.update(task, description="measuring", completed=collected.through, rate=text)
    return collected
