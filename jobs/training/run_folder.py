"""The folder of a training run, on any storage: log, TensorBoard, image grids, checkpoints, weights.

    RUN/run.json               the resolved settings
    RUN/log.jsonl              measurements, one line each
    RUN/rejects.jsonl          images that could not be decoded
    RUN/tensorboard/           the same measurements, and the image grids
    RUN/pictures/              an image grid for every validation
    RUN/checkpoints/           the latest ones and the best
    RUN/weights/               the averaged weights, at the end

Only the first worker writes; all workers take part in sums over workers.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alit import __version__
from alit.errors import TrainingError
from alit.images.encode import encode_image
from alit.training import distributed
from alit.training.cost import peak_flops
from alit.training.recipes import Recipe, Stage
from alit.training.trainer import Trainer, TrainingBatch
from alit.weights import save_weights
from jobs.storage.path import StoragePath
from jobs.training.checkpoints import Checkpoints
from jobs.training.events import Activity, CheckpointSaved, Message, OnEvent, StepLog, ValidationLog
from jobs.training.validation import validate

SETTINGS, LOG, REJECTS, WEIGHTS = "run.json", "log.jsonl", "rejects.jsonl", "weights"

MAX_REPORTED_REJECTS = 5
"""Rejects that a worker reports; all are in the run's list."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """The resolved settings of a run; picklable, and written into its folder.

    Attributes:
        stage: The training stage.
        recipe: Its hyperparameters.
        preset: The preset of the model and the recipe.
        data: The training input, as given.
        validation: The validation input, as given.
        init: The weights folder to start from, as given.
        init_fingerprint: The fingerprint of these weights.
        criterion: The default criterion of the exported weights; None for the model's own.
        half: Whether weights are exported in float16.
        photographs: Number of training images.
    """

    stage: Stage
    recipe: Recipe
    preset: str
    data: str
    validation: str | None
    init: str | None
    init_fingerprint: str | None
    criterion: str | None
    half: bool
    photographs: int

    def provenance(self) -> dict[str, Any]:
        """Returns the settings as JSON, with the version of the software."""
        return dataclasses.asdict(self) | {"software": f"alit {__version__}"}


class RunFolder:
    """One worker's view of a run; implements `alit.training.loop.TrainingCallbacks`.

    Args:
        folder: The run folder.
        settings: The settings of the run.
        validation_images: The images to validate on, uint8 [B, 3, S, S]; None for no validation.
        flops: Floating-point operations per image, for the model FLOPs utilization.
        on_event: Receives the run's events.
        preempted: Returns whether this machine is about to be taken away; all workers call it together.
    """

    def __init__(
        self,
        folder: StoragePath,
        settings: RunSettings,
        *,
        validation_images: Tensor | None,
        flops: float = 0.0,
        on_event: OnEvent,
        preempted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self.settings, self.validation_images, self.flops = folder, settings, validation_images, flops
        self.on_event, self.preempted = on_event, preempted
        self.first = distributed.rank() == 0
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=settings.recipe.keep, report=self._report)
        self.rows: list[dict[str, Any]] = []
        self.board: Any = None
        self.board_files = Path()
        self.rejects: dict[str, dict[str, str]] = {}

    def _report(self, text: str) -> None:
        if self.first:
            self.on_event(Message(text=text))

    # ---------------------------------------------------------------- beginning and end

    def resume(self, trainer: Trainer) -> None:
        """Resumes from the newest intact checkpoint, if there is one; every worker must call it.

        Args:
            trainer: Receives the state of the checkpoint.

        Raises:
            StorageError: The folder cannot be read or written.
            TrainingError: No checkpoint is intact, or the checkpoint is of another model, recipe or data.
        """
        state = self.checkpoints.load_latest()
        if state is not None:
            if (count := state["photographs"]) != self.settings.photographs:
                raise TrainingError(
                    f"the checkpoint was trained on {count} images, and now there are {self.settings.photographs}; "
                    "use the same data, or name another run folder"
                )
            trainer.load_state_dict(state)
            self._report(f"resuming at step {trainer.step}")
        steps = distributed.gathered_objects(trainer.step)
        if len(set(steps)) > 1:
            raise TrainingError(
                f"workers found different checkpoints, of steps {steps}; the run folder must be on storage that all "
                "workers share"
            )
        if not self.first:
            return
        self.rows = [row for row in self._read_lines(LOG) if row["step"] <= trainer.step]
        self.rejects = {row["id"]: row for row in self._read_lines(REJECTS)}
        (self.folder / SETTINGS).write(json.dumps(self.settings.provenance(), indent=1).encode() + b"\n")
        self._write_lines(LOG, self.rows)
        self._open_board(trainer.step)

    def finish(self, trainer: Trainer) -> None:
        """Exports the averaged weights; every worker must call it."""
        model = trainer.averaged_model()
        if not self.first:
            return
        if self.settings.criterion is not None:
            model.config = dataclasses.replace(model.config, criterion=self.settings.criterion)
        dtype = torch.float16 if self.settings.half else torch.float32
        with tempfile.TemporaryDirectory() as temporary:
            exported = Path(self.folder.path) / WEIGHTS if self.folder.local else Path(temporary) / WEIGHTS
            save_weights(exported, model, provenance=self.settings.provenance(), dtype=dtype)
            if not self.folder.local:
                for file in sorted(exported.iterdir()):  # config.json first, the tensors last
                    (self.folder / WEIGHTS / file.name).write(file.read_bytes())
        self._save_board()
        self._report(f"weights: {(self.folder / WEIGHTS).path}")

    # ---------------------------------------------------------------- callbacks of the training loop

    def log(self, trainer: Trainer, recent: Sequence[dict[str, Tensor]], seconds: float, waited: float) -> None:
        """Logs the means over the steps since the last call and over all workers; see `TrainingCallbacks.log`."""
        names = sorted({name for scalars in recent for name in scalars})
        means = [torch.stack([scalars[name].float() for scalars in recent if name in scalars]).mean() for name in names]
        values = distributed.averaged(torch.stack(means)).tolist()
        waiting = float(distributed.averaged(torch.tensor(waited / seconds, device=trainer.device)))
        images_per_second = len(recent) * self.settings.recipe.batch_size / seconds
        peak = peak_flops(trainer.device)
        if self.first:
            self._add(
                StepLog(
                    step=trainer.step,
                    total_steps=self.settings.recipe.steps,
                    scalars=dict(zip(names, values, strict=True)),
                    images_per_second=images_per_second,
                    waiting=waiting,
                    learning_rate=trainer.optimizers["model"].param_groups[0]["lr"],
                    mfu=None if peak is None else self.flops * images_per_second / (peak * distributed.workers()),
                )
            )
        if self.preempted():
            self._report("this machine is about to be taken away: saving a checkpoint")
            self.checkpoint(trainer, None)

    def validate(self, trainer: Trainer) -> float | None:
        """Validates the averaged model, logs the result and returns its score; see `TrainingCallbacks.validate`."""
        if self.validation_images is None:
            return None
        self.on_event(Activity(name="validating"))
        result = validate(self.settings.stage, trainer.averaged_model(), self.validation_images)
        if self.first:
            log = ValidationLog(
                step=trainer.step,
                total_steps=self.settings.recipe.steps,
                scalars=result.scalars,
                chosen_lengths=result.chosen_lengths,
            )
            self._add(log, result.grid)
        return result.score

    def checkpoint(self, trainer: Trainer, score: float | None) -> None:
        """Saves the log, the rejects and a checkpoint; see `TrainingCallbacks.checkpoint`."""
        state = trainer.state_dict() | {"photographs": self.settings.photographs}
        for rejects in distributed.gathered_objects(self.rejects):
            self.rejects |= rejects
        if self.first:
            self.on_event(Activity(name="saving"))
            self._write_lines(LOG, self.rows)
            if self.rejects:
                self._write_lines(REJECTS, list(self.rejects.values()))
            self._save_board()
            self.checkpoints.save(state, trainer.step, score)
            self.on_event(CheckpointSaved(step=trainer.step))

    def without_rejects(self, batches: Iterable[TrainingBatch]) -> Iterator[TrainingBatch]:
        """Yields the batches, and records which of their images could not be decoded."""
        for batch in batches:
            for name, reason, message in batch.rejects:
                if name not in self.rejects:
                    self.rejects[name] = {"id": name, "reason": reason, "message": message}
                    if len(self.rejects) <= MAX_REPORTED_REJECTS:
                        text = f"an image cannot be decoded and is replaced by another one: {name}: {message}"
                        self.on_event(Message(text=text))
            yield batch

    # ---------------------------------------------------------------- the log and the board

    def _add(self, event: StepLog | ValidationLog, grid: np.ndarray | None = None) -> None:
        """Writes one line of the log, with its image grid, and reports it."""
        row = event.row()
        self.rows.append(row)
        if self.folder.local:
            with open((self.folder / LOG).path, "a") as file:
                file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, event.step)
        if grid is not None:
            (self.folder / "pictures" / f"step-{event.step:08d}.png").write(encode_image(grid))
            self.board.add_image("photographs, then every length", grid, event.step, dataformats="HWC")
        if isinstance(event, ValidationLog) and event.chosen_lengths is not None:
            chosen = np.repeat(np.arange(len(event.chosen_lengths)) + 1, event.chosen_lengths)
            self.board.add_histogram("chosen length, in iterations", chosen, event.step)
        self.on_event(event)

    def _read_lines(self, name: str) -> list[dict[str, Any]]:
        """Returns the lines of a file, without a last line that was cut short when its writer was killed."""
        file = self.folder / name
        lines = file.read().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def _write_lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / name).write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def _open_board(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        if self.folder.local:
            self.board_files = Path((self.folder / "tensorboard").path)
        else:
            self._temporary = tempfile.TemporaryDirectory()
            self.board_files = Path(self._temporary.name)
        self.board = SummaryWriter(str(self.board_files), purge_step=step + 1 if step else None)

    def _save_board(self) -> None:
        self.board.flush()
        if not self.folder.local:
            for file in self.board_files.iterdir():
                (self.folder / "tensorboard" / file.name).write(file.read_bytes())
