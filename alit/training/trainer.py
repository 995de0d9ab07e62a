"""The state and the step of a training run, independent of Ray and of storage.

The same code runs in a single process, or as one of several workers of a `torch.distributed` group.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from alit.errors import ConfigError, TrainingError
from alit.model.layers import Block
from alit.model.vqgan import VQGANDecoder, VQGANEncoder
from alit.tokenizer import Alit
from alit.training import distributed
from alit.training.objectives import Losses, Objective, no_decay
from alit.training.recipes import AdversarialRecipe, Recipe

CHANGEABLE_FIELDS = frozenset(
    "steps accumulate compile recompute sharding log_every validate_every checkpoint_every keep".split()
)
"""Fields of a recipe in which a run may differ from the checkpoint that it resumes."""


class TrainingBatch(NamedTuple):
    """One worker's share of a step's images.

    Attributes:
        images: uint8 [B, 3, H, W].
        ids: The ids of the images, for error messages.
        rejects: Id, reason and message of the images of this share that could not be decoded.
    """

    images: Tensor
    ids: Sequence[str] = ()
    rejects: Sequence[tuple[str, str, str]] = ()


class LossModule(nn.Module):
    """Model and objective as one module, whose forward computes the losses: the unit that DDP and FSDP wrap.

    Args:
        model: The model to train.
        objective: The objective of its stage.
    """

    def __init__(self, model: Alit, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.losses = objective.losses

    def forward(self, images: Tensor, step: int, generator: torch.Generator) -> Losses:
        """Computes the losses of float images [B, 3, H, W] in [0, 1]."""
        return self.losses(self.model, images, step, generator)


class Trainer:
    """Model, averaged model, optimizers and step: everything that a checkpoint holds.

    Args:
        model: On the training device, with the same initial values on every worker.
        objective: The objective of the stage.
        recipe: Its hyperparameters.

    Attributes:
        step: The number of steps done.
        generator: The source of all random numbers in training, in the same state on every worker.
        average: The moving averages of the trained parameters, by name.

    Raises:
        ConfigError: The recipe requires several workers, and there is only one.
    """

    def __init__(self, model: Alit, objective: Objective, recipe: Recipe) -> None:
        self.model, self.objective, self.recipe = model, objective, recipe
        self.device = model.encoder.positions.device
        self.step = 0
        self.generator = torch.Generator().manual_seed(recipe.seed)
        trained = {id(parameter) for _, parameter in objective.trainable(model)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self._adapt(model)
        self.loss_module = self._distribute(LossModule(model, objective))
        named = objective.trainable(model)  # again, as sharding replaces parameters
        self.parameters = [parameter for _, parameter in named]
        self.average = {name: parameter.detach().clone() for name, parameter in named}
        groups = [
            {"params": [p for n, p in named if not no_decay(n, p)], "weight_decay": recipe.weight_decay},
            {"params": [p for n, p in named if no_decay(n, p)], "weight_decay": 0.0},
        ]
        self.optimizers = {"model": torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))}
        self.peaks = {"model": recipe.learning_rate}
        if (adversary := objective.adversary) is not None:
            assert isinstance(recipe, AdversarialRecipe)
            adversary.discriminator.to(self.device)
            if distributed.workers() > 1:
                several = recipe.discriminator == "per-length"
                adversary.shared = DistributedDataParallel(adversary.discriminator, find_unused_parameters=several)
            self.peaks["discriminator"] = recipe.gan_learning_rate
            self.optimizers["discriminator"] = torch.optim.AdamW(
                adversary.discriminator.parameters(), lr=recipe.gan_learning_rate, betas=(0.5, 0.9), weight_decay=0.0
            )

    def _adapt(self, model: Alit) -> None:
        if self.recipe.sharding == "ddp":
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (faster convolutions)
        for part in model.modules():
            if isinstance(part, Block):
                part.recompute = self.recipe.recompute
            if self.recipe.compile and isinstance(part, (Block, VQGANEncoder, VQGANDecoder)):
                part.compile()

    def _distribute(self, module: LossModule) -> nn.Module:
        if self.recipe.sharding == "fsdp":
            if not torch.distributed.is_initialized():
                raise ConfigError("sharding=fsdp shards the model over workers; it needs --workers 2 or more")
            for part in module.modules():
                if isinstance(part, Block):
                    fully_shard(part)
            fully_shard(module)
            return module
        if distributed.workers() == 1:
            return module
        # a rollout of depth 1 does not use the recursive norm, and sampled halting may not use the mask token
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    # ---------------------------------------------------------------- a step

    def train_step(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Runs one optimizer step on this worker's share of the images.

        Returns:
            Scalars to log, not yet averaged over workers.

        Raises:
            TrainingError: A loss or its gradient is not finite on some worker; nothing was updated.
        """
        rate = self.recipe.rate(self.step)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[name] * rate
            optimizer.zero_grad(set_to_none=True)
        parts = batch.images.chunk(self.recipe.accumulate)
        total: dict[str, Tensor] = {}
        for number, images_u8 in enumerate(parts):
            images = images_u8.to(self.device, non_blocking=True).to(self.parameters[0].dtype).div_(255)
            images = images.contiguous(memory_format=torch.channels_last)
            self._synchronize_gradients(number == len(parts) - 1)
            for name, value in self._backward(images, batch.ids, len(parts)).items():
                total[name] = total.get(name, 0) + value / len(parts)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        total["grad_norm"] = distributed.whole(norm).detach()
        if not torch.isfinite(total["grad_norm"]):
            raise TrainingError(f"the gradient at step {self.step} is not finite; nothing was updated")
        for name, optimizer in self.optimizers.items():
            if name == "model" or "discriminator" in total:
                optimizer.step()
        self.objective.after_step(self.model, self.step, self.generator)
        self._update_average()
        self.step += 1
        return total

    def _backward(self, images: Tensor, ids: Sequence[str], parts: int) -> dict[str, Tensor]:
        """Accumulates the gradients of one part of the share: the model's, then the discriminator's."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            losses: Losses = self.loss_module(images, self.step, self.generator)
        self._require_finite(losses.total, "loss", ids)
        (losses.total / parts).backward()
        scalars = {"loss": losses.total.detach()} | losses.parts
        if (adversary := self.objective.adversary) is not None and adversary.examples is not None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
                loss = adversary.discriminator_loss()
            self._require_finite(loss, "discriminator's loss", ids)
            (loss / parts).backward()
            scalars["discriminator"] = loss.detach()
        return scalars

    def _synchronize_gradients(self, last: bool) -> None:
        """Makes the next backward pass send gradients to the other workers only for the last part of the share."""
        wrapped = [self.loss_module] + ([self.objective.adversary.shared] if self.objective.adversary else [])
        for module in wrapped:
            if isinstance(module, DistributedDataParallel):
                module.require_backward_grad_sync = last
            elif isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last)

    def _require_finite(self, loss: Tensor, what: str, ids: Sequence[str]) -> None:
        if torch.isfinite(distributed.averaged(loss)):
            return
        own = [] if torch.isfinite(loss) else list(ids)
        names = [name for part in distributed.gathered_objects(own) for name in part]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise TrainingError(
            f"the {what} at step {self.step} is {loss.item() if own else 'not finite on another worker'}; nothing was "
            f"updated. The images were {shown or 'not named'}. A lower --learning-rate, or --no-bf16, may help"
        )

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        for average, parameter in zip(self.average.values(), self.parameters, strict=True):
            average.lerp_(parameter, 1 - decay)

    # ---------------------------------------------------------------- exporting and resuming state

    def averaged_model(self) -> Alit:
        """Returns the model with averaged weights, in eval mode; every worker must call it.

        It shares tensors with this trainer, and is valid until the next step.
        """
        with torch.device("meta"):
            model = Alit(self.model.config)
        tensors: dict[str, Tensor] = dict(self.model.state_dict()) | self.average
        model.load_state_dict({name: distributed.whole(tensor) for name, tensor in tensors.items()}, assign=True)
        model.reset_buffers()
        return model.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Returns the complete state, unsharded and on the CPU; every worker must call it."""
        adversary = self.objective.adversary
        revival = self.objective.revival
        return distributed.on_cpu(
            {
                "step": self.step,
                "stage": type(self.recipe).__name__,
                "recipe": dataclasses.asdict(self.recipe),
                "model_config": self.model.config.to_json(),
                "model": dict(self.model.state_dict()),
                "average": self.average,
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "discriminator": dict(adversary.discriminator.state_dict()) if adversary else {},
                "revival": revival.state_dict() if revival else {},
                "generator": self.generator.get_state(),
            }
        )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from the output of `state_dict`, with any number of workers.

        Raises:
            TrainingError: The state belongs to another stage, model or recipe; the message names the field.
        """
        if state["stage"] != type(self.recipe).__name__:
            raise TrainingError(f"the checkpoint is of a {state['stage']}, this run has a {type(self.recipe).__name__}")
        _require_same("model", state["model_config"], self.model.config.to_json())
        fixed = {k: v for k, v in state["recipe"].items() if k not in CHANGEABLE_FIELDS}
        _require_same("recipe", fixed, dataclasses.asdict(self.recipe))
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(distributed.sharded_like(state["model"][name], tensor))
        for name, tensor in self.average.items():
            tensor.copy_(distributed.sharded_like(state["average"][name], tensor))
        for name, optimizer in self.optimizers.items():
            _load_optimizer(optimizer, state["optimizers"][name])
        if self.objective.adversary is not None:
            self.objective.adversary.discriminator.load_state_dict(state["discriminator"])
        if self.objective.revival is not None:
            self.objective.revival.load_state_dict(state["revival"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]


def _require_same(what: str, saved: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    for name, value in saved.items():
        if isinstance(value, Mapping) and isinstance(requested.get(name), Mapping):
            _require_same(f"{what}.{name}", value, requested[name])
        elif json.dumps(requested.get(name)) != json.dumps(value):
            raise TrainingError(
                f"the checkpoint's {what} has {name}={value!r}, this run asks for {requested.get(name)!r}; "
                "use the same value, or name another run folder"
            )


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {
            name: distributed.sharded_like(value, parameters[index])
            if value.shape == parameters[index].shape
            else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
