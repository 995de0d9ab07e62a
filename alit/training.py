"""The training loop without Ray: one process, resumable, from any source of batches."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alit.errors import ConfigError, TrainingError
from alit.objectives import Objective, no_decay
from alit.tokenizer import Alit

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a stage is trained.

    Attributes:
        steps: optimizer steps in all; the learning rate ends at 0 there.
        batch_size: images per step.
        learning_rate: its peak, after `warmup` steps and before the cosine.
        weight_decay: on matrices only.
        clip: largest gradient norm.
        ema: decay of the averaged weights.
        bf16: compute in bfloat16 where that is safe.
        seed: of the initial weights, the data's order and its crops.
        log_every, validate_every: in steps.
        checkpoint_seconds: time between checkpoints.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    bf16: bool = True
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    checkpoint_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup", "log_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warmup, then a cosine to 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


class Trainer:
    """Model, averaged model, optimizer and position: all that a checkpoint holds."""

    def __init__(self, model: Alit, objective: Objective, config: TrainConfig) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.step = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        named = objective.trainable(model)
        trained = {id(p) for _, p in named}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.parameters = [p for _, p in named]
        groups = [
            {"params": [p for n, p in named if not no_decay(n, p)], "weight_decay": config.weight_decay},
            {"params": [p for n, p in named if no_decay(n, p)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)

    def train_step(self, images_u8: Tensor) -> dict[str, float]:
        """One optimizer step on uint8 images [B, 3, H, W].

        Raises:
            TrainingError: the loss or its gradient is not finite; nothing was updated.
        """
        images = images_u8.to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.bf16):
            losses = self.objective.losses(self.model, images, self.step, self.generator)
        if not torch.isfinite(losses.total):
            raise TrainingError(f"the loss at step {self.step} is {losses.total.item()}; nothing was updated")
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        if not torch.isfinite(norm):
            raise TrainingError(f"the gradient at step {self.step} is not finite; nothing was updated")
        self.optimizer.step()
        self.objective.after_step(self.step, self.generator)
        self._average()
        self.step += 1
        return {"loss": losses.total.item(), "grad_norm": norm.item()} | {k: v.item() for k, v in losses.parts.items()}

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        averaged = dict(self.ema.named_parameters())
        pairs = [(averaged[n], p) for n, p in self.model.named_parameters() if p.requires_grad]
        for average, parameter in pairs:
            average.lerp_(parameter, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "model_config": self.model.config.to_json(),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = self.model.config.to_json()
        for name, value in state["model_config"].items():
            if json.dumps(mine.get(name)) != json.dumps(value):
                raise TrainingError(f"the checkpoint has {name}={value!r}, this run asks for {mine.get(name)!r}")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def save(self, folder: Path) -> None:
        """Writes the checkpoint, whole or not at all."""
        temporary = folder / f".{CHECKPOINT}.{os.getpid()}"
        torch.save(self.state_dict(), temporary)
        temporary.replace(folder / CHECKPOINT)

    def resume(self, folder: Path) -> bool:
        """Continues from the folder's checkpoint, if it has one."""
        path = folder / CHECKPOINT
        if not path.exists():
            return False
        self.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        return True


def train(
    trainer: Trainer,
    batches: Callable[[int], Iterator[Tensor]],
    folder: Path,
    *,
    validate: Callable[[Alit], dict[str, float]],
    report: Callable[[str], None] = print,
) -> None:
    """Trains to the end of the schedule, from the folder's checkpoint where there is one.

    Args:
        trainer: holds all state.
        batches: batches of uint8 images from a given step on.
        folder: receives `checkpoint.pt` and `log.jsonl`.
        validate: numbers to log of the averaged model.
        report: takes a line of progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.resume(folder):
        report(f"resuming at step {trainer.step}")
    config, started, saved, first = trainer.config, time.monotonic(), time.monotonic(), trainer.step
    with (folder / LOG).open("a") as log:
        for images in batches(trainer.step):
            if trainer.step >= config.steps:
                break
            numbers = trainer.train_step(images)
            step = trainer.step
            validated = step % config.validate_every == 0 or step == config.steps
            if validated:
                numbers |= validate(trainer.ema)
            if validated or step % config.log_every == 0:
                rate = (step - first) * config.batch_size / (time.monotonic() - started)
                left = (config.steps - step) * config.batch_size / rate / 60
                row = {"step": step, "images_per_second": round(rate, 2)} | numbers
                log.write(json.dumps(row) + "\n")
                log.flush()
                values = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
                report(f"step {step}/{config.steps}  {values}  {left:.0f} min left")
            if time.monotonic() - saved > config.checkpoint_seconds or step == config.steps:
                trainer.save(folder)
                saved = time.monotonic()
