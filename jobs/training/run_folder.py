"""The folder of a training run, on any storage: log, TensorBoard, pictures, checkpoints, weights.

    RUN/run.json               what was asked for
    RUN/log.jsonl              numbers, a line each
    RUN/rejects.jsonl          images that could not be decoded
    RUN/tensorboard/           the same numbers, and the pictures
    RUN/pictures/              a grid for every validation
    RUN/checkpoints/           the last ones and the best
    RUN/weights/               the averaged weights, at the end

The first worker alone writes; all take part in what is summed over workers.
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
from jobs.training.validation import Validation, validate

SETTINGS, LOG, REJECTS, WEIGHTS = "run.json", "log.jsonl", "rejects.jsonl", "weights"
SHOWN_REJECTS = 5
Tell = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """What a run was asked for; picklable, and written into its folder.

    Attributes:
        stage: of training.
        recipe: its hyperparameters.
        preset: of model and recipe.
        data, validation: inputs, as given.
        init: the weights folder to start from, as given, and its fingerprint.
        criterion: the default criterion of the weights to be.
        half: whether they are stored in float16.
        photographs: how many images there are to train on.
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
        return dataclasses.asdict(self) | {"software": f"alit {__version__}"}


class RunFolder:
    """One worker's view of a run; implements what `alit.training.train` asks of its `run`.

    Args:
        folder: of the run.
        settings: what was asked for.
        validation_images: images to validate on, uint8 [B, 3, S, S]; None for none.
        flops: floating-point operations per image, for the share of the device's peak that is used.
        tell: takes events for the person who waits.
        preempted: whether this machine is about to be taken away; all workers ask together.
    """

    def __init__(
        self,
        folder: StoragePath,
        settings: RunSettings,
        *,
        validation_images: Tensor | None,
        flops: float = 0.0,
        tell: Tell,
        preempted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self.settings, self.validation_images, self.flops = folder, settings, validation_images, flops
        self.tell, self.preempted = tell, preempted
        self.first = distributed.rank() == 0
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=settings.recipe.keep, report=self._say)
        self.rows: list[dict[str, Any]] = []
        self.board: Any = None
        self.board_files = Path()
        self.rejects: dict[str, dict[str, str]] = {}

    def _say(self, line: str) -> None:
        if self.first:
            self.tell({"line": line})

    # ---------------------------------------------------------------- beginning and end

    def resume(self, trainer: Trainer) -> None:
        """Goes on from the newest checkpoint that is whole, if there is one; every worker must call it."""
        state = self.checkpoints.load_latest()
        if state is not None:
            if (count := state["photographs"]) != self.settings.photographs:
                raise TrainingError(
                    f"the checkpoint was trained on {count} photographs, and now there are "
                    f"{self.settings.photographs}; give the same data, or name another run folder"
                )
            trainer.load_state_dict(state)
            self._say(f"going on at step {trainer.step}")
        steps = distributed.gathered_objects(trainer.step)
        if len(set(steps)) > 1:
            raise TrainingError(
                f"workers found different checkpoints, of steps {steps}: is the storage the same for all?"
            )
        if not self.first:
            return
        self.rows = [row for row in self._read_lines(LOG) if row["step"] <= trainer.step]
        self.rejects = {row["id"]: row for row in self._read_lines(REJECTS)}
        (self.folder / SETTINGS).write(json.dumps(self.settings.provenance(), indent=1).encode() + b"\n")
        self._write_lines(LOG, self.rows)
        self._open_board(trainer.step)

    def finish(self, trainer: Trainer) -> None:
        """Writes the averaged weights; every worker must call it."""
        model = trainer.averaged_model()
        if not self.first:
            return
        if self.settings.criterion is not None:
            model.config = dataclasses.replace(model.config, criterion=self.settings.criterion)
        dtype = torch.float16 if self.settings.half else torch.float32
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(self.folder.path) / WEIGHTS if self.folder.local else Path(temporary) / WEIGHTS
            save_weights(made, model, provenance=self.settings.provenance(), dtype=dtype)
            if not self.folder.local:
                for file in sorted(made.iterdir()):  # config.json first, the tensors last
                    (self.folder / WEIGHTS / file.name).write(file.read_bytes())
        self._save_board()
        self._say(f"weights: {(self.folder / WEIGHTS).path}")

    # ---------------------------------------------------------------- what the loop asks for

    def log(self, trainer: Trainer, recent: Sequence[dict[str, Tensor]], seconds: float, waited: float) -> None:
        """Means over the steps since the last time and over all workers."""
        names = sorted({name for numbers in recent for name in numbers})
        means = [torch.stack([numbers[name].float() for numbers in recent if name in numbers]).mean() for name in names]
        values = distributed.averaged(torch.stack(means)).tolist()
        waiting = float(distributed.averaged(torch.tensor(waited / seconds, device=trainer.device)))
        images = len(recent) * self.settings.recipe.batch_size
        row = {"step": trainer.step} | dict(zip(names, values, strict=True))
        row |= {"images_per_second": images / seconds, "waiting": waiting, "learning_rate": _rate(trainer)}
        peak = peak_flops(trainer.device)
        if peak is not None:
            row["mfu"] = self.flops * images / seconds / (peak * distributed.workers())
        if self.first:
            self._add(row)
        if self.preempted():
            self._say("this machine is about to be taken away: saving a checkpoint")
            self.checkpoint(trainer, None)

    def validate(self, trainer: Trainer) -> float | None:
        if self.validation_images is None:
            return None
        self.tell({"activity": "validating"})
        found = validate(self.settings.stage, trainer.averaged_model(), self.validation_images)
        if self.first:
            self._add({"step": trainer.step} | found.numbers, found)
        return found.score

    def checkpoint(self, trainer: Trainer, score: float | None) -> None:
        state = trainer.state_dict() | {"photographs": self.settings.photographs}
        for rejects in distributed.gathered_objects(self.rejects):
            self.rejects |= rejects
        if self.first:
            self.tell({"activity": "saving"})
            self._write_lines(LOG, self.rows)
            if self.rejects:
                self._write_lines(REJECTS, list(self.rejects.values()))
            self._save_board()
            self.checkpoints.save(state, trainer.step, score)
            self.tell({"saved": trainer.step})

    def without_rejects(self, batches: Iterable[TrainingBatch]) -> Iterator[TrainingBatch]:
        """The batches, having noted which of their images could not be decoded."""
        for batch in batches:
            for name, reason, message in batch.rejects:
                if name not in self.rejects:
                    self.rejects[name] = {"id": name, "reason": reason, "message": message}
                    if len(self.rejects) <= SHOWN_REJECTS:
                        self.tell({"line": f"not decodable, another image takes its place: {name}: {message}"})
            yield batch

    # ---------------------------------------------------------------- the log and the board

    def _add(self, row: dict[str, Any], found: Validation | None = None) -> None:
        row = {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
        self.rows.append(row)
        if self.folder.local:
            with open((self.folder / LOG).path, "a") as file:
                file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, row["step"])
        if found is not None and found.grid is not None:
            picture = encode_image(found.grid)
            (self.folder / "pictures" / f"step-{row['step']:08d}.png").write(picture)
            self.board.add_image("photographs, then every length", found.grid, row["step"], dataformats="HWC")
        if "chosen_lengths" in row:
            chosen = np.repeat(np.arange(len(row["chosen_lengths"])) + 1, row["chosen_lengths"])
            self.board.add_histogram("chosen length, in iterations", chosen, row["step"])
        self.tell({"row": row, "steps": self.settings.recipe.steps})

    def _read_lines(self, name: str) -> list[dict[str, Any]]:
        """Without a last line that was cut short when its writer was killed."""
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


def _rate(trainer: Trainer) -> float:
    return trainer.optimizers["model"].param_groups[0]["lr"]
