"""Progress of a training run on the console."""

from __future__ import annotations

from types import TracebackType

from rich import progress as bars
from rich.console import Console

from jobs.training.events import Activity, Event, Message, StepLog, ValidationLog


class TrainingProgress:
    """Displays the events of a `RunFolder`: a progress bar on a terminal, lines elsewhere.

    Args:
        console: The console to print to.
    """

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

    def on_event(self, event: Event) -> None:
        """Displays one event."""
        match event:
            case Message(text=text):
                self._print(text)
            case Activity(name=name):
                self.bar.update(self.task, description=name)
            case StepLog():
                self._advance(event)
                self._show_steps(event)
            case ValidationLog():
                self._advance(event)
                self._show_validation(event)

    def _advance(self, event: StepLog | ValidationLog) -> None:
        self.bar.update(self.task, description="training", total=event.total_steps, completed=event.step)

    def _show_steps(self, event: StepLog) -> None:
        row = event.row()
        text = f"loss {row['loss']:.4g}  {row['images_per_second']:.1f} images/s  "
        text += f"{row['waiting']:.1%} waiting for data"
        text += f"  {row['mfu']:.1%} MFU" if "mfu" in row else ""
        self.bar.update(self.task, numbers=text)
        if not self.console.is_terminal:
            self._print(f"step {event.step}/{event.total_steps}  {text}")

    def _show_validation(self, event: ValidationLog) -> None:
        row = event.row()
        l1 = "  ".join(f"{name[7:]} {value:.4f}" for name, value in row.items() if name.startswith("val_l1_"))
        perplexity = f"  perplexity {row['perplexity']:.0f}" if "perplexity" in row else ""
        lengths = f"  chosen {event.chosen_lengths}" if event.chosen_lengths is not None else ""
        self._print(f"step {event.step}: validation L1  {l1}{perplexity}{lengths}")

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
