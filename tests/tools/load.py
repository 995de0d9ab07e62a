"""Measures `alit serve` under load from a separate process, with locust (`pip install -e '.[load]'`).

    python tests/tools/load.py PHOTOS.parquet [--images 16] [--seconds 30] [--overload-seconds 60] [--settings FILE]

On a machine of two cores: the replica that holds the model has one for itself, as the bare loop has; the client, the
proxy, the API and the rest of Ray share the other. Prints, as lines of JSON: the bare loop's images per second;
throughput at saturation, and with a batch of one image; latencies at half of the bare loop's rate; what becomes of
three times that rate, with the memory of all processes; latencies from 10 s after it.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from processes import family, named, unique_bytes
from service import Service

from alit.images.decode import decode_image
from alit.weights import load_weights

HERE = Path(__file__).parent
OTHERS, MODEL = 0, 1  # cores


def say(what: str, **values: Any) -> None:
    print(json.dumps({"what": what} | values), flush=True)


def pin(pid: int, core: int) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})


def read(photos: Path, images: int) -> list[bytes]:
    """Photographs for 32 requests."""
    rows = pq.read_table(photos, columns=["image"])["image"].slice(0, 32 * images).to_pylist()
    return [row["bytes"] if isinstance(row, dict) else row for row in rows]


def bare(photos: Path, images: int, seconds: float) -> dict[str, float]:
    """Images per second of a loop in a process of its own, on the replica's core: of encoding, and with decoding."""
    call = f"import load, pathlib; load.loop(pathlib.Path({str(photos)!r}), {images}, {seconds})"
    command = ["taskset", "-c", str(MODEL), sys.executable, "-c", call]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE).stdout)


def loop(photos: Path, images: int, seconds: float) -> None:
    torch.set_num_threads(1)
    model, files = load_weights().model, read(photos, images)

    def pixels(file: bytes) -> np.ndarray:
        return decode_image(file, model.config.image_size).pixels

    def rate(make: Callable[[Any], np.ndarray], source: list[Any]) -> float:
        done, started = 0, time.monotonic()
        while time.monotonic() - started < seconds:
            at = done % len(source)
            batch = np.stack([make(item) for item in source[at : at + images]])
            model.encode(torch.from_numpy(batch).permute(0, 3, 1, 2))
            done += images
        return done / (time.monotonic() - started)

    decoded = [pixels(file) for file in files]
    rate(np.asarray, decoded[:images])  # warm
    print(json.dumps({"encoding": rate(np.asarray, decoded), "with_decoding": rate(pixels, files)}))


def requests(photos: Path, images: int, folder: Path) -> Path:
    """Bodies of requests, one a line: 32 of them, in turns."""
    files = read(photos, images)
    with (folder / "bodies.jsonl").open("w") as out:
        for start in range(0, len(files), images):
            data = [{"data": base64.b64encode(file).decode()} for file in files[start : start + images]]
            out.write(json.dumps({"images": data}) + "\n")
    return folder / "bodies.jsonl"


@contextmanager
def serving(folder: Path, settings: str) -> Iterator[Service]:
    """A service whose replica has a core of its own."""
    os.sched_setaffinity(0, {OTHERS})  # inherited by all that Ray starts
    service = Service(folder, settings).ready()
    try:
        (replica,) = named(service.process.pid, "ServeReplica:alit:Encoder")
        pin(replica, MODEL)
        yield service
    finally:
        service.stop()


def load(service: Service, bodies: Path, seconds: float, users: int, rate: float | None = None) -> list[dict[str, Any]]:
    """What became of every request: when it was sent (s), how long it took (s), its status, images that were encoded.

    Args:
        users: that many requests may be under way.
        rate: requests/s; as fast as they are answered when None.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        command = [sys.executable, "-m", "locust", "-f", str(HERE / "load_user.py"), "--headless", "--only-summary"]
        command += ["--host", service.url, "-u", str(users), "-r", str(users), "-t", f"{seconds:g}s", "-s", "60"]
        told_by = {"ALIT_BODIES": str(bodies), "ALIT_TOLD": str(told), "ALIT_RATE": str(rate or 0)}
        done = subprocess.run(command, env=os.environ | told_by, capture_output=True, text=True, check=False)
        if not told.exists():
            raise SystemExit(done.stdout + done.stderr)
        return json.loads(told.read_text())


def summary(found: list[dict[str, Any]], since: float = 0, window: float | None = None) -> dict[str, Any]:
    found = [request for request in found if request["sent"] >= since]
    good = np.array([request["took"] for request in found if request["status"] == 200] or [np.nan])
    last = max((request["sent"] + request["took"] for request in found), default=0.0)
    images = sum(request["images"] for request in found)
    return {
        "requests": len(found),
        "statuses": dict(sorted(Counter(request["status"] for request in found).items())),
        "without_retry_after": sum(r["status"] in (429, 503) and not r["retry_after"] for r in found),
        "images_per_second": round(images / (window or max(last - since, 1e-9)), 2),
        "seconds": {f"p{q}": round(float(np.percentile(good, q)), 3) for q in (50, 95, 99)},
        "slowest": round(max((request["took"] for request in found), default=0.0), 3),
    }


class Memory:
    """Of all processes of a service together, every second, in bytes; with the number of processes."""

    def __init__(self, pid: int) -> None:
        self.pid, self.samples, self.ended = pid, [], threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.ended.wait(1):
            self.samples.append(sum(map(unique_bytes, family(self.pid))))

    def stop(self) -> dict[str, int]:
        self.ended.set()
        self.thread.join()
        thirds = np.array_split(np.array(self.samples) >> 20, 3)
        return {name: int(part.max()) for name, part in zip(("first", "second", "last"), thirds, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=16, help="of a request")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--settings", type=Path, help="a YAML file of settings for the service")
    told = parser.parse_args()
    settings = (told.settings.read_text() if told.settings else "") + "requests_per_minute: 1000000\n"
    with tempfile.TemporaryDirectory() as folder:
        bodies = requests(told.photos, told.images, Path(folder))
        alone = bare(told.photos, told.images, told.seconds / 2)
        say("bare loop, images/s", **alone)
        with serving(Path(folder), settings) as service:
            load(service, bodies, 5, 4)
            full = summary(load(service, bodies, told.seconds, 6))
            again = bare(told.photos, told.images, told.seconds / 2)
            say("bare loop, images/s", **again)
            base = (alone["encoding"] + again["encoding"]) / 2
            say("saturation", **full, share_of_bare=round(full["images_per_second"] / base, 3))
            rate = base / told.images
            say("half of the bare rate", **summary(load(service, bodies, told.seconds, 20, rate / 2)))
            memory = Memory(service.process.pid)
            over = summary(load(service, bodies, told.overload_seconds, 150, 3 * rate))
            say("three times the bare rate", **over, memory_MiB=memory.stop())
            after = load(service, bodies, 10 + told.seconds, 20, rate / 2)
            say("half of it, from 10 s after that", **summary(after, since=10))
        with serving(Path(folder), settings + "max_batch_tokens: 1\n") as service:
            load(service, bodies, 5, 4)
            one = summary(load(service, bodies, told.seconds, 6))
            say("saturation, batches of one", **one, share_of_bare=round(one["images_per_second"] / base, 3))


if __name__ == "__main__":
    main()
