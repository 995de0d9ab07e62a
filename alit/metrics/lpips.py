"""LPIPS with VGG16 (Zhang et al. 2018, arXiv 1801.03924), and safe reading of published weight files.

Nothing is downloaded: the caller provides both files. Pickles are read without executing code.

Shapes: B batch, C channels, H W pixels, h w positions of a feature map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from alit.errors import ConfigError, WeightsError
from alit.precision import upcast

CONVOLUTIONS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions, by stage; stages are separated by max pooling."""

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""ImageNet's channel means and standard deviations for images in [-1, 1], rounded as in LPIPS v0.1."""

EPSILON = 1e-10
SMALLEST_SIDE = 2 ** (len(CONVOLUTIONS) - 1)

VGG_FILE = "torchvision's VGG16 state dict (vgg16-397923af.pth)"
HEADS_FILE = "the VGG heads of LPIPS v0.1 (lpips/weights/v0.1/vgg.pth)"


class Perceptual(nn.Module):
    """LPIPS v0.1 with VGG16, a perceptual distance between images.

    Its parameters are frozen and it stays in eval mode. It must not be an attribute of the trained model, whose state
    dict would include it; a training objective holds it.

    `Perceptual()` has random weights, useful for tests only; see `from_files`.
    """

    shift_C11: Tensor
    scale_C11: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        head_after: dict[int, int] = {}
        channels = 3
        for stage, widths in enumerate(CONVOLUTIONS):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            head_after[len(layers) - 1] = stage
        self.features = nn.Sequential(*layers)  # the same names as torchvision's
        self.head_after = head_after
        self.heads = nn.ParameterList(torch.rand(1, widths[-1], 1, 1) for widths in CONVOLUTIONS)
        # on the CPU even where `from_files` builds on meta, as no file stores them
        self.register_buffer("shift_C11", torch.tensor(SHIFT, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("scale_C11", torch.tensor(SCALE, device="cpu").view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_files(cls, vgg: Path | str, heads: Path | str) -> Perceptual:
        """Loads the published weights, as `.pth`, `.pt` or `.safetensors`.

        Args:
            vgg: Torchvision's VGG16 state dict; its classifier is not read.
            heads: The five heads of LPIPS v0.1 for VGG16, `lin0.model.1.weight` to `lin4.model.1.weight`.

        Raises:
            WeightsError: A file is missing, damaged, would run code or has another layout; the message names it.
        """
        with torch.device("meta"):  # draws no random numbers
            network = cls()
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        published = {f"heads.{i}": f"lin{i}.model.1.weight" for i in range(len(CONVOLUTIONS))}
        trunk = {name: shape for name, shape in shapes.items() if name not in published}
        state = read_tensors(vgg, trunk, expected=VGG_FILE, ignored=r"classifier\.")
        read = read_tensors(heads, {published[name]: shapes[name] for name in published}, expected=HEADS_FILE)
        state |= {name: read[published[name]] for name in published}
        network.load_state_dict(state, assign=True)
        return network

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in eval mode, also as a submodule of a module in training."""
        return super().train(False)

    def forward(
        self, images: Float[Tensor, "B 3 H W"], reconstructions: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B"]:
        """Returns the distance of each pair: 0 for equal images, up to about 1 with the published weights.

        Args:
            images: In [0, 1], at least 16 pixels on each side.
            reconstructions: Likewise; they receive gradients.

        Returns:
            One distance per pair, in fp32, also under autocast.

        Raises:
            ConfigError: The images are too small.
        """
        height, width = images.shape[2:]
        if min(height, width) < SMALLEST_SIDE:
            raise ConfigError(
                f"LPIPS needs images of at least {SMALLEST_SIDE} pixels on each side, because it halves them "
                f"{len(CONVOLUTIONS) - 1} times; got {height}x{width}"
            )
        x_BChw, y_BChw = self._scaled(images), self._scaled(reconstructions)
        distance_B = x_BChw.new_zeros(len(images))
        for index, layer in enumerate(self.features):
            x_BChw, y_BChw = layer(x_BChw), layer(y_BChw)
            if index in self.head_after:
                squared_BChw = (_normalized(x_BChw) - _normalized(y_BChw)).square()
                weighted_BChw = self.heads[self.head_after[index]] * squared_BChw
                distance_B = distance_B + weighted_BChw.sum(dim=1).mean(dim=(1, 2))
        return distance_B

    def _scaled(self, images_BCHW: Tensor) -> Tensor:
        return (2 * upcast(images_BCHW) - 1 - self.shift_C11) / self.scale_C11


def _normalized(features_BChw: Tensor) -> Tensor:
    """Normalises each position's features to length 1, in fp32; zeros stay zeros."""
    features_BChw = upcast(features_BChw)
    return features_BChw / (torch.linalg.vector_norm(features_BChw, dim=1, keepdim=True) + EPSILON)


# -------------------------------------------------------------------- the files


def read_tensors(
    path: Path | str, shapes: Mapping[str, tuple[int, ...]], *, expected: str, ignored: str | None = None
) -> dict[str, Tensor]:
    """Reads named tensors from a published state dict file.

    Args:
        path: A file written by any version of `torch.save`, or a `.safetensors` file. No code in it is executed.
        shapes: The shape of every tensor to read, by name.
        expected: A description of the correct file, for error messages.
        ignored: A regular expression that matches the start of the names to skip.

    Returns:
        Copies in fp32 on the CPU, by name.

    Raises:
        WeightsError: The file cannot be read, or a tensor is missing, unknown, of another shape or not finite.
    """
    state = _load_state(Path(path), expected)
    tensors = {}
    for name, shape in shapes.items():
        if name not in state:
            raise WeightsError(f"{str(path)!r} has no tensor {name!r} of the shape {shape}; expected {expected}")
        tensor = state[name]
        if not _is_plain(tensor):
            raise WeightsError(f"{str(path)!r} has no plain floats at {name!r}; expected {expected}")
        if tuple(tensor.shape) != shape:
            raise WeightsError(
                f"{str(path)!r} has a tensor {name!r} of the shape {tuple(tensor.shape)}, not {shape}; "
                f"expected {expected}"
            )
        # a copy, as reading a mapped file that is truncated later would crash the process
        tensors[name] = tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not tensors[name].isfinite().all():
            raise WeightsError(f"{str(path)!r} has NaN or infinity in its tensor {name!r}; download {expected} again")
    for name in state:
        if name not in shapes and not (ignored and re.match(ignored, str(name))):
            raise WeightsError(f"{str(path)!r} has an unknown entry {name!r}; expected {expected}")
    return tensors


def _is_plain(value: object) -> bool:
    """Returns whether a value is a dense floating-point tensor on the CPU."""
    if not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and value.is_floating_point()


def _load_state(path: Path, expected: str) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
    except OSError as error:
        raise WeightsError(f"{str(path)!r} cannot be read ({error.strerror}); expected {expected}") from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # memory-mapped, so that unused tensors are never read; files from before PyTorch 1.6 are not zip files
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can make either reader fail in any way
        raise WeightsError(
            f"{str(path)!r} is damaged or holds something other than tensors ({type(error).__name__}); nothing in it "
            f"was run; expected {expected}"
        ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{str(path)!r} holds a {type(loaded).__name__}, not a state dict; expected {expected}")
    return loaded
