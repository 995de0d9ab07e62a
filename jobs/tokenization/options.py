"""What `alit tokenize` takes, without torch or Ray, so that help answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from alit.errors import AlitError

CRITERION_HELP = (
    "When an image has enough tokens: fixed:N, l1:T, mse:T, psnr:T, ssim:T, code:T, latent:T or "
    "package.module:function@T. The weights' own default when not given."
)


INPUT_HELP = (
    "Images: a folder of image files, of Parquet or Arrow tables, or of WebDataset tars; a glob in quotes; one such "
    "file; or a list (.txt, .csv, .tsv, .jsonl) of paths and URIs. Local or s3://bucket/folder, which may end with "
    "?endpoint=http://host:9000&region=…&profile=…&anonymous=true."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeOptions:
    """All but INPUT and OUTPUT.

    Attributes:
        weights: A weights folder, local or s3://; the packaged one when not given.
        image_column: The column of images: bytes, or paths and URIs. Of a tar, the extension of the images.
        id_column: The column with unique ids; file#row, or the list's own paths and URIs, when not given.
        keep: Columns to carry through, such as --keep caption label; of a tar, extensions of texts: --keep txt json.
        rows_per_file: Images per output file: the unit of work, and of what is redone after an interruption.
        limit: Only the first images, so many.
        overwrite: Replace a token dataset that is already there.
        dry_run: Say what would be done, and how long it would take, and stop.
        max_reject_rate: Stop when a larger share of the images (of 256 or more) is rejected: something is wrong then.
        max_bytes: Larger files are rejected.
        max_pixels: Larger images are rejected.
        batch_size: Images per forward pass; auto goes by the model and the GPU's memory.
        precision: Of the encoding. bfloat16 is made for GPUs, and changes some 2 % of lengths and ids. It is recorded.
        jpeg: draft decodes large JPEGs at a fraction of their size, at least twice the model's: 2 to 5 times faster for
            photographs of several megapixels, and changes some 2 % of the ids. It is recorded.
        workers: Processes that hold the model; one per CPU, or per GPU where there is one.
        decode_workers: CPU tasks that decode for each worker; 0 lets it decode for itself, the default without GPUs.
        gpus_per_worker: GPUs a worker takes, such as 0.5 for two on each; 1 where there is one.
        worker_memory: GiB of heap that a worker is given room for: Ray puts no more of them on a node than fit.
        worker_labels: Where workers run, by the nodes' labels, such as --worker-labels tier=gpu.
        decode_labels: Where the CPU tasks that decode for them run.
        patience: Seconds to wait for a cluster to have room for the first worker and a task that decodes for it.
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
        for name, least, most in (
            ("rows_per_file", 1, math.inf),
            ("limit", 1, math.inf),
            ("max_reject_rate", 0, 1),
            ("workers", 1, math.inf),
            ("decode_workers", 0, math.inf),
            ("gpus_per_worker", 0, 1e6),
            ("worker_memory", 0, 1e6),
            ("patience", 0, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                bound = f"at least {least}" if most > 1 else f"between {least} and {most}"
                raise AlitError(f"--{name.replace('_', '-')} must be {bound}, got {value}")
        if self.batch_size != "auto" and self.batch_size < 1:
            raise AlitError(f"--batch-size must be at least 1 or auto, got {self.batch_size}")
