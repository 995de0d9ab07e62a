"""Two workers that see half of each batch follow one that sees all of it, step by step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker_pairs
from paths import ROOT, TESTS
from worker_pairs import CASES, STEPS

DDP = list(CASES)
FSDP = ["base", "distill", "finetune"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """What two workers made of every case, once with each kind of sharding."""
    folder = tmp_path_factory.mktemp("pairs")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS / 'support'}", "OMP_NUM_THREADS": "1"}
    for sharding, cases in (("ddp", DDP), ("fsdp", FSDP)):
        store = folder / f"store-{sharding}"
        workers = [
            subprocess.Popen(
                [sys.executable, worker_pairs.__file__, str(rank), "2", str(store), str(folder), sharding, *cases],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
        assert not any(worker.returncode for worker in workers), "\n".join(errors)
    return folder


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("sharding", "case"), [("ddp", c) for c in DDP] + [("fsdp", c) for c in FSDP])
def test_two_workers_follow_one_for_twenty_steps(pairs, sharding, case):
    one = worker_pairs.train(case, 0, 1)
    two = torch.load(pairs / f"{case}-{sharding}.pt", weights_only=True)
    assert len(two["losses"]) == STEPS
    assert two["losses"][:3] == pytest.approx(one["losses"][:3], rel=1e-5)
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-3)
    # Adam walks as far per step whatever the gradient: the few parameters whose gradient is nothing but rounding, such
    # as biases before a norm, walk anywhere. All the others together must arrive where they arrive alone
    start = worker_pairs.trainer_of(case).state_dict()
    for part in ("model", "average", "discriminator"):
        moved = sum(float((tensor - start[part][name]).abs().sum()) for name, tensor in one["state"][part].items())
        apart = sum(
            float((tensor - two["state"][part][name]).abs().sum()) for name, tensor in one["state"][part].items()
        )
        assert apart <= 0.01 * moved, part
    if one["state"]["revival"]:
        torch.testing.assert_close(
            two["state"]["revival"]["usage"], one["state"]["revival"]["usage"], atol=5e-3, rtol=0
        )


def test_a_state_saved_by_two_sharded_workers_goes_on_alone(pairs):
    state = torch.load(pairs / "finetune-fsdp.pt", weights_only=True)["state"]
    trainer = worker_pairs.trainer_of("finetune")
    trainer.load_state_dict(state)
    assert trainer.step == STEPS
    numbers = trainer.train_step(worker_pairs.TrainingBatch(worker_pairs.global_batch(STEPS)))
    assert torch.isfinite(numbers["loss"])
