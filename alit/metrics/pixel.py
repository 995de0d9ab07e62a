"""Image distances, one number per image, for images in [0, 1].

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from alit.precision import upcast

Images = Float[Tensor, "B C H W"]
PerImage = Float[Tensor, "B"]

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def l1(images: Images, reconstructions: Images) -> PerImage:
    """Returns the mean absolute difference over channels and pixels."""
    return (reconstructions - images).abs().mean(dim=(1, 2, 3))


def mse(images: Images, reconstructions: Images) -> PerImage:
    """Returns the mean squared difference over channels and pixels."""
    return (reconstructions - images).square().mean(dim=(1, 2, 3))


def psnr(images: Images, reconstructions: Images) -> PerImage:
    """Returns the peak signal-to-noise ratio in dB for a peak of 1; infinite for equal images."""
    return -10 * torch.log10(mse(images, reconstructions))


def ssim(images: Images, reconstructions: Images) -> PerImage:
    """Returns the structural similarity (Wang et al. 2004), the mean over channels.

    The Gaussian window has 11 pixels and a sigma of 1.5; it shrinks to the image's side where that is smaller.
    """
    channels, size = images.shape[1], min(SSIM_WINDOW, *images.shape[2:])
    x, y = upcast(images), upcast(reconstructions)
    offsets = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2
    line = torch.softmax(-(offsets**2) / (2 * SSIM_SIGMA**2), dim=0)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(x, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))
