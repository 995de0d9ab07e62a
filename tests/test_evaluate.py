"""The evaluation's arithmetic against independent computations, and its whole on a small random model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from alit.config import AlitConfig, KLConfig, VQGANConfig
from alit.errors import ConfigError
from alit.images import encode_image
from alit.tokenizer import Alit
from alit.weights import save_weights
from jobs.evaluate import adaptive, bootstrap, evaluate, markdown, perplexity, run, spearman


def small(**changes) -> Alit:
    base = VQGANConfig(channels=(4, 4), blocks=1, latent_dim=4, codebook_size=8, norm_groups=2)
    fields = {"base": base, "image_size": 16, "width": 16, "depth": 1, "heads": 2, "latents_per_iteration": 4}
    torch.manual_seed(0)
    return Alit(AlitConfig(**(fields | {"iterations": 3, "codebook_size": 16} | changes))).eval()


@given(st.lists(st.integers(0, 5), min_size=3, max_size=30), st.randoms())
def test_spearman_is_scipys_also_with_ties(values, random):
    other = values[:]
    random.shuffle(other)
    expected = 0.0 if len(set(values)) == 1 else scipy.stats.spearmanr(values, other).statistic
    assert spearman(values, other) == pytest.approx(expected, abs=1e-9)


def test_perplexity_counts_evenly_used_codes():
    assert perplexity(torch.arange(10).repeat(3), 64) == pytest.approx(10)
    assert perplexity(torch.zeros(5, dtype=torch.long), 64) == pytest.approx(1)


def test_the_bootstrap_interval_covers_the_mean_as_the_normal_one_does():
    differences = np.random.default_rng(1).normal(0.3, 1.0, 400)
    mean, low, high = bootstrap(differences)
    error = differences.std() / math.sqrt(len(differences))
    assert mean == pytest.approx(differences.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.01)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.01)


def test_adaptive_takes_the_first_length_that_meets_the_threshold_and_else_the_longest():
    errors = np.array([[0.3, 0.05, 0.4], [0.2, 0.2, 0.4], [0.1, 0.01, 0.4]], np.float32)
    result = adaptive(errors, (4, 8, 12), [300, 100, 500], 0.2)
    assert result.counts == [1, 1, 1]
    assert result.mean_tokens == 8
    assert result.satisfied == pytest.approx(2 / 3)
    assert result.l1 == pytest.approx((0.2 + 0.05 + 0.4) / 3)
    assert result.spearman == pytest.approx(1.0)


def test_an_evaluation_agrees_with_the_models_own_answers():
    model = small()
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    result = evaluate(model, images, "f" * 64)
    x = images.float() / 255
    for k, tokens in enumerate(model.encode_all(images)):
        with torch.inference_mode():
            unclamped = model.reconstruct(model.to_codes(tokens))
        assert result.l1[k] == pytest.approx(float((unclamped - x).abs().mean()), abs=1e-6)
    for row in result.adaptive:
        tokens = model.encode(images, f"l1:{row.threshold}").num_tokens
        assert row.counts == [int((tokens == length).sum()) for length in result.lengths]
    assert result.mean_color_l1 == pytest.approx(float((x - x.mean((2, 3), keepdim=True)).abs().mean()))
    assert all(str(length) in markdown(result) for length in result.lengths)


def test_what_has_no_codes_to_count_is_refused():
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="quantized"):
        evaluate(small(codebook_size=None), images, "")
    with pytest.raises(ConfigError, match="discrete"):
        evaluate(small(base=KLConfig(channels=(32, 32), blocks=1, latent_dim=4)), images, "")


def test_a_run_writes_its_tables(tmp_path):
    save_weights(tmp_path / "weights", small(), provenance={})
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (tmp_path / "images" / f"{i}.png").write_bytes(encode_image(pixels))
    run(str(tmp_path / "images"), tmp_path / "report", weights=str(tmp_path / "weights"), thresholds=(0.4,))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["images"] == 3
    assert written["adaptive"][0]["threshold"] == 0.4
    assert "| 12 |" in (tmp_path / "report.md").read_text()
