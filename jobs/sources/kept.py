"""Columns of the input that are carried through to the output."""

from __future__ import annotations

import io
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from alit.dataset import kept_name
from jobs.sources.records import InputError


def _output_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type of a kept column: views, which little software reads, become plain text and bytes."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def kept_fields(fields: Iterable[pa.Field]) -> tuple[pa.Field, ...]:
    """Returns the output's fields of kept columns.

    Args:
        fields: The columns' fields in the input.

    Raises:
        InputError: a column has a type that Parquet cannot hold, or two columns get the same name.
    """
    # nullable, as another file's column of the same type may be
    kept = tuple(
        field.with_name(kept_name(field.name)).with_type(_output_type(field.type)).with_nullable(True).remove_metadata()
        for field in fields
    )
    for column in kept:
        try:
            nothing = pa.nulls(0, column.type).filter(pa.array([], pa.bool_()))
            pq.write_table(pa.table([nothing], pa.schema([column])), io.BytesIO())
        except (pa.ArrowException, TypeError) as error:
            raise InputError(f"column {column.name!r} holds {column.type}, which cannot be kept: {error}") from error
    if len({column.name for column in kept}) < len(kept):
        raise InputError(f"--keep names a column twice: in the output they would be {', '.join(f.name for f in kept)}")
    return kept
