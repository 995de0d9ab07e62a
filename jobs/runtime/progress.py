"""Progress of a job on the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console


def job_bar(console: Console) -> bars.Progress:
    """The bar of a job over images; its tasks have a field `rate`, a text."""
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    return bars.Progress(*columns, console=console)


@contextmanager
def counting(console: Console, activity: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows a number that grows; gives the function that tells it."""
    with console.status(f"{activity} …") as status:
        yield lambda count: status.update(f"{activity}: {count:,} {unit}")


HOUR = 3600.0


def duration(seconds: float) -> str:
    """Seconds as a person would say it."""
    if seconds < 120:
        return f"{max(1, seconds):.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"
