"""The tokenize job without Ray: its own functions, called one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alit.dataset import checked_criterion
from alit.weights import Weights
from jobs.dataset.folder import Totals, finish
from jobs.dataset.plan import StoredPlan, write_plan
from jobs.sources.open import open_input
from jobs.storage.path import parse_uri
from jobs.tokenization.description import TokenizeJob
from jobs.tokenization.shard import decoded_batches, tokenize_shard


def tokenize_in_process(
    source: str,
    output: str,
    weights: Weights,
    criterion: str,
    *,
    rows_per_file: int,
    keep: Sequence[str] = (),
    id_column: str | None = None,
    **fields: Any,
) -> tuple[TokenizeJob, StoredPlan]:
    """Writes the dataset of an input, and returns its job and its plan.

    Args:
        source: the input's URI.
        output: the dataset's URI.
        weights: that encode the images.
        criterion: under which they do.
        rows_per_file: images of a shard.
        keep: columns of the input to keep.
        id_column: the column of the ids.
        fields: further fields of the job, such as its batch size.
    """
    folder = parse_uri(output)
    opened = open_input(source, rows_per_file=rows_per_file, keep=keep, id_column=id_column)
    plan = write_plan(folder, opened, rows_per_file, None)
    job = TokenizeJob(
        source=plan.source,
        output=folder,
        config=weights.model.config,
        fingerprint=weights.fingerprint,
        criterion=checked_criterion(weights, criterion),
        **fields,
    )
    totals = Totals()
    for shard in map(plan.shard, range(plan.shards)):
        *_, last = tokenize_shard(job, weights.model, shard, decoded_batches(job, shard))
        totals.add(last)
    finish(folder, job.metadata, plan, totals)
    return job, plan
