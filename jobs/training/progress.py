"""Progress of a training run on the console."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich import progress as bars
from rich.console import Console


class TrainingProgress:
    """Shows the events of a `RunFolder`: `line`, `activity` or `row` with `steps`; others are not for people."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[numbers]}"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
        )
        self.bar = bars.Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("starting", total=None, numbers="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def tell(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        if "line" in event:
            self._print(event["line"])
        if "activity" in event:
            self.bar.update(self.task, description=event["activity"])
        if "row" in event:
            self._row(event["row"], event["steps"])

    def _row(self, row: dict[str, Any], steps: int) -> None:
        step, validated = row["step"], "perplexity" in row or any(name.startswith("val_") for name in row)
        self.bar.update(self.task, description="training", total=steps, completed=step)
        if validated:
            l1 = "  ".join(f"{name[7:]} {value:.4f}" for name, value in row.items() if name.startswith("val_l1_"))
            lengths = f"  chosen {row['chosen_lengths']}" if "chosen_lengths" in row else ""
            perplexity = f"  perplexity {row['perplexity']:.0f}" if "perplexity" in row else ""
            self._print(f"step {step}: validation L1  {l1}{perplexity}{lengths}")
            return
        rate = row["images_per_second"]
        text = f"loss {row['loss']:.4g}  {rate:.1f} images/s  {row['waiting']:.1%} waiting for data"
        text += f"  {row['mfu']:.1%} MFU" if "mfu" in row else ""
        self.bar.update(self.task, numbers=text)
        if not self.console.is_terminal:
            self._print(f"step {step}/{steps}  {text}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
