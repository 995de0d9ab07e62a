"""The output of the main job as a whole: begun, continued, counted, finished."""

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
from jobs.dataset.counts import Counts, tokens_of, written_counts
from jobs.dataset.plan import PLAN, StoredPlan
from jobs.sources.records import Source
from jobs.storage.path import StoragePath
from jobs.storage.retry import reason

JOB = "_job.json"
READERS = 32
"""Footers of finished files that are read side by side."""


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

    def add(self, counts: Counts) -> None:
        self.images += counts.images
        self.rejects += counts.rejects
        self.satisfied += counts.satisfied
        previous = self.lengths or [0] * len(counts.lengths)
        self.lengths = [a + b for a, b in zip(previous, counts.lengths, strict=True)]

    def tokens(self, metadata: Metadata) -> int:
        return tokens_of(self.lengths, metadata)


def read_record(output: StoragePath, *, overwrite: bool) -> dict[str, Any] | None:
    """What an interrupted job wrote about itself; None where there is nothing to go on with, or it is to be replaced.

    Raises:
        AlitError: the folder holds something else, or a finished dataset.
    """
    names = set(output.names())
    if overwrite:
        if names and not names & {JOB, PLAN}:
            raise AlitError(f"{output.path!r} is no token dataset; --overwrite removes nothing but token datasets")
        return None
    if MANIFEST in names:
        raise AlitError(
            f"{output.path!r} holds a finished dataset; name another folder, or replace it with --overwrite"
        )
    if JOB not in names:
        if names - {PLAN}:
            raise AlitError(f"{output.path!r} exists and is not empty; name another folder")
        if names:  # a plan that was not finished
            (output / PLAN).remove_folder()
        return None
    record = read_json(output / JOB)
    if record is None or not isinstance(record.get("plan"), dict):
        raise AlitError(f"{output.path}/{JOB} is damaged or of an older version; use --overwrite to begin anew")
    return record


def read_json(where: StoragePath) -> dict[str, Any] | None:
    """An object of JSON; None where there is no such file.

    Raises:
        AlitError: it is damaged, or cannot be read.
    """
    try:
        found = json.loads(where.read())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise AlitError(f"{where.path!r} is damaged: {error}") from error
    except OSError as error:
        raise AlitError(f"{where.path!r} cannot be read: {reason(error)}") from error
    if not isinstance(found, dict):
        raise AlitError(f"{where.path!r} is damaged: it holds no object")
    return found


def clear(output: StoragePath) -> None:
    """Removes a dataset: first what says that it is complete, last what says that it is a dataset."""
    (output / MANIFEST).remove_file()
    for name in (DATA, REJECTS, PLAN):
        if (output / name).exists():
            (output / name).remove_folder()
    if output.exists():
        output.remove_folder()


def require_same(output: StoragePath, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with other settings than a job was begun with.

    Raises:
        AlitError: says which differ, and how.
    """
    different = [f"{key}: {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]]
    if different:
        raise AlitError(
            f"{output.path!r} was begun with other settings ({'; '.join(different)}); use the same ones to go on, "
            f"or --overwrite"
        )


def require_apart(given: StoragePath, source: Source, output: StoragePath) -> None:
    """Refuses an output that --overwrite would remove the input with, or that would become input itself.

    Args:
        given: the input as it was named.
        source: what was found there.

    Raises:
        AlitError: one lies in the other.
    """
    root = source.root
    if root.fs != output.fs:
        return
    above, target = (os.path.realpath(place.path) if place.local else place.path for place in (root, output))
    if f"{above}/".startswith(f"{target}/"):
        raise AlitError(f"the input lies in the output folder {output.path!r}; name an output folder outside of it")
    if source.kind == "table" and given.path == root.path and f"{target}/".startswith(f"{above}/"):
        raise AlitError(
            f"the output folder {output.path!r} lies in the input folder, whose tables are all input; "
            f"name one outside of it"
        )


def unwritten(output: StoragePath, shards: int) -> np.ndarray:
    """The numbers of the shards whose two files are not both there."""
    todo = np.ones(shards, bool)
    finished = set((output / DATA).names()) & set((output / REJECTS).names())
    numbers = [int(name.partition(".")[0]) for name in finished if name.partition(".")[0].isdigit()]
    todo[[number for number in numbers if number < shards]] = False
    return np.flatnonzero(todo)


def read_totals(output: StoragePath, numbers: Iterable[int], tell: Callable[[int], None] | None = None) -> Totals:
    """The counts of shards that are already written, from their files' footers.

    Raises:
        AlitError: a file is damaged.
    """
    totals = Totals()

    def counts(number: int) -> Counts | None:
        try:
            return written_counts(output, number)
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise AlitError(
                f"shard {number} of {output.path!r} is damaged ({error}); remove its files from {DATA} and {REJECTS}, "
                f"and give the same command again"
            ) from error

    done = 0
    with ThreadPoolExecutor(READERS) as pool:
        for some in batched(numbers):
            for found in pool.map(counts, some):
                assert found is not None
                totals.add(found)
                done += 1
            if tell is not None:
                tell(done)
    return totals


def batched(numbers: Iterable[int], size: int = 4096) -> Iterator[list[int]]:
    """Some at a time, as an executor takes all that it is given at once."""
    numbers = iter(numbers)
    while some := list(islice(numbers, size)):
        yield some


def finish(output: StoragePath, metadata: Metadata, plan: StoredPlan, totals: Totals) -> None:
    """Writes the dataset's card and, last, the manifest that says it is complete."""
    told = asdict(metadata)
    manifest = {
        "format": told["format"],
        "metadata": told,
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
