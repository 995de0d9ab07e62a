"""What runs on the workers of a training run, and what starts them: Ray Train, or this process alone.

A worker makes its trainer of a `Start`, goes on from the run's newest checkpoint and trains. Nothing that it needs lies
on the driver's disk.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alit import distributed
from alit.errors import AlitError, TrainingError
from alit.objectives import objective_for
from alit.perceptual import Perceptual
from alit.tokenizer import Alit
from alit.training import Batch, Trainer, train
from jobs.feed import Feed, local_batches, shared_batches
from jobs.metrics import TrainMetrics
from jobs.run import RunFolder, Settings, Tell
from jobs.runner import await_room, keep_freed_memory, ray_session
from jobs.storage import Place

MAX_FAILURES = 16
"""Restarts after a failure that is no mistake of the user's; a machine that is taken away does not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """All that a worker needs; picklable.

    Attributes:
        settings: what was asked for.
        folder: of the run.
        model: with its initial values, on the CPU.
        perceptual: LPIPS, where its files were given.
        feed: the training images.
        held_out: the validation images, uint8 [B, 3, S, S].
        flops: floating-point operations per image.
        threads: of torch, per worker.
    """

    settings: Settings
    folder: Place
    model: Alit
    perceptual: Perceptual | None
    feed: Feed
    held_out: Tensor | None
    flops: float
    threads: int


def work(
    start: Start,
    batches: Callable[[int, int], Iterator[Batch]],
    *,
    device: torch.device,
    tell: Tell,
    preempted: Callable[[], bool] = lambda: False,
) -> None:
    """What every worker does: `batches` gives its share of the steps from one to another."""
    torch.set_num_threads(start.threads)
    keep_freed_memory()
    recipe = start.settings.recipe
    model = start.model.to(device).train()
    perceptual = start.perceptual.to(device) if start.perceptual is not None else None
    trainer = Trainer(model, objective_for(model, recipe, perceptual), recipe)
    run = RunFolder(
        start.folder,
        start.settings,
        held_out=start.held_out,
        flops=start.flops,
        tell=tell,
        preempted=preempted,
    )
    places = distributed.gathered_objects(f"process {os.getpid()} on {socket.gethostname()}")
    if distributed.rank() == 0:
        tell({"line": f"training on {device.type} with {len(places)} worker(s): {', '.join(places)}"})
    run.resume(trainer)
    train(trainer, run.without_rejects(batches(trainer.step, recipe.steps)), run)
    run.finish(trainer)


# -------------------------------------------------------------------- with Ray


class Mailbox:
    """An actor that workers send events to and the driver reads, and that remembers an error that must end the run."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.error: str | None = None

    def tell(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def fail(self, error: str) -> None:
        self.error = self.error or error

    def failed(self) -> str | None:
        return self.error

    def take(self) -> list[dict[str, Any]]:
        taken, self.events = self.events, []
        return taken


def _ray_worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on every worker, again after each failure and each change of their number."""
    import ray
    import ray.train
    import ray.train.torch

    mailbox = settings["mailbox"]
    if ray.get(mailbox.failed.remote()):
        return  # a mistake that another try would only repeat: the driver says what it is
    start: Start = ray.get(settings["start"])
    context = ray.train.get_context()
    worker, workers = context.get_world_rank(), context.get_world_size()

    metrics = TrainMetrics(start.folder.path) if worker == 0 else None

    def tell(event: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.tell(event)
        mailbox.tell.remote(event)

    def batches(first: int, last: int) -> Iterator[Any]:
        return shared_batches(start.feed, first, last, worker=worker, workers=workers)

    try:
        work(
            start,
            batches,
            device=ray.train.torch.get_device(),
            tell=tell,
            preempted=lambda: ray.train.get_preemption_info() is not None,
        )
    except AlitError as error:
        ray.get(mailbox.fail.remote(str(error)))
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How many workers train, and where.

    Attributes:
        workers: the fewest and the most.
        gpus: whether each takes one; as the cluster has any now when None.
        labels: of their nodes.
        patience: seconds to wait for room for the fewest.
    """

    workers: tuple[int, int] = (1, 1)
    gpus: bool | None = None
    labels: dict[str, str] = field(default_factory=dict)
    patience: float = 600.0


def train_on_ray(start: Start, where: Placement, *, tell: Tell) -> None:
    """Trains with as many workers as there is room for, from the least to the most.

    Raises:
        TrainingError: training failed for good.
    """
    low, high = where.workers
    with ray_session(cpus=high * start.threads) as ray:
        import ray.train
        from ray.exceptions import RayError
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        gpus = ray.cluster_resources().get("GPU", 0) > 0 if where.gpus is None else where.gpus
        needs = {"CPU": float(start.threads)} | ({"GPU": 1.0} if gpus else {})
        await_room([(needs, where.labels)] * low, where.patience)
        # where the driver is: on another node it could be lost with it, and the run is over without the driver anyway
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        post: Any = ray.remote(num_cpus=0)(Mailbox)
        mailbox = post.options(scheduling_strategy=here).remote()
        scratch = start.folder / ".ray"
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"start": ray.put(start), "mailbox": mailbox},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=low if low == high else (low, high),
                use_gpu=gpus,
                resources_per_worker=needs,
                label_selector=where.labels or None,
            ),
            run_config=ray.train.RunConfig(
                name=uuid.uuid4().hex,  # where to go on is the run folder's own business, not Ray's
                storage_path=scratch.path,
                storage_filesystem=scratch.filesystem,
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        done = threading.Event()
        reader = threading.Thread(target=_read_mail, args=(ray, mailbox, tell, done), daemon=True)
        reader.start()
        problem: Exception | None = None
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, RayError) as error:
            problem = error
        finally:
            done.set()
            reader.join(10)
        if error := ray.get(mailbox.failed.remote()):
            raise TrainingError(error)
        if problem is not None:
            reason = str(problem).strip().splitlines()[-1]
            raise TrainingError(f"training failed for good: {reason}") from problem
        scratch.remove_folder()


def _read_mail(ray: Any, mailbox: Any, tell: Tell, done: threading.Event) -> None:
    while True:
        last = done.wait(0.3)
        for event in ray.get(mailbox.take.remote()):
            tell(event)
        if last:
            return


def train_here(start: Start, *, tell: Tell) -> None:
    """Trains in this process, without Ray."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work(start, lambda first, last: local_batches(start.feed, first, last), device=device, tell=tell)
