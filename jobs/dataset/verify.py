"""`alit verify`: whether a token dataset is what its plan and its manifest say, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from jobs.dataset.unique_ids import repeated_ids
from jobs.runtime.process import local_cpus
from jobs.runtime.progress import job_bar
from jobs.storage.path import StoragePath, parse_uri
from jobs.storage.retry import as_os_error, reason

pc: Any = pyarrow.compute  # whose functions are made on import, unseen by type checkers

SHOWN = 50
"""Problems that are printed."""


def verify(dataset: str, console: Console) -> bool:
    """Prints what is wrong with a dataset; whether all is well.

    Raises:
        AlitError: the folder is no token dataset, or its plan cannot be read.
    """
    folder = parse_uri(dataset)
    record, manifest = read_json(folder / JOB), read_json(folder / MANIFEST)
    if record is None:
        raise AlitError(f"{dataset!r} has no {JOB}: it is no token dataset that `alit tokenize` made")
    if missing := [name for name in (*_METADATA, "plan", "keep", "rows_per_file") if name not in record]:
        raise AlitError(
            f"{dataset!r} cannot be checked: its {JOB} is damaged or of an older version, without {missing[0]}"
        )
    plan = plan_of_record(folder, record)
    metadata = Metadata.from_bytes(json.dumps({n: record[n] for n in _METADATA}).encode(), f"{dataset!r}")
    totals, shown = Totals(), 0

    def tell(problem: str) -> None:
        nonlocal shown
        shown += 1
        if shown <= SHOWN:
            console.print(f"[red]✗[/] {problem}", highlight=False, soft_wrap=True)

    if manifest is None:
        tell(f"it is not complete: there is no {MANIFEST}; the command that began it goes on")
    elif manifest.get("metadata") != json.loads(metadata.to_bytes()):
        tell(f"{MANIFEST} and {JOB} disagree on what determines the tokens")
    for name in (DATA, REJECTS):
        strange = sorted(set((folder / name).names()) - {file_name(number) for number in range(plan.shards)})
        if strange:
            tell(f"{name} holds {len(strange)} files that are not planned, such as {strange[0]!r}")
    with ThreadPoolExecutor(local_cpus()) as pool, job_bar(console) as bar:
        task = bar.add_task("verifying", total=plan.shards, rate="shards")
        for some in batched(range(plan.shards), 256):
            for counts, problems in pool.map(lambda n: _check(folder, plan, metadata, n), some):
                for problem in problems:
                    tell(problem)
                if counts is not None:
                    totals.add(counts)
                bar.advance(task)
    if not shown and (plan.source.kind == "tar" or plan.source.id_column):
        files = [(folder / name, file_name(n).encode(), "id") for n in range(plan.shards) for name in (DATA, REJECTS)]
        if repeated := repeated_ids(files, totals.images + totals.rejects)[1]:
            tell(f"{repeated} ids are there more than once")
    if manifest is not None:
        for name, value in (("images", totals.images), ("rejects", totals.rejects), ("files", plan.shards)):
            if manifest.get(name) != value:
                tell(f"{MANIFEST} says {manifest.get(name)} {name}, the files hold {value}")
    if shown > SHOWN:
        console.print(f"and {shown - SHOWN} more")
    console.print(
        f"{plan.shards} shards, {totals.images} images and {totals.rejects} rejects: "
        + (f"{shown} problem(s)" if shown else "every planned image once, all files whole")
    )
    return not shown


_METADATA = tuple(field for field in Metadata.__dataclass_fields__)


def _check(folder: StoragePath, plan: StoredPlan, metadata: Metadata, number: int) -> tuple[Counts | None, list[str]]:
    name, tables, problems = file_name(number), {}, []
    expected = {
        DATA: token_schema(metadata, plan.source.kept),
        REJECTS: reject_schema(metadata, plan.source.kept),
    }
    for part, schema in expected.items():
        try:
            tables[part] = _table(folder / part / name)
        except FileNotFoundError:
            problems.append(f"{part}/{name} is missing")
            continue
        except (OSError, pa.ArrowException) as error:
            problems.append(f"{part}/{name} is damaged: {reason(error)}")
            continue
        found = tables[part].schema
        if not found.equals(schema):
            problems.append(f"{part}/{name} has another schema: {_difference(found, schema)}")
        if (found.metadata or {}).get(METADATA_KEY) != metadata.to_bytes():
            problems.append(f"{part}/{name} carries other metadata than the job")
    if problems:
        return None, problems
    tokens, rejects = tables[DATA], tables[REJECTS]
    counts = _counts(tokens, rejects, metadata, number)
    told = (tokens.schema.metadata or {}).get(SHARD_KEY)
    if told != counts.to_metadata()[SHARD_KEY]:
        problems.append(f"{DATA}/{name} carries counts that are not its own")
    problems += [f"{DATA}/{name}: {problem}" for problem in _wrong_tokens(tokens, metadata)]
    problems += [f"shard {number}: {problem}" for problem in _wrong_ids(tokens, rejects, plan, number)]
    return counts, problems


def _table(where: StoragePath) -> pa.Table:
    with as_os_error():
        source = pa.OSFile(where.path) if where.local else pa.BufferReader(where.read())
        return pq.ParquetFile(source, page_checksum_verification=True).read()


def _difference(found: pa.Schema, schema: pa.Schema) -> str:
    have, want = ({f"{field.name} ({field.type})" for field in s} for s in (found, schema))
    parts = [f"without {', '.join(sorted(want - have))}"] if want - have else []
    parts += [f"with {', '.join(sorted(have - want))}"] if have - want else []
    return " and ".join(parts) or "order or nullability"


def _counts(tokens: pa.Table, rejects: pa.Table, metadata: Metadata, number: int) -> Counts:
    rounds = np.minimum(tokens.column("num_tokens").to_numpy() // metadata.latents_per_iteration, metadata.iterations)
    lengths = np.bincount(rounds, minlength=metadata.iterations + 1)[1:].tolist()
    satisfied = int(pc.sum(tokens.column("satisfied")).as_py() or 0)
    return Counts(number, len(tokens), len(rejects), lengths, satisfied, 0.0, True)


def _wrong_tokens(tokens: pa.Table, metadata: Metadata) -> Iterator[str]:
    lengths = pc.list_value_length(tokens.column("tokens"))
    if not lengths.combine_chunks().cast(pa.uint16()).equals(tokens.column("num_tokens").combine_chunks()):
        yield "num_tokens is not the number of tokens"
    allowed = [metadata.latents_per_iteration * (k + 1) for k in range(metadata.iterations)]
    if strange := set(lengths.unique().to_pylist()).difference(allowed):
        yield f"{min(strange)} tokens, which is no length of the model"
    largest = pc.max(pc.list_flatten(tokens.column("tokens"))).as_py()
    if largest is not None and largest >= metadata.codebook_size:
        yield f"the id {largest}, where the codebook has {metadata.codebook_size}"
    tried = pc.list_value_length(tokens.column("trace"))
    fixed = criterion_name(metadata.criterion) == "fixed"
    expected = pa.array(np.zeros(len(tokens)) if fixed else lengths.to_numpy() // metadata.latents_per_iteration)
    if not tried.combine_chunks().cast(pa.int64()).equals(expected.cast(pa.int64())):
        yield "a trace does not have the value of every length that was tried"


def _wrong_ids(tokens: pa.Table, rejects: pa.Table, plan: StoredPlan, number: int) -> Iterator[str]:
    found = pa.concat_arrays([*tokens.column("id").chunks, *rejects.column("id").chunks] or [pa.array([], pa.string())])
    planned = plan.ids(number)
    if planned is None:
        rows = plan.shard(number).rows
        if rows and rows != len(found):
            yield f"{len(found)} images in place of the {rows} that are planned"
        if len(found.unique()) != len(found):
            yield "an image is there more than once"
        return
    if sorted(found.to_pylist()) == sorted(planned):
        return
    have, want = set(found.to_pylist()), set(planned)
    if missing := want - have:
        yield f"{len(missing)} planned images are missing, such as {min(missing)!r}"
    if strange := have - want:
        yield f"{len(strange)} images are not planned, such as {min(strange)!r}"
    if len(have) != len(found):
        yield f"{len(found) - len(have)} images are there more than once"
