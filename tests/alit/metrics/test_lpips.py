"""LPIPS is what its paper and its files' layout say, and weight files that do not fit are refused in words."""

import copy
import os
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from alit.errors import ConfigError, WeightsError
from alit.metrics.lpips import Perceptual, read_tensors

pytestmark = pytest.mark.numeric

WIDTHS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
"""Torchvision's numbers of VGG16's convolutions. Between them are ReLUs, and poolings where a number is left out."""

HEADS = {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}
"""LPIPS's heads, by the convolution whose ReLU they read."""


@cache
def vgg_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights in torchvision's layout; the classifier is one stand-in."""
    generator, state, channels = torch.Generator().manual_seed(seed), {}, 3
    for number, width in WIDTHS.items():
        weight = torch.randn(width, channels, 3, 3, generator=generator)
        state[f"features.{number}.weight"] = weight * (2 / (9 * channels)) ** 0.5
        state[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
        channels = width
    return state | {"classifier.6.bias": torch.zeros(1000)}


@cache
def heads_state(seed: int = 1) -> dict[str, Tensor]:
    """Random weights in the layout of LPIPS v0.1."""
    generator = torch.Generator().manual_seed(seed)
    return {f"lin{i}.model.1.weight": torch.rand(1, WIDTHS[n], 1, 1, generator=generator) for n, i in HEADS.items()}


def write(path: Path, state: object) -> Path:
    """Writes a file as its suffix says; `.pt` as PyTorch did before 1.6."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".pt")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("published")
    return write(folder / "vgg16.pth", vgg_state()), write(folder / "heads.pth", heads_state())


@pytest.fixture(scope="module")
def perceptual(files) -> Perceptual:
    return Perceptual.from_files(*files)


def pair(height: int = 32, width: int = 32, count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(count, 3, height, width, generator=generator)
    return images, images + 0.2 * torch.randn(images.shape, generator=generator)


def lpips_by_hand(images: Tensor, others: Tensor) -> Tensor:
    """LPIPS in float64, written down from the paper and the two state dicts."""
    vgg, heads = vgg_state(), heads_state()
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = torch.cat([images, others]).double() * 2 - 1
    x = (x - mean.double().view(1, 3, 1, 1)) / deviation.double().view(1, 3, 1, 1)
    total = torch.zeros(len(images), dtype=torch.float64)
    for number in WIDTHS:
        weight, bias = (vgg[f"features.{number}.{part}"].double() for part in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, padding=1).relu()
        if number in HEADS:
            unit = x / (x.pow(2).sum(1, keepdim=True) + 1e-30).sqrt()
            first, second = unit.split(len(images))
            head = heads[f"lin{HEADS[number]}.model.1.weight"].double()
            total = total + F.conv2d((first - second).pow(2), head).mean((1, 2, 3))
            x = F.max_pool2d(x, 2) if number < 28 else x
    return total


# -------------------------------------------------------------------- the distance


@pytest.mark.parametrize("size", [(16, 16), (40, 27)])
def test_lpips_and_its_gradient_equal_those_by_hand(perceptual, size):
    """The distance and its gradient are those of the paper, computed from the tensors of the files."""
    images, others = pair(*size)
    images, others = images.double(), others.double()
    ours, byhand = others.clone().requires_grad_(), others.clone().requires_grad_()
    distances, expected = copy.deepcopy(perceptual).double()(images, ours), lpips_by_hand(images, byhand)
    torch.testing.assert_close(distances, expected, rtol=1e-9, atol=1e-12)
    distances.sum().backward()
    expected.sum().backward()
    assert (ours.grad - byhand.grad).norm() < 1e-7 * byhand.grad.norm()


def test_lpips_is_zero_for_equal_images_and_symmetric(perceptual):
    """The distance is 0 for equal images, above 0 for others, and the same in both directions."""
    images, others = pair()
    assert torch.equal(perceptual(images, images), torch.zeros(2))
    assert (perceptual(images, others) > 0).all()
    torch.testing.assert_close(perceptual(images, others), perceptual(others, images))


def test_lpips_grows_with_noise(perceptual):
    """The distance grows with the strength of noise."""
    images, others = pair(count=1)
    strengths = torch.tensor([0.1, 0.3, 1.0]).view(-1, 1, 1, 1)
    distances = perceptual(images.expand(3, -1, -1, -1), images + strengths * (others - images)).tolist()
    assert distances == sorted(distances)


def test_lpips_scores_pairs_independently(perceptual):
    """The distance of a pair does not depend on the other pairs of its batch."""
    images, others = pair()
    alone = torch.cat([perceptual(images[i : i + 1], others[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(perceptual(images, others), alone)


def test_lpips_under_autocast_is_float32(perceptual):
    """Distances under autocast are float32, and within 5 % of those without."""
    images, others = pair()
    with torch.autocast("cpu", torch.bfloat16):
        distances = perceptual(images, others.bfloat16())
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances, perceptual(images, others), rtol=0.05, atol=0)


@pytest.mark.parametrize("last_alive", [-1, 2, 26])
def test_lpips_gradients_are_finite_without_features(perceptual, last_alive):
    """Gradients are finite where ReLUs leave no feature above zero."""
    dying = copy.deepcopy(perceptual)
    for number in WIDTHS:
        if number > last_alive:
            dying.features[number].bias.fill_(-1e4)
    images, others = pair(16, 16)
    others.requires_grad_()
    distances = dying(images, others)
    distances.sum().backward()
    assert distances.isfinite().all()
    assert others.grad.isfinite().all()


def test_lpips_gradients_of_equal_images_are_zero(perceptual):
    """Equal images have gradients of zero."""
    images, _ = pair()
    others = images.clone().requires_grad_()
    perceptual(images, others).sum().backward()
    assert torch.equal(others.grad, torch.zeros_like(images))


@pytest.mark.parametrize("size", [(15, 32), (32, 15), (1, 1)])
def test_lpips_refuses_images_below_16_pixels(perceptual, size):
    """Images that are too small for four poolings are refused with their size."""
    with pytest.raises(ConfigError, match=f"at least 16 pixels on each side.*got {size[0]}x{size[1]}"):
        perceptual(*pair(*size))


# -------------------------------------------------------------------- the module


def test_lpips_stays_frozen_inside_a_trained_module(perceptual):
    """The network is frozen and stays in eval mode as a part of a module in training."""
    outer = nn.Sequential(copy.deepcopy(perceptual)).train()
    assert not any(parameter.requires_grad for parameter in outer.parameters())
    assert not any(module.training for module in outer[0].modules())
    assert not any(parameter.requires_grad for parameter in Perceptual().parameters())
    assert not Perceptual().training


def test_lpips_gives_gradients_to_reconstructions(perceptual):
    """The reconstructions receive gradients, the images and the network do not."""
    images, others = pair()
    others.requires_grad_()
    perceptual(images, others).sum().backward()
    assert (others.grad.abs().amax((1, 2, 3)) > 0).all()
    assert images.grad is None
    assert all(parameter.grad is None for parameter in perceptual.parameters())


def test_lpips_random_weights_follow_the_seed():
    """The same seed gives the same random network, whose distances are above 0."""
    networks = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            networks.append(Perceptual())
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (networks[0](*pair()) > 0).all()


def test_lpips_has_thirteen_convolutions_and_five_heads():
    """The network has the parameters of VGG16's thirteen convolutions and of five heads."""
    ins = [3, *WIDTHS.values()][:-1]
    convolutions = sum(9 * i * o + o for i, o in zip(ins, WIDTHS.values(), strict=True))
    assert convolutions == 14_714_688
    heads = 64 + 128 + 256 + 512 + 512
    assert sum(parameter.numel() for parameter in Perceptual().parameters()) == convolutions + heads


# -------------------------------------------------------------------- the files


def test_lpips_from_files_draws_no_random_numbers(files):
    """Loading leaves the global random state as it was."""
    before = torch.get_rng_state()
    Perceptual.from_files(*files)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_lpips_loads_every_container(perceptual, tmp_path, suffix):
    """The same weights in any of the file formats give the same network."""
    vgg, heads = write(tmp_path / f"vgg{suffix}", vgg_state()), write(tmp_path / f"heads{suffix}", heads_state())
    loaded = Perceptual.from_files(str(vgg), str(heads)).state_dict()
    assert loaded.keys() == perceptual.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in perceptual.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_read_tensors_copies_the_file(tmp_path, suffix):
    """A file that is overwritten after it was read changes no tensor."""
    path = write(tmp_path / f"a{suffix}", {"a": torch.arange(5000.0)})
    tensors = read_tensors(path, {"a": (5000,)}, expected="a file")
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(tensors["a"], torch.arange(5000.0))


def test_read_tensors_converts_to_float32(tmp_path):
    """Tensors in half precision are read as float32."""
    path = write(tmp_path / "a.pth", {"a": torch.tensor([0.5]).half()})
    tensors = read_tensors(path, {"a": (1,)}, expected="a file")
    assert tensors["a"].dtype == torch.float32
    assert tensors["a"].item() == 0.5


def changed(state: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in (state | {name: value}).items() if tensor is not None}


VGG_FAULTS = {
    "missing": ("features.28.bias", None, r"no tensor 'features.28.bias' of the shape \(512,\)"),
    "gray": (
        "features.0.weight",
        torch.zeros(64, 1, 3, 3),
        r"'features.0.weight' of the shape \(64, 1, 3, 3\), not \(64, 3, 3, 3\)",
    ),
    "deeper": ("features.30.weight", torch.zeros(512, 512, 3, 3), "unknown entry 'features.30.weight'"),
}
HEADS_FAULTS = {
    "missing": ("lin4.model.1.weight", None, r"no tensor 'lin4.model.1.weight' of the shape \(1, 512, 1, 1\)"),
    "alex": (
        "lin1.model.1.weight",
        torch.zeros(1, 192, 1, 1),
        r"'lin1.model.1.weight' of the shape \(1, 192, 1, 1\), not \(1, 128, 1, 1\)",
    ),
    "surprise": ("lin5.model.1.weight", torch.zeros(1, 512, 1, 1), "unknown entry 'lin5.model.1.weight'"),
    "broken": ("lin0.model.1.weight", torch.full((1, 64, 1, 1), torch.nan), "NaN or infinity .*'lin0.model.1.weight'"),
    "integers": ("lin0.model.1.weight", torch.zeros(1, 64, 1, 1, dtype=torch.long), "no plain floats"),
    "sparse": ("lin0.model.1.weight", torch.zeros(1, 64, 1, 1).to_sparse(), "no plain floats"),
    "meta": ("lin0.model.1.weight", torch.zeros(1, 64, 1, 1, device="meta"), "no plain floats"),
}


@pytest.mark.parametrize("fault", VGG_FAULTS)
def test_lpips_refuses_other_vgg_files(files, tmp_path, fault):
    """A VGG file of another layout is refused with the first wrong tensor and the expected file."""
    name, value, message = VGG_FAULTS[fault]
    path = write(tmp_path / "other.pth", changed(vgg_state(), name, value))
    with pytest.raises(WeightsError, match=rf"other\.pth' has.*{message}.*expected torchvision's VGG16"):
        Perceptual.from_files(path, files[1])


@pytest.mark.parametrize("fault", HEADS_FAULTS)
def test_lpips_refuses_other_heads_files(files, tmp_path, fault):
    """A file of heads of another layout is refused with the first wrong tensor and the expected file."""
    name, value, message = HEADS_FAULTS[fault]
    path = write(tmp_path / "other.pth", changed(heads_state(), name, value))
    with pytest.raises(WeightsError, match=rf"other\.pth' has.*{message}.*the VGG heads of LPIPS"):
        Perceptual.from_files(files[0], path)


def test_lpips_refuses_swapped_files(files):
    """Both files in the wrong order are refused."""
    with pytest.raises(WeightsError, match=r"heads\.pth' has no tensor 'features\.0\.weight'"):
        Perceptual.from_files(files[1], files[0])


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 40, 0.5, 0.99])
def test_read_tensors_refuses_truncated_files(tmp_path, suffix, kept):
    """A file that ends too early is refused as damaged, whatever its format."""
    path = write(tmp_path / f"heads{suffix}", heads_state())
    size = path.stat().st_size
    os.truncate(path, int(size * kept) if isinstance(kept, float) else kept)
    with pytest.raises(WeightsError, match=r"is damaged or holds something other than tensors.*expected a file"):
        read_tensors(path, {}, expected="a file")


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors", "."])
def test_read_tensors_refuses_unreadable_files(tmp_path, name):
    """A file that cannot be opened is refused with the system's reason."""
    with pytest.raises(WeightsError, match=r"cannot be read \((No such file|Is a directory).*expected a file"):
        read_tensors(tmp_path / name, {}, expected="a file")


def test_read_tensors_refuses_other_objects(tmp_path):
    """A file that holds something other than a state dict is refused with its type."""
    with pytest.raises(WeightsError, match="holds a list, not a state dict; expected a file"):
        read_tensors(write(tmp_path / "list.pth", [torch.zeros(1)]), {}, expected="a file")


class Runs:
    """Pickles to a call that makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl"])
def test_read_tensors_executes_no_code(tmp_path, suffix):
    """A pickle that would run code is refused without running it."""
    path = tmp_path / f"heads{suffix}"
    state = heads_state() | {"lin5.model.1.weight": Runs(tmp_path / "made")}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(state))
    else:
        write(path, state)
    with pytest.raises(WeightsError, match="nothing in it was run"):
        read_tensors(path, {}, expected="a file")
    assert not (tmp_path / "made").exists()
