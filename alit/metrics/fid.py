"""Fréchet Inception distance (Heusel et al. 2017, arXiv 1706.08500): network, moments and distance.

Shapes: B batch, H W pixels, h w positions of a feature map, C channels, D feature width, R rank of a covariance.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor, nn

from alit.errors import AlitError
from alit.metrics.lpips import read_tensors

FEATURES = 2048
SIDE = 299
"""The side of the network's training images, in pixels; all images are resized to it."""

INCEPTION_FILE = "pytorch-fid's Inception weights (pt_inception-2015-12-05-6726825d.pth)"

# -------------------------------------------------------------------- the network


Kernel = int | tuple[int, int]


class _Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: Kernel, *, stride: int = 1, padding: int | str = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BChw)), inplace=True)


class _Conv(NamedTuple):
    """A convolution of a branch, which keeps the size of the feature map unless `halve` is set.

    Attributes:
        width: The number of output channels.
        kernel: The kernel size.
        halve: Use a stride of 2, without padding.
        fork: Two convolutions end the branch side by side: a row of three, and a column of three.
    """

    width: int
    kernel: Kernel = 1
    halve: bool = False
    fork: bool = False


class _Mixed(nn.Module):
    """Parallel branches, concatenated; the last one pools, followed by a convolution where it has a width.

    Convolutions have the published names: the branch's, their number if it has several, and a letter if it forks.
    """

    def __init__(self, channels: int, pool: nn.Module, pool_width: int | None, **branches: list[_Conv]) -> None:
        super().__init__()
        self.paths: list[list[list[str]]] = []
        for branch, convs in branches.items():
            path, incoming = [], channels
            for number, (width, kernel, halve, fork) in enumerate(convs, start=1):
                stem = f"{branch}_{number}" if len(convs) > 1 else branch
                kernels = {f"{stem}a": (1, 3), f"{stem}b": (3, 1)} if fork else {stem: kernel}
                stride, padding = (2, 0) if halve else (1, "same")
                for name, size in kernels.items():
                    self.add_module(name, _Unit(incoming, width, size, stride=stride, padding=padding))
                path.append(list(kernels))
                incoming = width
            self.paths.append(path)
        self.pool = pool
        self.branch_pool = nn.Identity() if pool_width is None else _Unit(channels, pool_width, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        outputs = []
        for path in self.paths:
            ends = [x_BChw]
            for names in path:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            outputs += ends
        return torch.cat([*outputs, self.branch_pool(self.pool(x_BChw))], dim=1)


def _average() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _mixed_5(channels: int, pool_width: int) -> _Mixed:
    """Builds Mixed_5b to 5d, for maps of 35x35."""
    five, threes = [_Conv(48), _Conv(64, 5)], [_Conv(64), _Conv(96, 3), _Conv(96, 3)]
    return _Mixed(channels, _average(), pool_width, branch1x1=[_Conv(64)], branch5x5=five, branch3x3dbl=threes)


def _mixed_6(narrow: int) -> _Mixed:
    """Builds Mixed_6b to 6e, for maps of 17x17, with 7x7 kernels factorized into a row and a column."""
    row, column = _Conv(narrow, (1, 7)), _Conv(narrow, (7, 1))
    seven = [_Conv(narrow), row, _Conv(192, (7, 1))]
    sevens = [_Conv(narrow), column, row, column, _Conv(192, (1, 7))]
    return _Mixed(768, _average(), 192, branch1x1=[_Conv(192)], branch7x7=seven, branch7x7dbl=sevens)


def _mixed_7(channels: int, pool: nn.Module) -> _Mixed:
    """Builds Mixed_7b and 7c, for maps of 8x8."""
    three, threes = [_Conv(384), _Conv(384, fork=True)], [_Conv(448), _Conv(384, 3), _Conv(384, fork=True)]
    return _Mixed(channels, pool, 192, branch1x1=[_Conv(320)], branch3x3=three, branch3x3dbl=threes)


def _mixed_6a() -> _Mixed:
    """Builds Mixed_6a, from maps of 35x35 to 17x17."""
    three, threes = [_Conv(384, 3, halve=True)], [_Conv(64), _Conv(96, 3), _Conv(96, 3, halve=True)]
    return _Mixed(288, nn.MaxPool2d(3, stride=2), None, branch3x3=three, branch3x3dbl=threes)


def _mixed_7a() -> _Mixed:
    """Builds Mixed_7a, from maps of 17x17 to 8x8."""
    three = [_Conv(192), _Conv(320, 3, halve=True)]
    seven = [_Conv(192), _Conv(192, (1, 7)), _Conv(192, (7, 1)), _Conv(192, 3, halve=True)]
    return _Mixed(768, nn.MaxPool2d(3, stride=2), None, branch3x3=three, branch7x7x3=seven)


class InceptionFeatures(nn.Module):
    """The InceptionV3 of TensorFlow (2015) that FID is defined by, up to its 2048 pooled features.

    It differs from torchvision's: average pooling excludes the padding, and the last block uses max pooling. Its
    parameters are frozen and it stays in eval mode. `InceptionFeatures()` has random weights, useful for tests only;
    see `from_file`.
    """

    def __init__(self) -> None:
        super().__init__()
        # named as in the published file
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3, padding=1)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = _mixed_5(192, pool_width=32)
        self.Mixed_5c = _mixed_5(256, pool_width=64)
        self.Mixed_5d = _mixed_5(288, pool_width=64)
        self.Mixed_6a = _mixed_6a()
        self.Mixed_6b = _mixed_6(narrow=128)
        self.Mixed_6c = _mixed_6(narrow=160)
        self.Mixed_6d = _mixed_6(narrow=160)
        self.Mixed_6e = _mixed_6(narrow=192)
        self.Mixed_7a = _mixed_7a()
        self.Mixed_7b = _mixed_7(1280, _average())
        self.Mixed_7c = _mixed_7(FEATURES, nn.MaxPool2d(3, stride=1, padding=1))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_file(cls, path: Path | str) -> InceptionFeatures:
        """Loads the published weights, as `.pth`, `.pt` or `.safetensors`; the classifier is not read.

        Raises:
            WeightsError: The file is missing, damaged, would run code or has another layout; the message names it.
                Torchvision's weights, whose scores would not be comparable, are refused because of their `AuxLogits`.
        """
        with torch.device("meta"):  # draws no random numbers
            network = cls()
        counters = ".num_batches_tracked"  # only training uses them, and older files have none
        shapes = {name: tuple(t.shape) for name, t in network.state_dict().items() if not name.endswith(counters)}
        ignored = rf"fc\.|.*\{counters}$"
        network.load_state_dict(read_tensors(path, shapes, expected=INCEPTION_FILE, ignored=ignored), assign=True)
        return network

    def train(self, mode: bool = True) -> InceptionFeatures:
        """Stays in eval mode, also as a submodule of a module in training."""
        return super().train(False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2048"]:
        """Returns the features of each image.

        Args:
            images: In [0, 1], of any size. Published scores use images rounded to 8 bits: clamp and round first.

        Returns:
            Non-negative features, in fp32 outside autocast.
        """
        resized_BCHW = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x_BChw = 2 * resized_BCHW - 1
        for layer in self.children():
            x_BChw = layer(x_BChw)
        return x_BChw.mean(dim=(2, 3))


# -------------------------------------------------------------------- moments and distance


class Moments:
    """Count, mean and scatter of features, accumulated over batches and merged between workers.

    The result does not depend on the division into batches except for rounding (Chan et al. 1983). It can be pickled.

    Args:
        width: The width of the features.

    Attributes:
        count: The number of images.
        mean_D: The mean of their features, in float64.
        scatter_DD: The sum of outer products of deviations from the mean, in float64.
    """

    def __init__(self, width: int = FEATURES) -> None:
        self.count = 0
        self.mean_D = np.zeros(width)
        self.scatter_DD = np.zeros((width, width))

    def add(self, features_BD: Float[Tensor, "B D"]) -> None:
        """Adds a batch, which may be empty.

        Raises:
            AlitError: The features have another width, or are not finite.
        """
        values_BD = features_BD.detach().cpu().double().numpy()
        if not np.isfinite(values_BD).all():
            raise AlitError(f"{int((~np.isfinite(values_BD)).any(1).sum())} images have features of NaN or infinity")
        batch = Moments(values_BD.shape[1])
        if len(values_BD):
            batch.count = len(values_BD)
            batch.mean_D = values_BD.mean(axis=0)
            deviations_BD = values_BD - batch.mean_D
            batch.scatter_DD = deviations_BD.T @ deviations_BD
        self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Adds the images of other moments.

        Raises:
            AlitError: The other moments have another width.
        """
        _require_same_width(self, other)
        if not other.count:
            return
        count = self.count + other.count
        shift_D = other.mean_D - self.mean_D
        between = self.count * other.count / count
        self.scatter_DD = self.scatter_DD + other.scatter_DD + between * np.outer(shift_D, shift_D)
        self.mean_D = self.mean_D + shift_D * (other.count / count)
        self.count = count

    @property
    def covariance(self) -> Float64[np.ndarray, "D D"]:
        """The unbiased covariance.

        Raises:
            AlitError: There are fewer than two images.
        """
        if self.count < 2:
            raise AlitError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter_DD / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Returns the squared Fréchet distance of the Gaussians with these moments, the FID (Heusel et al. 2017, eq. 6).

    Covariances may be rank-deficient, as with fewer images than features. The distance grows as the number of images
    falls: compare only scores over equally many images.

    Returns:
        At least 0; 0 for equal moments, except for rounding.

    Raises:
        AlitError: One of them has fewer than two images, or their widths differ.
    """
    _require_same_width(a, b)
    # With A = P'P and B = Q'Q, the eigenvalues of AB are the squared singular values of PQ'. This avoids square roots
    # of small eigenvalues, in which a rounding error of 1e-16 would grow to 1e-8.
    singular_R = np.linalg.svd(_factor(a.covariance) @ _factor(b.covariance).T, compute_uv=False)
    shift_D = a.mean_D - b.mean_D
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * singular_R.sum()
    return max(0.0, float(shift_D @ shift_D + spread))


def _factor(covariance_DD: Float64[np.ndarray, "D D"]) -> Float64[np.ndarray, "R D"]:
    """Returns P with P'P equal to the covariance, with as many rows as its rank."""
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    kept = values_D > values_D.max() * len(values_D) * np.finfo(np.float64).eps
    return np.sqrt(values_D[kept])[:, None] * vectors_DD[:, kept].T


def _require_same_width(a: Moments, b: Moments) -> None:
    if len(a.mean_D) != len(b.mean_D):
        raise AlitError(f"moments of {len(a.mean_D)} and of {len(b.mean_D)} features cannot be combined")
