"""`alit train` on the command line."""

from __future__ import annotations

import json

import torch

from alit.weights import load_weights
from jobs import cli


def test_train_runs_all_three_stages(image_folder, small_weights, tmp_path):
    """Three commands lead from photographs to finetuned weights, each continuing from the previous stage."""
    before, folder = None, small_weights
    for stage in ("base", "distill", "finetune"):
        run = tmp_path / stage
        options = ["--init", folder, "--validation", image_folder, "--steps", 3, "--batch-size", 4, "--no-ray"]
        cli.main(["train", stage, str(image_folder), str(run), *map(str, options)])
        loaded, folder = load_weights(run / "weights"), run / "weights"
        assert loaded.provenance["stage"] == stage
        if stage == "distill":
            for name, tensor in before.model.base.state_dict().items():
                assert torch.equal(tensor, loaded.model.base.state_dict()[name]), (
                    "distillation leaves the base as it is"
                )
        if stage == "finetune":
            assert loaded.provenance["init_fingerprint"] == before.fingerprint
            decoder = loaded.model.base.decoder.conv_out.weight
            assert not torch.equal(decoder, before.model.base.decoder.conv_out.weight), "finetuning trains the base too"
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert any(name.startswith("val_l1") for name in rows[-1])
        before = loaded
