"""`alit verify`: checks a token dataset against its plan and its manifest, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from rich.console import Console

from alit.dataset import DATA, MANIFEST, METADATA_KEY, REJECTS, Metadata, reject_schema, token_schema
from alit.encoding.criteria import criterion_name
from alit.errors import AlitError
from jobs.dataset.counts import SHARD_KEY, Counts, file_name
from jobs.dataset.folder import JOB, Totals, batched, read_json
from jobs.dataset.plan import StoredPlan, plan_of_record
from jobs.dataset.unique_ids import IdFile, check_ids
from jobs.runtime.process import local_cpus
from jobs.runtime.progress import job_bar
from jobs.storage.path import StoragePath, parse_uri
from jobs.storage.retry import as_os_error, reason

pc: Any = pyarrow.compute  # its functions are created on import, out of sight of type checkers

MAX_SHOWN = 50
"""Problems that are printed; further ones are only counted."""

_METADATA_FIELDS = tuple(Metadata.__dataclass_fields__)


class Problems:
    """Prints the first problems and counts all of them."""

    def __init__(self, console: Console) -> None:
        self.console, self.count = console, 0

    def add(self, problem: str) -> None:
        """Counts a problem, and prints it unless there were too many before."""
        self.count += 1
        if self.count <= MAX_SHOWN:
            self.console.print(f"[red]✗[/] {problem}", highlight=False, soft_wrap=True)


def verify(dataset: str, console: Console) -> bool:
    """Prints the problems of a dataset.

    Args:
        dataset: The dataset's folder, a local path or a URI.
        console: Where they are printed.

    Returns:
        True if there are none.

    Raises:
        AlitError: The folder is not a token dataset, or its plan cannot be read.
    """
    folder = parse_uri(dataset)
    record, manifest = read_json(folder / JOB), read_json(folder / MANIFEST)
    if record is None:
        raise AlitError(f"{dataset!r} has no {JOB}: it is not a token dataset made by `alit tokenize`")
    if missing := [name for name in (*_METADATA_FIELDS, "plan", "keep", "rows_per_file") if name not in record]:
        raise AlitError(
            f"{dataset!r} cannot be checked: its {JOB} is damaged or of an older version, without {missing[0]}"
        )
    plan = plan_of_record(folder, record)
    metadata = Metadata.from_bytes(json.dumps({n: record[n] for n in _METADATA_FIELDS}).encode(), f"{dataset!r}")
    problems = Problems(console)
    if manifest is None:
        problems.add(f"it is not complete: there is no {MANIFEST}; run the command that started it again to resume")
    elif manifest.get("metadata") != json.loads(metadata.to_bytes()):
        problems.add(f"{MANIFEST} and {JOB} disagree on what determines the tokens")
    for problem in _unplanned_files(folder, plan.shards):
        problems.add(problem)
    totals = _check_shards(folder, plan, metadata, problems)
    if not problems.count and (plan.source.kind == "tar" or plan.source.id_column):
        parts = [(name, n) for n in range(plan.shards) for name in (DATA, REJECTS)]
        files = [IdFile(folder / name, file_name(n).encode(), "id") for name, n in parts]
        if repeated := check_ids(files, totals.images + totals.rejects).repeated:
            problems.add(f"{repeated} ids occur more than once")
    if manifest is not None:
        for name, value in (("images", totals.images), ("rejects", totals.rejects), ("files", plan.shards)):
            if manifest.get(name) != value:
                problems.add(f"{MANIFEST} says {manifest.get(name)} {name}, the files hold {value}")
    if problems.count > MAX_SHOWN:
        console.print(f"and {problems.count - MAX_SHOWN} more")
    console.print(
        f"{plan.shards} shards, {totals.images} images and {totals.rejects} rejects: "
        + (f"{problems.count} problem(s)" if problems.count else "every planned image once, all files whole")
    )
    return not problems.count


def _unplanned_files(folder: StoragePath, shards: int) -> Iterator[str]:
    planned = {file_name(number) for number in range(shards)}
    for name in (DATA, REJECTS):
        if unplanned := sorted(set((folder / name).names()) - planned):
            yield f"{name} holds {len(unplanned)} files that are not planned, such as {unplanned[0]!r}"


def _check_shards(folder: StoragePath, plan: StoredPlan, metadata: Metadata, problems: Problems) -> Totals:
    totals = Totals()

    def check(numbers: Iterable[int]) -> Iterator[tuple[Counts | None, list[str]]]:
        return pool.map(lambda number: _check(folder, plan, metadata, number), numbers)

    with ThreadPoolExecutor(local_cpus()) as pool, job_bar(problems.console) as bar:
        task = bar.add_task("verifying", total=plan.shards, rate="shards")
        for group in batched(range(plan.shards), 256):
            for counts, faults in check(group):
                for problem in faults:
                    problems.add(problem)
                if counts is not None:
                    totals.add(counts)
                bar.advance(task)
    return totals


def _check(folder: StoragePath, plan: StoredPlan, metadata: Metadata, number: int) -> tuple[Counts | None, list[str]]:
    name, tables, problems = file_name(number), {}, []
    expected = {
        DATA: token_schema(metadata, plan.source.kept),
        REJECTS: reject_schema(metadata, plan.source.kept),
    }
    for part, schema in expected.items():
        try:
            tables[part] = _read_table(folder / part / name)
        except FileNotFoundError:
            problems.append(f"{part}/{name} is missing")
            continue
        except (OSError, pa.ArrowException) as error:
            problems.append(f"{part}/{name} is damaged: {reason(error)}")
            continue
        actual = tables[part].schema
        if not actual.equals(schema):
            problems.append(f"{part}/{name} has another schema: {_difference(actual, schema)}")
        if (actual.metadata or {}).get(METADATA_KEY) != metadata.to_bytes():
            problems.append(f"{part}/{name} carries other metadata than the job")
    if problems:
        return None, problems
    tokens, rejects = tables[DATA], tables[REJECTS]
    counts = _counts(tokens, rejects, metadata, number)
    stored = (tokens.schema.metadata or {}).get(SHARD_KEY)
    if stored != counts.to_metadata()[SHARD_KEY]:
        problems.append(f"{DATA}/{name} carries counts that do not match its rows")
    problems += [f"{DATA}/{name}: {problem}" for problem in _wrong_tokens(tokens, metadata)]
    problems += [f"shard {number}: {problem}" for problem in _wrong_ids(tokens, rejects, plan, number)]
    return counts, problems


def _read_table(path: StoragePath) -> pa.Table:
    with as_os_error():
        source = pa.OSFile(path.path) if path.local else pa.BufferReader(path.read())
        return pq.ParquetFile(source, page_checksum_verification=True).read()


def _difference(actual: pa.Schema, expected: pa.Schema) -> str:
    have, want = ({f"{field.name} ({field.type})" for field in schema} for schema in (actual, expected))
    parts = [f"without {', '.join(sorted(want - have))}"] if want - have else []
    parts += [f"with {', '.join(sorted(have - want))}"] if have - want else []
    return " and ".join(parts) or "order or nullability"


def _counts(tokens: pa.Table, rejects: pa.Table, metadata: Metadata, number: int) -> Counts:
    iterations = np.minimum(
        tokens.column("num_tokens").to_numpy() // metadata.latents_per_iteration, metadata.iterations
    )
    lengths = np.bincount(iterations, minlength=metadata.iterations + 1)[1:].tolist()
    satisfied = int(pc.sum(tokens.column("satisfied")).as_py() or 0)
    return Counts(number, len(tokens), len(rejects), lengths, satisfied, 0.0, True)


def _wrong_tokens(tokens: pa.Table, metadata: Metadata) -> Iterator[str]:
    lengths = pc.list_value_length(tokens.column("tokens"))
    if not lengths.combine_chunks().cast(pa.uint16()).equals(tokens.column("num_tokens").combine_chunks()):
        yield "num_tokens is not the number of tokens"
    allowed = [metadata.latents_per_iteration * (k + 1) for k in range(metadata.iterations)]
    if invalid := set(lengths.unique().to_pylist()).difference(allowed):
        yield f"{min(invalid)} tokens, which is not a length of the model"
    largest = pc.max(pc.list_flatten(tokens.column("tokens"))).as_py()
    if largest is not None and largest >= metadata.codebook_size:
        yield f"token id {largest} is out of range for a codebook of {metadata.codebook_size} codes"
    tried = pc.list_value_length(tokens.column("trace"))
    fixed = criterion_name(metadata.criterion) == "fixed"
    expected = pa.array(np.zeros(len(tokens)) if fixed else lengths.to_numpy() // metadata.latents_per_iteration)
    if not tried.combine_chunks().cast(pa.int64()).equals(expected.cast(pa.int64())):
        yield "a trace does not have one value for every length that was tried"


def _wrong_ids(tokens: pa.Table, rejects: pa.Table, plan: StoredPlan, number: int) -> Iterator[str]:
    ids = pa.concat_arrays([*tokens.column("id").chunks, *rejects.column("id").chunks] or [pa.array([], pa.string())])
    planned = plan.ids(number)
    if planned is None:
        rows = plan.shard(number).rows
        if rows and rows != len(ids):
            yield f"{len(ids)} images instead of the {rows} that are planned"
        if len(ids.unique()) != len(ids):
            yield "an image occurs more than once"
        return
    if sorted(ids.to_pylist()) == sorted(planned):
        return
    have, want = set(ids.to_pylist()), set(planned)
    if missing := want - have:
        yield f"{len(missing)} planned images are missing, such as {min(missing)!r}"
    if unplanned := have - want:
        yield f"{len(unplanned)} images are not planned, such as {min(unplanned)!r}"
    if len(have) != len(ids):
        yield f"{len(ids) - len(have)} images occur more than once"
