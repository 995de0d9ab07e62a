"""Measures whether the job's memory grows with its corpus: one image listed again and again under other ids.

    python tests/tools/memory.py [10000 1000000]

For each number of rows: seconds to plan and to tokenize; the peaks of the unique set sizes of the driver, of the actors
and of Ray's own processes, and of the object store.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from processes import family, unique_bytes
from small_models import SMALLEST

from alit.images.encode import encode_image
from alit.tokenizer import Alit
from alit.weights import save_weights

EVERY = 1.0  # s


def shared_memory() -> int:
    info = os.statvfs("/dev/shm")
    return (info.f_blocks - info.f_bfree) * info.f_frsize


def measure(rows: int, folder: Path, weights: Path) -> None:
    image = folder / "image.png"
    image.write_bytes(encode_image(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)))
    source, output = folder / f"{rows}.csv", folder / f"out-{rows}"
    with source.open("w") as file:
        file.write("image,id\n")
        file.writelines(f"{image},some/folder/of/a/corpus/{i:09}.png\n" for i in range(rows))
    alit = [str(Path(sys.executable).with_name("alit")), "tokenize", str(source), str(output)]
    options = ["--weights", str(weights), "--criterion", "fixed:8", "--id-column", "id", "--workers", "2"]
    before, started, planned = shared_memory(), time.monotonic(), 0.0
    process = subprocess.Popen([*alit, *options, "--batch-size", "256"], stderr=subprocess.DEVNULL)
    peaks: dict[str, int] = defaultdict(int)
    while process.poll() is None:
        sums: dict[str, int] = defaultdict(int)
        for pid, title in family(process.pid).items():
            kind = "driver" if pid == process.pid else "actors" if "Tokenizer" in title else "Ray"
            sums[kind] += unique_bytes(pid)
        sums["object store"] = max(0, shared_memory() - before)
        if not planned and (output / "_job.json").exists():
            planned = time.monotonic() - started
            peaks["driver while planning"] = peaks["driver"]
        for kind, size in sums.items():
            peaks[kind] = max(peaks[kind], size)
        time.sleep(EVERY)
    seconds = time.monotonic() - started
    assert process.returncode == 0, process.returncode
    plan = sum(path.stat().st_size for path in (output / "_plan").iterdir())
    print(
        f"{rows:>9} rows: planned in {planned:.0f} s ({plan / 1e6:.1f} MB), all in {seconds:.0f} s; "
        + ", ".join(f"{kind} {size / 2**20:.0f} MiB" for kind, size in sorted(peaks.items())),
        flush=True,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        save_weights(Path(name) / "weights", Alit(SMALLEST), provenance={})
        for rows in map(int, sys.argv[1:] or ["10000", "1000000"]):
            measure(rows, Path(name), Path(name) / "weights")


if __name__ == "__main__":
    main()
