"""Training on Ray Train: the workers, their events, their restarts."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from alit.errors import AlitError, TrainingError
from jobs.runtime.placement import wait_for_resources
from jobs.runtime.session import ray_session
from jobs.training.metrics import TrainMetrics
from jobs.training.ray_feed import shared_batches
from jobs.training.run_folder import Tell
from jobs.training.worker import TrainSpec, train_worker

MAX_FAILURES = 16
"""Restarts after a failure that is no mistake of the user's; a machine that is taken away does not count."""


class EventQueue:
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
    start: TrainSpec = ray.get(settings["start"])
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
        train_worker(
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


def train_on_ray(start: TrainSpec, where: Placement, *, tell: Tell) -> None:
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
        wait_for_resources([(needs, where.labels)] * low, where.patience)
        # where the driver is: on another node it could be lost with it, and the run is over without the driver anyway
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        post: Any = ray.remote(num_cpus=0)(EventQueue)
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
