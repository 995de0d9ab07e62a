"""The token dataset's folder as a whole: starting, resuming, counting and finishing it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from alit.dataset import DATA, MANIFEST, REJECTS, Metadata
from alit.errors import AlitError
from alit.validation import require
from jobs.dataset.counts import Counts, tokens_of, written_counts
from jobs.dataset.plan import PLAN, StoredPlan
from jobs.sources.records import Source
from jobs.storage.path import StoragePath
from jobs.storage.retry import reason

JOB = "_job.json"
READERS = 32
"""Footers of finished files that are read concurrently."""


@dataclass(kw_only=True, slots=True)
class Totals:
    """Counts of a dataset.

    Attributes:
        images: Tokenized images.
        rejects: Rejected images.
        satisfied: Tokenized images that meet the criterion.
        lengths: Images per length, shortest first.
    """

    images: int = 0
    rejects: int = 0
    satisfied: int = 0
    lengths: list[int] = field(default_factory=list)

    def add(self, counts: Counts) -> None:
        """Adds the counts of one shard."""
        self.images += counts.images
        self.rejects += counts.rejects
        self.satisfied += counts.satisfied
        previous = self.lengths or [0] * len(counts.lengths)
        self.lengths = [a + b for a, b in zip(previous, counts.lengths, strict=True)]

    def tokens(self, metadata: Metadata) -> int:
        """Returns the number of tokens of all images."""
        return tokens_of(self.lengths, metadata.latents_per_iteration)


def read_record(output: StoragePath, *, overwrite: bool) -> dict[str, Any] | None:
    """Reads the record of an interrupted job.

    Args:
        output: The dataset's folder.
        overwrite: The dataset in it, if any, is going to be replaced.

    Returns:
        The contents of `_job.json`; None where there is nothing to resume.

    Raises:
        AlitError: The folder holds something else, or a finished dataset.
    """
    names = set(output.names())
    if overwrite:
        require(
            not names or bool(names & {JOB, PLAN}),
            f"{output.path!r} is not a token dataset; --overwrite removes nothing but token datasets",
        )
        return None
    require(
        MANIFEST not in names,
        f"{output.path!r} holds a finished dataset; name another folder, or replace it with --overwrite",
    )
    if JOB not in names:
        require(names <= {PLAN}, f"{output.path!r} exists and is not empty; name another folder")
        if names:  # an unfinished plan
            (output / PLAN).remove_folder()
        return None
    record = read_json(output / JOB)
    if record is None or not isinstance(record.get("plan"), dict):
        raise AlitError(f"{output.path}/{JOB} is damaged or of an older version; use --overwrite to start over")
    return record


def read_json(path: StoragePath) -> dict[str, Any] | None:
    """Reads a JSON object; returns None where the file does not exist.

    Raises:
        AlitError: The file is damaged or cannot be read.
    """
    try:
        value = json.loads(path.read())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise AlitError(f"{path.path!r} is damaged: {error}") from error
    except OSError as error:
        raise AlitError(f"{path.path!r} cannot be read: {reason(error)}") from error
    if not isinstance(value, dict):
        raise AlitError(f"{path.path!r} is damaged: it does not hold a JSON object")
    return value


def clear(output: StoragePath) -> None:
    """Removes a dataset: first the manifest, which marks it as complete, and last the record that identifies it."""
    (output / MANIFEST).remove_file()
    for name in (DATA, REJECTS, PLAN):
        if (output / name).exists():
            (output / name).remove_folder()
    if output.exists():
        output.remove_folder()


def require_same(output: StoragePath, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to resume a job with settings other than those it was started with.

    Args:
        output: The dataset's folder.
        before: The job's record.
        now: The settings to compare.

    Raises:
        AlitError: Settings differ; the message lists them.
    """
    different = [f"{key}: {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]]
    if different:
        raise AlitError(
            f"{output.path!r} was started with other settings ({'; '.join(different)}); use the same ones to resume, "
            f"or --overwrite to start over"
        )


def require_apart(input_path: StoragePath, source: Source, output: StoragePath) -> None:
    """Refuses an output whose removal would remove the input too, or that would become part of the input.

    Args:
        input_path: The input as it was named.
        source: The input that was opened there.
        output: The dataset's folder.

    Raises:
        AlitError: One lies in the other.
    """
    root = source.root
    if root.fs != output.fs:
        return
    parent, target = (os.path.realpath(path.path) if path.local else path.path for path in (root, output))
    if f"{parent}/".startswith(f"{target}/"):
        raise AlitError(f"the input lies in the output folder {output.path!r}; name an output folder outside of it")
    if source.kind == "table" and input_path.path == root.path and f"{target}/".startswith(f"{parent}/"):
        raise AlitError(
            f"the output folder {output.path!r} lies in the input folder, whose tables are all input; "
            f"name one outside of it"
        )


def unwritten(output: StoragePath, shards: int) -> np.ndarray:
    """Returns the numbers of the shards whose two files do not both exist, out of a number of shards."""
    todo = np.ones(shards, bool)
    finished = set((output / DATA).names()) & set((output / REJECTS).names())
    numbers = [int(name.partition(".")[0]) for name in finished if name.partition(".")[0].isdigit()]
    todo[[number for number in numbers if number < shards]] = False
    return np.flatnonzero(todo)


def read_totals(output: StoragePath, numbers: Iterable[int], report: Callable[[int], None] | None = None) -> Totals:
    """Sums up the counts of shards that are already written, from their files' footers.

    Args:
        output: The dataset's folder.
        numbers: The shards.
        report: Called with the number of shards read so far.

    Raises:
        AlitError: A file is damaged.
    """
    totals = Totals()

    def counts(number: int) -> Counts | None:
        try:
            return written_counts(output, number)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise AlitError(
                f"shard {number} of {output.path!r} is damaged ({error}); remove its files from {DATA} and {REJECTS}, "
                f"and run the same command again"
            ) from error

    done = 0
    with ThreadPoolExecutor(READERS) as pool:
        for group in batched(numbers):
            for shard_counts in pool.map(counts, group):
                assert shard_counts is not None
                totals.add(shard_counts)
                done += 1
            if report is not None:
                report(done)
    return totals


def batched(numbers: Iterable[int], size: int = 4096) -> Iterator[list[int]]:
    """Yields groups of numbers, since an executor's `map` consumes all of its input at once."""
    numbers = iter(numbers)
    while group := list(islice(numbers, size)):
        yield group


def finish(output: StoragePath, metadata: Metadata, plan: StoredPlan, totals: Totals) -> None:
    """Writes the dataset's card and, last, the manifest, which marks it as complete."""
    record = asdict(metadata)
    manifest = {
        "format": record["format"],
        "metadata": record,
        "images": totals.images,
        "rejects": totals.rejects,
        "satisfied": totals.satisfied,
        "tokens": totals.tokens(metadata),
        "lengths": {str((k + 1) * metadata.latents_per_iteration): count for k, count in enumerate(totals.lengths)},
        "files": plan.shards,
    }
    for folder in (DATA, REJECTS, PLAN):
        (output / folder).remove_unfinished()
    (output / "README.md").write(dataset_card(metadata, totals).encode())
    (output / MANIFEST).write(json.dumps(manifest, indent=1).encode())


def dataset_card(metadata: Metadata, totals: Totals) -> str:
    """Returns the README, whose header makes Hugging Face's `load_dataset(folder)` read the tokens and nothing else."""
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
`alit.dataset.TokenDataset(folder).decode(alit.load_weights(), rows)`.
"""
