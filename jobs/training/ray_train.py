"""Training on Ray Train: placement of the workers, their events, and restarts after failures."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from alit.errors import AlitError, TrainingError
from alit.training.trainer import TrainingBatch
from jobs.runtime.placement import wait_for_resources
from jobs.runtime.session import ray_session
from jobs.storage.path import StoragePath
from jobs.training.events import Event, OnEvent
from jobs.training.metrics import TrainMetrics
from jobs.training.ray_feed import shared_batches
from jobs.training.worker import TrainSpec, train_worker

MAX_FAILURES = 16
"""Restarts after failures other than user errors; the loss of a machine does not count."""


class EventQueue:
    """An actor that passes events from the workers to the driver, and keeps the user error that ends the run."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.error: str | None = None

    def put(self, event: Event) -> None:
        """Adds an event."""
        self.events.append(event)

    def take(self) -> list[Event]:
        """Removes and returns all events, oldest first."""
        taken, self.events = self.events, []
        return taken

    def fail(self, error: str) -> None:
        """Records the message of a user error; the first one is kept."""
        self.error = self.error or error

    def failure(self) -> str | None:
        """Returns the message of the recorded user error, if any."""
        return self.error


def _ray_worker(config: dict[str, Any]) -> None:
    """Trains as one worker; Ray Train calls it again after each failure and each change of the number of workers."""
    import ray
    import ray.train
    import ray.train.torch

    queue = config["queue"]
    if ray.get(queue.failure.remote()):
        return  # another attempt would only repeat the user error, which the driver reports
    spec: TrainSpec = ray.get(config["spec"])
    context = ray.train.get_context()
    worker, workers = context.get_world_rank(), context.get_world_size()

    metrics = TrainMetrics(spec.folder.path) if worker == 0 else None

    def on_event(event: Event) -> None:
        if metrics is not None:
            metrics.on_event(event)
        queue.put.remote(event)

    def batches(first: int, last: int) -> Iterator[TrainingBatch]:
        return shared_batches(spec.feed, first, last, worker=worker, workers=workers)

    try:
        train_worker(
            spec,
            batches,
            device=ray.train.torch.get_device(),
            on_event=on_event,
            preempted=lambda: ray.train.get_preemption_info() is not None,
        )
    except AlitError as error:
        ray.get(queue.fail.remote(str(error)))
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Number and nodes of the workers.

    Attributes:
        workers: The smallest and the largest number of workers.
        gpus: Whether each worker takes a GPU; None takes GPUs if the cluster has any now.
        labels: Label selector of the workers' nodes.
        patience: Seconds to wait until the cluster has room for the smallest number of workers.
    """

    workers: tuple[int, int] = (1, 1)
    gpus: bool | None = None
    labels: dict[str, str] = field(default_factory=dict)
    patience: float = 600.0


def train_on_ray(spec: TrainSpec, placement: Placement, *, on_event: OnEvent) -> None:
    """Trains with as many workers as the cluster has room for, within the range of the placement.

    Args:
        spec: The run.
        placement: Number and nodes of the workers.
        on_event: Receives the run's events, in a thread.

    Raises:
        AlitError: The cluster has no room for the workers.
        TrainingError: Training failed, and another attempt would not help.
    """
    low, high = placement.workers
    with ray_session(cpus=high * spec.threads) as ray:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        gpus = ray.cluster_resources().get("GPU", 0) > 0 if placement.gpus is None else placement.gpus
        resources = {"CPU": float(spec.threads)} | ({"GPU": 1.0} if gpus else {})
        wait_for_resources([(resources, placement.labels)] * low, placement.patience)
        # On another node the queue could be lost with that node; the run ends with the driver's node in any case.
        driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue = ray.remote(num_cpus=0)(EventQueue).options(scheduling_strategy=driver_node).remote()
        done = threading.Event()
        reader = threading.Thread(target=_forward_events, args=(ray, queue, on_event, done), daemon=True)
        reader.start()
        try:
            problem = _fit(spec, placement, resources, queue)
        finally:
            done.set()
            reader.join(10)
        if error := ray.get(queue.failure.remote()):
            raise TrainingError(error)
        if problem is not None:
            reason = str(problem).strip().splitlines()[-1]
            raise TrainingError(f"training failed: {reason}") from problem
        _scratch(spec).remove_folder()


def _scratch(spec: TrainSpec) -> StoragePath:
    """Returns the folder of Ray Train's own files, which is removed after a successful run."""
    return spec.folder / ".ray"


def _fit(spec: TrainSpec, placement: Placement, resources: dict[str, float], queue: Any) -> Exception | None:
    """Runs the workers to their end; returns the failure of Ray Train, if any."""
    import ray
    import ray.train
    from ray.exceptions import RayError
    from ray.train.torch import TorchConfig, TorchTrainer

    low, high = placement.workers
    gpus, scratch = "GPU" in resources, _scratch(spec)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"spec": ray.put(spec), "queue": queue},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=gpus,
            resources_per_worker=resources,
            label_selector=placement.labels or None,
        ),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex,  # the run folder decides where to resume, not Ray
            storage_path=scratch.path,
            storage_filesystem=scratch.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        trainer.fit()
    except (ray.train.TrainingFailedError, RayError) as error:
        return error
    return None


def _forward_events(ray: Any, queue: Any, on_event: OnEvent, done: threading.Event) -> None:
    """Passes the queue's events on until `done` is set, and those that are left then."""
    while True:
        last = done.wait(0.3)
        for event in ray.get(queue.take.remote()):
            on_event(event)
        if last:
            return
