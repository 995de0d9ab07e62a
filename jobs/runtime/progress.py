"""Progress of a job on the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

HOUR = 3600.0


def job_bar(console: Console) -> bars.Progress:
    """Returns the progress bar of a job over images; its tasks have a text field `rate`."""
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
    """Shows a growing count while the context is open; yields the function that updates it."""
    with console.status(f"{activity} …") as status:
        yield lambda count: status.update(f"{activity}: {count:,} {unit}")


def format_duration(seconds: float) -> str:
    """Formats a duration in the unit that suits its size: seconds, minutes, hours or days."""
    if seconds < 120:
        return f"{max(1, seconds):.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 72 * HOUR else f"{seconds / (24 * HOUR):.1f} days"
