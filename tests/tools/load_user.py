"""The user that locust makes many of, for tests/tools/load.py."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from pathlib import Path

import gevent
from locust import FastHttpUser, events, task

BODIES = [line.encode() for line in Path(os.environ["ALIT_BODIES"]).read_text().splitlines()]
TURN = itertools.count()
STARTED = time.monotonic()
TOLD: list[dict] = []
RATE = float(os.environ["ALIT_RATE"])


class User(FastHttpUser):
    network_timeout = connection_timeout = 120.0
    max_retries = 0

    def on_start(self) -> None:
        """With a rate, every user asks once a period, in a phase of its own: arrivals do not wait for answers."""
        assert self.environment.parsed_options is not None
        self.period = self.environment.parsed_options.num_users / RATE if RATE else 0.0
        self.next = time.monotonic() + random.random() * self.period
        gevent.sleep(self.wait_time())

    def wait_time(self) -> float:
        wait, self.next = max(0.0, self.next - time.monotonic()), self.next + self.period
        return wait

    @task
    def encode(self) -> None:
        body, sent = BODIES[next(TURN) % len(BODIES)], time.monotonic()
        headers = {"content-type": "application/json"}
        with self.client.post("/v1/encode", data=body, headers=headers, catch_response=True) as response:
            results = json.loads(response.content)["results"] if response.status_code == 200 else []
            response.success()
        TOLD.append(
            {
                "sent": sent - STARTED,
                "took": time.monotonic() - sent,
                "status": response.status_code,
                "retry_after": (response.headers or {}).get("retry-after"),
                "images": sum("error" not in result for result in results),
            }
        )


@events.quitting.add_listener
def tell(**_: object) -> None:
    Path(os.environ["ALIT_TOLD"]).write_text(json.dumps(TOLD))
