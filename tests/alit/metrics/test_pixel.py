"""Image distances agree with numpy and with scikit-image."""

import numpy as np
import pytest
import torch
from torch import Tensor

from alit.metrics import pixel

pytestmark = pytest.mark.numeric

ALL = {"l1": pixel.l1, "mse": pixel.mse, "psnr": pixel.psnr, "ssim": pixel.ssim}


def pair(height: int = 24, width: int = 20, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """Five images, and the same ones disturbed a little, a little more, ...; the last ones beyond [0, 1]."""
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(5, 3, height, width, generator=generator)
    strength = torch.linspace(0.01, noise, 5).view(-1, 1, 1, 1)
    return images, images + strength * torch.randn(images.shape, generator=generator)


def by_numpy(name: str, x: np.ndarray, y: np.ndarray) -> float:
    difference = x.astype(np.float64) - y
    mse = (difference**2).mean()
    return {"l1": np.abs(difference).mean(), "mse": mse, "psnr": 10 * np.log10(1 / mse)}[name]


@pytest.mark.parametrize("name", ["l1", "mse", "psnr"])
def test_distances_agree_with_numpy(name):
    """L1, MSE and PSNR agree with NumPy."""
    images, others = pair()
    expected = [by_numpy(name, x.numpy(), y.numpy()) for x, y in zip(images, others, strict=True)]
    np.testing.assert_allclose(ALL[name](images, others).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(24, 20), (11, 11), (64, 64)])
def test_ssim_agrees_with_scikit_image(shape):
    """SSIM agrees with scikit-image."""
    skimage = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    images, others = pair(*shape)
    # with Gaussian weights scikit-image too uses 11 pixels, and its mean leaves out the 5 at each border,
    # where the window would reach over the edge
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    expected, interior = [], []
    for x, y in zip(images.double().numpy(), others.double().numpy(), strict=True):
        mean, full = skimage.structural_similarity(x, y, channel_axis=0, full=True, **settings)
        expected.append(mean)
        interior.append(full[:, 5:-5, 5:-5].mean())
    np.testing.assert_allclose(pixel.ssim(images, others).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(expected, interior)


def test_distances_of_identical_images():
    """Identical images have errors of 0, an infinite PSNR and an SSIM of 1."""
    images, _ = pair()
    assert torch.equal(pixel.l1(images, images), torch.zeros(5))
    assert torch.equal(pixel.mse(images, images), torch.zeros(5))
    assert torch.equal(pixel.psnr(images, images), torch.full((5,), torch.inf))
    torch.testing.assert_close(pixel.ssim(images, images), torch.ones(5))


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_ssim_of_flat_images_is_a_number(level):
    """The SSIM of images without any variance is a number in its range."""
    flat = torch.full((1, 3, 16, 16), level)
    torch.testing.assert_close(pixel.ssim(flat, flat), torch.ones(1))
    assert -1 <= pixel.ssim(flat, 1 - flat).item() <= 1


@pytest.mark.parametrize("name", ALL)
def test_more_noise_is_a_worse_score(name):
    """Every measure gets worse as noise grows."""
    scores = ALL[name](*pair(32, 32)).tolist()
    assert scores == sorted(scores, reverse=name in ("psnr", "ssim"))


@pytest.mark.parametrize("name", ALL)
def test_images_are_scored_independently(name):
    """The score of an image does not depend on the other images of its batch."""
    images, others = pair()
    alone = torch.cat([ALL[name](images[i : i + 1], others[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(ALL[name](images, others), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_values_beyond_the_range_are_not_clamped(name):
    """Values outside of [0, 1] count as they are."""
    white, whiter = torch.ones(1, 3, 16, 16), torch.full((1, 3, 16, 16), 1.5)
    assert not torch.equal(ALL[name](white, whiter), ALL[name](white, whiter.clamp(0, 1)))


def test_ssim_window_shrinks_to_small_images():
    """The SSIM of images smaller than its window is finite, and 1 for identical ones."""
    images, others = pair(6, 9)
    scores = pixel.ssim(images, others)
    assert scores.shape == (5,)
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(pixel.ssim(images, images), torch.ones(5))
