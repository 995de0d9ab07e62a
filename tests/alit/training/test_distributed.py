"""Two workers that see half of each batch follow one that sees all of it, step by step."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import worker_pairs
from paths import ROOT, TESTS
from worker_pairs import CASES, STEPS

pytestmark = pytest.mark.numeric

DDP = list(CASES)
FSDP = ["base", "distill", "finetune"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder with the results of two workers for every case, with each kind of sharding."""
    folder = tmp_path_factory.mktemp("pairs")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{TESTS / 'support'}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # whatever the host's name resolves to
    }
    runs = [f"{case}-ddp" for case in DDP] + [f"{case}-fsdp" for case in FSDP]
    workers = [
        subprocess.Popen(
            [sys.executable, worker_pairs.__file__, str(rank), "2", str(folder / "store"), str(folder), *runs],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), "\n".join(errors)
    return folder


@cache
def alone(case: str) -> dict[str, Any]:
    """Returns the results of one worker."""
    return worker_pairs.train(case, 0, 1)


@pytest.mark.parametrize(("sharding", "case"), [("ddp", c) for c in DDP] + [("fsdp", c) for c in FSDP])
def test_two_workers_train_as_one(pairs, sharding, case):
    """Two workers with half of each batch have the losses and parameters of one worker, step by step."""
    one = alone(case)
    two = torch.load(pairs / f"{case}-{sharding}.pt", weights_only=True)
    assert len(two["losses"]) == STEPS
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-12)  # all of it is computed in float64
    for part in ("model", "average", "discriminator"):
        torch.testing.assert_close(two["state"][part], one["state"][part], rtol=1e-9, atol=1e-11)
    if usage := one["state"]["revival"]:
        assert (usage["usage"][:4] > 0).all()  # codes were revived
        torch.testing.assert_close(two["state"]["revival"], usage, rtol=0, atol=1e-7)


def test_sharded_state_is_resumed_by_one_worker(pairs):
    """The state that two sharded workers have saved is resumed by one worker."""
    state = torch.load(pairs / "finetune-fsdp.pt", weights_only=True)["state"]
    trainer = worker_pairs.trainer_of("finetune")
    trainer.load_state_dict(state)
    assert trainer.step == STEPS
    numbers = trainer.train_step(worker_pairs.TrainingBatch(worker_pairs.global_batch(STEPS)))
    assert torch.isfinite(numbers["loss"])
