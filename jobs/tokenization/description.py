"""The description of a tokenization job: every setting, resolved once on the driver and sent to every actor."""

from __future__ import annotations

from dataclasses import dataclass, field

from alit.dataset import Metadata, Precision, metadata_of
from alit.images.decode import JpegMode
from alit.images.formats import Limits
from alit.model.config import AlitConfig
from alit.validation import require_range
from alit.weights import Weights
from jobs.runtime.placement import parse_labels
from jobs.runtime.resources import Resources, Workers, resolve_batch_size, resolve_workers
from jobs.sources.records import Source
from jobs.storage.path import StoragePath
from jobs.tokenization.options import TokenizeOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeJob:
    """A tokenization job; picklable.

    Attributes:
        source: The input and how it is read.
        output: The dataset's folder.
        config: The model's configuration.
        fingerprint: The fingerprint of its weights.
        criterion: When an image has enough tokens, in canonical spelling.
        precision: Precision of the encoding.
        jpeg: How JPEGs are decoded.
        limits: The largest image that is decoded, in bytes and pixels.
        batch_size: Images per forward pass; batches never cross a shard.
        workers: The processes that hold the model.
        threads: Torch threads per worker; the same in every run, since the order of summation may depend on it.
    """

    source: Source
    output: StoragePath
    config: AlitConfig
    fingerprint: str
    criterion: str
    precision: Precision = "float32"
    jpeg: JpegMode = "full"
    limits: Limits = field(default_factory=Limits)
    batch_size: int = 64
    workers: Workers = field(default_factory=Workers)
    threads: int = 1

    def __post_init__(self) -> None:
        require_range("--batch-size", self.batch_size, 1)

    @property
    def metadata(self) -> Metadata:
        """The provenance record that every file of the dataset carries."""
        return metadata_of(self.config, self.fingerprint, self.criterion, precision=self.precision, jpeg=self.jpeg)


def describe_job(
    options: TokenizeOptions,
    weights: Weights,
    criterion: str,
    source: Source,
    output: StoragePath,
    *,
    recorded_batch_size: int | None = None,
) -> TokenizeJob:
    """Resolves the options of a job, except for its workers: those depend on resources that are known later.

    Args:
        options: The options as given.
        weights: The loaded weights.
        criterion: As `alit.dataset.checked_criterion` returns it.
        source: The input.
        output: The dataset's folder.
        recorded_batch_size: The batch size of the interrupted job to resume, if there is one.
    """
    config = weights.model.config
    return TokenizeJob(
        source=source,
        output=output,
        config=config,
        fingerprint=weights.fingerprint,
        criterion=criterion,
        precision=options.precision,
        jpeg=options.jpeg,
        limits=Limits(max_bytes=options.max_bytes, max_pixels=options.max_pixels),
        batch_size=resolve_batch_size(options.batch_size, recorded_batch_size, config),
    )


def resolve_job_workers(options: TokenizeOptions, resources: Resources, shards: int) -> Workers:
    """Resolves worker counts from the options and the resources that exist.

    Args:
        options: The options as given.
        resources: The resources of the cluster or machine.
        shards: Number of shards to write.

    Raises:
        AlitError: A label is malformed.
    """
    return resolve_workers(
        resources,
        tasks=shards,
        workers=options.workers,
        gpus_per_worker=options.gpus_per_worker,
        decode_workers=options.decode_workers,
        memory_gib=options.worker_memory,
        labels=parse_labels("--worker-labels", options.worker_labels),
        decode_labels=parse_labels("--decode-labels", options.decode_labels),
    )
