"""The driver of `alit evaluate`: every image measured at every length, in one streaming pass of Ray Data.

One row of the Ray dataset is a unit of several batches; actors hold the models, read, decode and measure, and return
small arrays batch by batch. Neither the batches nor the results depend on the number of actors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console

from jobs.evaluation.actor import measure_on_ray
from jobs.evaluation.markdown import markdown
from jobs.evaluation.models import EvaluationModels, local_device
from jobs.evaluation.options import EvaluateOptions, require_thresholds
from jobs.evaluation.per_image import BatchMeasurements, MeasurementCollector, measure
from jobs.evaluation.plot import draw
from jobs.evaluation.report import build_report
from jobs.evaluation.results import Evaluation
from jobs.evaluation.units import EvaluationJob, evenly_spaced, measure_unit, plan_rows, work_units
from jobs.runtime.progress import job_bar
from jobs.sources.open import make_plan
from jobs.storage.path import StoragePath, parse_uri

MAX_BATCH_SIZE = 64
MAX_BATCH_PIXELS = 1 << 20
"""The first layers of LPIPS alone take half a KiB per pixel of a batch."""
DEFAULTS = EvaluateOptions()


def evaluate(models: EvaluationModels, batches: Iterable[np.ndarray], thresholds: Sequence[float] = ()) -> Evaluation:
    """Evaluates a model on images in memory; image codecs are measured on all of them.

    Args:
        models: The model and what measures it.
        batches: uint8 [B, S, S, 3] each, of any sizes B of at least 1.
        thresholds: Thresholds of the criterion `l1`; some that spread the lengths when empty.

    Raises:
        AlitError: There are no images, or a threshold is not a positive number.
    """
    require_thresholds(thresholds)
    collector = MeasurementCollector()
    for number, pixels in enumerate(batches):
        collector.add(BatchMeasurements(number, measure(models, pixels, np.ones(len(pixels), bool)), []))
    return build_report(collector, models, thresholds)


def run(
    source: str, output: str | None = None, options: EvaluateOptions = DEFAULTS, console: Console | None = None
) -> Evaluation:
    """Evaluates a weights folder, prints the tables and writes the report.

    Args:
        source: Images, as for `alit tokenize`.
        output: Path or URI of the report without its endings; not written when None.
        options: Options of `alit evaluate`.
        console: Shows the progress; stderr when None.

    Raises:
        AlitError: A file or the input cannot be used, before anything is measured; or no image could be decoded.
    """
    console = console or Console(stderr=True)
    # loaded by the driver too, so that unusable files are reported before Ray starts
    models = EvaluationModels.load(options.paths, "cpu" if options.ray else local_device())
    plan = make_plan(source, rows_per_file=1024, image_column=options.image_column)
    target = parse_uri(output) if output is not None else None
    rows = plan_rows(plan)
    rows = [rows[index] for index in evenly_spaced(len(rows), options.limit)]
    config = models.model.config
    batch_size = max(1, min(MAX_BATCH_SIZE, MAX_BATCH_PIXELS // config.image_size**2))
    job = EvaluationJob(source=plan.source, paths=options.paths.absolute(), batch_size=batch_size)
    console.print(f"{len(rows)} of {plan.images} images, at {len(config.lengths)} lengths")
    if options.ray:
        batches = measure_on_ray(job, rows, options.workers)
    else:
        batches = (batch for unit in work_units(rows, batch_size, 1) for batch in measure_unit(job, models, unit))
    result = build_report(_collect(batches, len(rows), console), models, options.thresholds)
    print(markdown(result))
    if target is not None:
        _write(result, target)
    return result


def _write(result: Evaluation, target: StoragePath) -> None:
    for ending, data in (
        (".json", (json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n").encode()),
        (".md", markdown(result).encode()),
        (".png", draw(result, "png")),
        (".svg", draw(result, "svg")),
    ):
        target.with_suffix(ending).write(data)


def _collect(batches: Iterable[BatchMeasurements], images: int, console: Console) -> MeasurementCollector:
    """Collects all batches and shows the progress."""
    collector, started, at_start = MeasurementCollector(), 0.0, 0
    with job_bar(console) as bar:
        task = bar.add_task("starting", total=images, rate="")
        for batch in batches:
            collector.add(batch)
            if not started:  # the first batch includes the start-up, so the rate counts from there
                started, at_start = time.monotonic(), collector.processed
            rate = (collector.processed - at_start) / max(1e-9, time.monotonic() - started)
            text = f"{rate:.1f} images/s" if rate else ""
            bar.update(task, description="measuring", completed=collector.processed, rate=text)
    return collector
