"""The output of the main job as a whole: begun, continued, counted, finished."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alit.errors import AlitError
from alit.tokens import DATA, MANIFEST, REJECTS, Metadata
from jobs.inputs import Plan, Shard
from jobs.shards import Job, Progress, file_name
from jobs.storage import Place

JOB = "_job.json"


@dataclass(kw_only=True, slots=True)
class Totals:
    """A dataset's counts.

    Attributes:
        lengths: images per length, shortest first.
    """

    images: int = 0
    rejects: int = 0
    satisfied: int = 0
    lengths: list[int] = field(default_factory=list)

    def add(self, progress: Progress) -> None:
        self.images += progress.images
        self.rejects += progress.rejects
        self.satisfied += progress.satisfied
        previous = self.lengths or [0] * len(progress.lengths)
        self.lengths = [a + b for a, b in zip(previous, progress.lengths, strict=True)]

    def tokens(self, metadata: Metadata) -> int:
        return sum(count * metadata.latents_per_iteration * (k + 1) for k, count in enumerate(self.lengths))


def job_record(job: Job, plan: Plan, rows_per_file: int) -> dict[str, Any]:
    """What makes two runs the same job."""
    return asdict(job.metadata) | {
        "input": plan.fingerprint(),
        "rows_per_file": rows_per_file,
        "batch_size": job.batch_size,
        "max_bytes": job.limits.max_bytes,
        "max_pixels": job.limits.max_pixels,
    }


def prepare_output(job: Job, plan: Plan, rows_per_file: int, *, overwrite: bool) -> list[Shard]:
    """Makes the output folder ready and returns the shards that are still to be done.

    Raises:
        AlitError: the folder holds something else, a finished dataset, or the beginnings of another job.
    """
    output, record = job.output, job_record(job, plan, rows_per_file)
    names = set(output.names())
    if names and overwrite:
        if JOB not in names:
            raise AlitError(f"{output.path!r} is no token dataset; --overwrite removes nothing but token datasets")
        output.remove_folder()
        names = set()
    if MANIFEST in names:
        raise AlitError(
            f"{output.path!r} holds a finished dataset; name another folder, or replace it with --overwrite"
        )
    if names and JOB not in names:
        raise AlitError(f"{output.path!r} exists and is not empty; name another folder")
    if names:
        try:
            previous = json.loads((output / JOB).read())
        except ValueError as error:
            raise AlitError(f"{output.path}/{JOB} is damaged ({error}); use --overwrite to begin anew") from error
        different = [key for key in record if previous.get(key) != record[key]]
        if different:
            raise AlitError(
                f"{output.path!r} was begun with other settings ({', '.join(different)}); use the same ones to go on, "
                f"or --overwrite"
            )
    else:
        (output / JOB).write(json.dumps(record, indent=1).encode())
    finished = set((output / DATA).names()) & set((output / REJECTS).names())
    return [shard for shard in plan.shards if file_name(shard.number) not in finished]


def require_apart(given: Place, job: Job) -> None:
    """Refuses an output that --overwrite would remove the input with, or that would become input itself.

    Args:
        given: the input as it was named.
        job: what is to be done.

    Raises:
        AlitError: one lies in the other.
    """
    root, output = job.source.root, job.output
    if root.filesystem != output.filesystem:
        return
    source, target = (os.path.realpath(place.path) if place.local else place.path for place in (root, output))
    if f"{source}/".startswith(f"{target}/"):
        raise AlitError(f"the input lies in the output folder {output.path!r}; name an output folder outside of it")
    if job.source.parquet and given == root and f"{target}/".startswith(f"{source}/"):
        raise AlitError(
            f"the output folder {output.path!r} lies in the input folder, whose Parquet files are all input; "
            f"name one outside of it"
        )


def read_totals(job: Job, numbers: Sequence[int]) -> Totals:
    """The counts of shards that are already written, from their files."""
    totals, metadata = Totals(), job.metadata
    for number in numbers:
        table = pq.read_table(_source(job, DATA, number), columns=["num_tokens", "satisfied"])
        rejects = pq.read_metadata(_source(job, REJECTS, number)).num_rows
        rounds = table.column("num_tokens").to_numpy() // metadata.latents_per_iteration
        lengths = np.bincount(rounds - 1, minlength=metadata.iterations).tolist()
        satisfied = int(np.sum(table.column("satisfied").to_numpy()))
        totals.add(Progress(number, len(table), rejects, lengths, satisfied, 0.0, True))
    return totals


def _source(job: Job, folder: str, number: int) -> pa.BufferReader:
    return pa.BufferReader((job.output / folder / file_name(number)).read())


def finish(job: Job, plan: Plan, totals: Totals) -> None:
    """Writes the dataset's card and, last, the manifest that says it is complete."""
    metadata = asdict(job.metadata)
    manifest = {
        "format": metadata["format"],
        "metadata": metadata,
        "images": totals.images,
        "rejects": totals.rejects,
        "satisfied": totals.satisfied,
        "tokens": totals.tokens(job.metadata),
        "lengths": {str((k + 1) * job.metadata.latents_per_iteration): count for k, count in enumerate(totals.lengths)},
        "files": len(plan.shards),
    }
    for folder in (DATA, REJECTS):
        (job.output / folder).remove_unfinished()
    (job.output / "README.md").write(dataset_card(job.metadata, totals).encode())
    (job.output / MANIFEST).write(json.dumps(manifest, indent=1).encode())


def dataset_card(metadata: Metadata, totals: Totals) -> str:
    """A README whose header makes Hugging Face's `load_dataset(folder)` read the tokens and nothing else."""
    mean = totals.tokens(metadata) / max(1, totals.images)
    return f"""---
configs:
- config_name: default
  data_files: data/*.parquet
---
# Adaptive-length image tokens

{totals.images} images, {mean:.1f} tokens each on average, chosen by `{metadata.criterion}` at {metadata.image_size} px;
{totals.rejects} images could not be tokenized (`{REJECTS}/`). One token is one of {metadata.codebook_size} codes.

| column | |
| --- | --- |
| id | unique name of the image |
| tokens | latent codebook ids in order of creation; a shorter code is not a prefix of a longer one |
| num_tokens | their number |
| score | the criterion's value at this length |
| satisfied | whether the threshold was met |
| trace | the criterion's value at every length tried, shortest first |
| width, height | of the source image |

Weights: `{metadata.fingerprint}`. Decode with
`alit.tokens.TokenDataset(folder).decode(alit.load_weights(), rows)`.
"""
