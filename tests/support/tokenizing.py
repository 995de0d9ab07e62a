"""The tokenize job without Ray: its own stages, called one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alit.dataset import metadata_of
from alit.weights import Weights
from jobs.dataset.folder import Totals, finish
from jobs.dataset.plan import StoredPlan, write_plan
from jobs.sources.open import open_input
from jobs.storage.path import parse_uri
from jobs.tokenization.shard import Job, decoded_batches, tokenize_shard


def tokenize_in_process(
    source: str,
    output: str,
    weights: Weights,
    criterion: str,
    *,
    rows_per_file: int,
    keep: Sequence[str] = (),
    id_column: str | None = None,
    **job: Any,
) -> StoredPlan:
    """Writes the dataset of an input, and returns its plan.

    Args:
        source: the input's URI.
        output: the dataset's URI.
        weights: that encode the images.
        criterion: under which they do.
        rows_per_file: images of a shard.
        keep: columns of the input to keep.
        id_column: the column of the ids.
        job: further fields of the job, such as its batch size.
    """
    folder, metadata = parse_uri(output), metadata_of(weights, criterion)
    opened = open_input(source, rows_per_file=rows_per_file, keep=keep, id_column=id_column)
    plan = write_plan(folder, opened, rows_per_file, None)
    stages = Job(source=plan.source, output=folder, metadata=metadata, **job)
    totals = Totals()
    for shard in map(plan.shard, range(plan.shards)):
        *_, last = tokenize_shard(stages, weights.model, shard, decoded_batches(stages, shard))
        totals.add(last)
    finish(folder, metadata, plan, totals)
    return plan
