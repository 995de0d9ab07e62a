"""Options of `alit tokenize`, without torch or Ray, so that help answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from alit.validation import option, require, require_range

CRITERION_HELP = (
    "When an image has enough tokens: fixed:N, l1:T, mse:T, psnr:T, ssim:T, code:T, latent:T or "
    "package.module:function@T. Defaults to the criterion of the weights."
)


INPUT_HELP = (
    "Images: a folder of image files, of Parquet or Arrow tables, or of WebDataset tars; a glob in quotes; one such "
    "file; or a list (.txt, .csv, .tsv, .jsonl) of paths and URIs. Local or s3://bucket/folder, which may end with "
    "?endpoint=http://host:9000&region=…&profile=…&anonymous=true."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeOptions:
    """Options of `alit tokenize` besides INPUT and OUTPUT.

    Attributes:
        weights: A weights folder, local or s3://; the packaged weights by default.
        image_column: The column of images: bytes, or paths and URIs. For tars, the extension of the images.
        id_column: The column with unique ids. By default file#row, or the list's own paths and URIs.
        keep: Columns to carry through, such as --keep caption label; for tars, extensions of texts: --keep txt json.
        rows_per_file: Images per output file: the unit of work, and of what is redone after an interruption.
        limit: Tokenize only the first images, up to this number.
        overwrite: Replace an existing token dataset.
        dry_run: Print what would be done, and how long it would take, then exit.
        max_reject_rate: Stop if a larger share of the images is rejected, which points to a wrong input. Not enforced
            below 256 images.
        max_bytes: Reject larger files.
        max_pixels: Reject larger images.
        batch_size: Images per forward pass; auto chooses by the model and the GPU's memory.
        precision: Precision of the encoding. bfloat16 is meant for GPUs, and changes some 2 % of lengths and ids. It is
            recorded.
        jpeg: draft decodes large JPEGs at a fraction of their size, at least twice the model's: 2 to 5 times faster for
            images of several megapixels, and changes some 2 % of the ids. It is recorded.
        workers: Processes that hold the model; by default one per CPU, or per GPU where there are any.
        decode_workers: CPU tasks that decode for each worker; with 0, the default without GPUs, workers decode for
            themselves.
        gpus_per_worker: GPUs per worker, such as 0.5 for two workers on each; 1 by default where there are any.
        worker_memory: GiB of heap to reserve per worker: Ray places no more workers on a node than fit.
        worker_labels: Labels of the nodes that workers run on, such as --worker-labels tier=gpu.
        decode_labels: Labels of the nodes that decode tasks run on.
        patience: Seconds to wait for a cluster to have room for the first worker and one of its decode tasks.
    """

    criterion: Annotated[str | None, arg(help=CRITERION_HELP)] = None
    weights: str | None = None
    image_column: str = "image"
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    rows_per_file: int = 1024
    limit: int | None = None
    overwrite: bool = False
    dry_run: bool = False
    max_reject_rate: float = 0.5
    max_bytes: int = 64 * 1024**2
    max_pixels: int = 89_478_485
    batch_size: int | Literal["auto"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    jpeg: Literal["full", "draft"] = "full"
    workers: int | None = None
    decode_workers: int | None = None
    gpus_per_worker: float | None = None
    worker_memory: float = 0
    worker_labels: tuple[str, ...] = ()
    decode_labels: tuple[str, ...] = ()
    patience: float = 600

    def __post_init__(self) -> None:
        require_range("--rows-per-file", self.rows_per_file, 1)
        require_range("--limit", self.limit, 1)
        require_range("--max-reject-rate", self.max_reject_rate, 0, 1)
        require_range("--workers", self.workers, 1)
        require_range("--decode-workers", self.decode_workers, 0)
        for field in ("gpus_per_worker", "worker_memory"):
            value = getattr(self, field)
            require_range(option(field), value, 0)
            require(not value or math.isfinite(value), f"{option(field)} must be finite, got {value}")
        require_range("--patience", self.patience, 0)
        require(
            self.batch_size == "auto" or self.batch_size >= 1,
            f"--batch-size must be at least 1 or auto, got {self.batch_size}",
        )
