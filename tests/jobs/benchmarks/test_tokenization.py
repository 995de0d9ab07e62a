"""The tokenize benchmark."""

from __future__ import annotations

from alit.weights import load_weights
from jobs.benchmarks.tokenization import bare_loop
from jobs.sources.open import make_plan
from jobs.storage.path import parse_uri
from jobs.tokenization.description import describe_job
from jobs.tokenization.options import TokenizeOptions


def test_bare_loop_runs_without_output(image_folder, small_weights, tmp_path):
    """The bare loop of the tokenize benchmark encodes the images and writes nothing."""
    loaded = load_weights(small_weights)
    plan = make_plan(str(image_folder), rows_per_file=5)
    job = describe_job(TokenizeOptions(), loaded, "l1:0.3", plan.source, parse_uri(str(tmp_path / "out")))
    assert bare_loop(job, plan, loaded.model, 1) > 0
    assert not (tmp_path / "out").exists()
