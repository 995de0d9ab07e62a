"""The Inception of FID is the published one's layout, and the distance is arithmetic that other ways confirm."""

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from alit.errors import AlitError, WeightsError
from alit.metrics.fid import InceptionFeatures, Moments, frechet_distance

pytestmark = pytest.mark.numeric

# -------------------------------------------------------------------- the published layout, by hand

Layer = tuple[str, int, int, int, int]
"""Name, channels in and out, kernel height and width."""


def block_5(name: str, i: int, pool: int) -> list[Layer]:
    return [
        (f"{name}.branch1x1", i, 64, 1, 1),
        (f"{name}.branch5x5_1", i, 48, 1, 1),
        (f"{name}.branch5x5_2", 48, 64, 5, 5),
        (f"{name}.branch3x3dbl_1", i, 64, 1, 1),
        (f"{name}.branch3x3dbl_2", 64, 96, 3, 3),
        (f"{name}.branch3x3dbl_3", 96, 96, 3, 3),
        (f"{name}.branch_pool", i, pool, 1, 1),
    ]


def block_6(name: str, n: int) -> list[Layer]:
    return [
        (f"{name}.branch1x1", 768, 192, 1, 1),
        (f"{name}.branch7x7_1", 768, n, 1, 1),
        (f"{name}.branch7x7_2", n, n, 1, 7),
        (f"{name}.branch7x7_3", n, 192, 7, 1),
        (f"{name}.branch7x7dbl_1", 768, n, 1, 1),
        (f"{name}.branch7x7dbl_2", n, n, 7, 1),
        (f"{name}.branch7x7dbl_3", n, n, 1, 7),
        (f"{name}.branch7x7dbl_4", n, n, 7, 1),
        (f"{name}.branch7x7dbl_5", n, 192, 1, 7),
        (f"{name}.branch_pool", 768, 192, 1, 1),
    ]


def block_7(name: str, i: int) -> list[Layer]:
    return [
        (f"{name}.branch1x1", i, 320, 1, 1),
        (f"{name}.branch3x3_1", i, 384, 1, 1),
        (f"{name}.branch3x3_2a", 384, 384, 1, 3),
        (f"{name}.branch3x3_2b", 384, 384, 3, 1),
        (f"{name}.branch3x3dbl_1", i, 448, 1, 1),
        (f"{name}.branch3x3dbl_2", 448, 384, 3, 3),
        (f"{name}.branch3x3dbl_3a", 384, 384, 1, 3),
        (f"{name}.branch3x3dbl_3b", 384, 384, 3, 1),
        (f"{name}.branch_pool", i, 192, 1, 1),
    ]


LAYERS: list[Layer] = [
    ("Conv2d_1a_3x3", 3, 32, 3, 3),
    ("Conv2d_2a_3x3", 32, 32, 3, 3),
    ("Conv2d_2b_3x3", 32, 64, 3, 3),
    ("Conv2d_3b_1x1", 64, 80, 1, 1),
    ("Conv2d_4a_3x3", 80, 192, 3, 3),
    *block_5("Mixed_5b", 192, 32),
    *block_5("Mixed_5c", 256, 64),
    *block_5("Mixed_5d", 288, 64),
    ("Mixed_6a.branch3x3", 288, 384, 3, 3),
    ("Mixed_6a.branch3x3dbl_1", 288, 64, 1, 1),
    ("Mixed_6a.branch3x3dbl_2", 64, 96, 3, 3),
    ("Mixed_6a.branch3x3dbl_3", 96, 96, 3, 3),
    *block_6("Mixed_6b", 128),
    *block_6("Mixed_6c", 160),
    *block_6("Mixed_6d", 160),
    *block_6("Mixed_6e", 192),
    ("Mixed_7a.branch3x3_1", 768, 192, 1, 1),
    ("Mixed_7a.branch3x3_2", 192, 320, 3, 3),
    ("Mixed_7a.branch7x7x3_1", 768, 192, 1, 1),
    ("Mixed_7a.branch7x7x3_2", 192, 192, 1, 7),
    ("Mixed_7a.branch7x7x3_3", 192, 192, 7, 1),
    ("Mixed_7a.branch7x7x3_4", 192, 192, 3, 3),
    *block_7("Mixed_7b", 1280),
    *block_7("Mixed_7c", 2048),
]


def inception_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights in pytorch-fid's layout, classifier and all."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, i, o, h, w in LAYERS:
        state[f"{name}.conv.weight"] = torch.randn(o, i, h, w, generator=generator) * (2 / (i * h * w)) ** 0.5
        state[f"{name}.bn.weight"] = 1 + 0.1 * torch.randn(o, generator=generator)
        state[f"{name}.bn.bias"] = 0.1 * torch.randn(o, generator=generator)
        state[f"{name}.bn.running_mean"] = 0.1 * torch.randn(o, generator=generator)
        state[f"{name}.bn.running_var"] = 0.5 + torch.rand(o, generator=generator)
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def resized_by_hand(images: Tensor, side: int = 299) -> Tensor:
    """Bilinear between pixel centres, edges repeated, no antialiasing."""

    def matrix(size: int) -> Tensor:
        position = ((torch.arange(side).double() + 0.5) * size / side - 0.5).clamp(0, size - 1)
        return (1 - (position.unsqueeze(1) - torch.arange(size)).abs()).clamp_min(0).float()

    return matrix(images.shape[2]) @ images @ matrix(images.shape[3]).T


def features_by_hand(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Every layer written out with torch's functions alone."""

    def unit(name: str, x: Tensor, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
        scale = state[f"{name}.bn.weight"] / (var + 0.001).sqrt()
        offset = state[f"{name}.bn.bias"] - mean * scale
        return (x * scale.view(-1, 1, 1) + offset.view(-1, 1, 1)).relu()

    def average(x: Tensor) -> Tensor:
        # sums by a convolution of ones, divided by how many pixels were under the window
        ones, alone = torch.ones(x.shape[1], 1, 3, 3), torch.ones(1, 1, *x.shape[2:])
        return F.conv2d(x, ones, padding=1, groups=x.shape[1]) / F.conv2d(alone, ones[:1], padding=1)

    x = 2 * resized_by_hand(images) - 1
    x = unit("Conv2d_1a_3x3", x, stride=2)
    x = unit("Conv2d_2a_3x3", x)
    x = F.max_pool2d(unit("Conv2d_2b_3x3", x, padding=1), 3, 2)
    x = unit("Conv2d_3b_1x1", x)
    x = F.max_pool2d(unit("Conv2d_4a_3x3", x), 3, 2)
    assert x.shape[1:] == (192, 35, 35)
    for b in ("Mixed_5b.", "Mixed_5c.", "Mixed_5d."):
        five = unit(b + "branch5x5_2", unit(b + "branch5x5_1", x), padding=2)
        double = unit(b + "branch3x3dbl_2", unit(b + "branch3x3dbl_1", x), padding=1)
        double = unit(b + "branch3x3dbl_3", double, padding=1)
        x = torch.cat([unit(b + "branch1x1", x), five, double, unit(b + "branch_pool", average(x))], 1)
    double = unit("Mixed_6a.branch3x3dbl_2", unit("Mixed_6a.branch3x3dbl_1", x), padding=1)
    double = unit("Mixed_6a.branch3x3dbl_3", double, stride=2)
    x = torch.cat([unit("Mixed_6a.branch3x3", x, stride=2), double, F.max_pool2d(x, 3, 2)], 1)
    assert x.shape[1:] == (768, 17, 17)
    for b in ("Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e."):
        seven = unit(b + "branch7x7_2", unit(b + "branch7x7_1", x), padding=(0, 3))
        seven = unit(b + "branch7x7_3", seven, padding=(3, 0))
        double = unit(b + "branch7x7dbl_1", x)
        for number, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            double = unit(f"{b}branch7x7dbl_{number}", double, padding=padding)
        x = torch.cat([unit(b + "branch1x1", x), seven, double, unit(b + "branch_pool", average(x))], 1)
    three = unit("Mixed_7a.branch3x3_2", unit("Mixed_7a.branch3x3_1", x), stride=2)
    seven = unit("Mixed_7a.branch7x7x3_2", unit("Mixed_7a.branch7x7x3_1", x), padding=(0, 3))
    seven = unit("Mixed_7a.branch7x7x3_4", unit("Mixed_7a.branch7x7x3_3", seven, padding=(3, 0)), stride=2)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    assert x.shape[1:] == (1280, 8, 8)
    for b in ("Mixed_7b.", "Mixed_7c."):
        pooled = average(x) if b == "Mixed_7b." else F.max_pool2d(x, 3, 1, 1)
        three = unit(b + "branch3x3_1", x)
        double = unit(b + "branch3x3dbl_2", unit(b + "branch3x3dbl_1", x), padding=1)
        forks = [
            unit(b + "branch3x3_2a", three, padding=(0, 1)),
            unit(b + "branch3x3_2b", three, padding=(1, 0)),
            unit(b + "branch3x3dbl_3a", double, padding=(0, 1)),
            unit(b + "branch3x3dbl_3b", double, padding=(1, 0)),
        ]
        x = torch.cat([unit(b + "branch1x1", x), *forks, unit(b + "branch_pool", pooled)], 1)
    return x.mean((2, 3))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return inception_state()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("published") / "pt_inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def inception(file) -> InceptionFeatures:
    return InceptionFeatures.from_file(file)


# -------------------------------------------------------------------- the network


def test_inception_has_the_published_parameters():
    """The network has as many parameters as the published one without its classifier."""
    by_hand = sum(i * o * h * w + 2 * o for _, i, o, h, w in LAYERS)
    assert len(LAYERS) == 94
    assert by_hand == 21_785_568
    assert sum(parameter.numel() for parameter in InceptionFeatures().parameters()) == by_hand


def test_inception_has_the_published_tensors(inception, state):
    """The tensors have the published names and shapes."""
    ours = {name: tensor.shape for name, tensor in inception.state_dict().items() if "num_batches" not in name}
    assert ours == {name: tensor.shape for name, tensor in state.items() if not name.startswith("fc.")}
    assert {
        "Conv2d_1a_3x3.conv.weight",
        "Mixed_5b.branch1x1.conv.weight",
        "Mixed_6a.branch3x3dbl_3.bn.running_var",
        "Mixed_6e.branch7x7dbl_5.bn.weight",
        "Mixed_7a.branch7x7x3_4.bn.bias",
        "Mixed_7c.branch3x3dbl_3b.conv.weight",
        "Mixed_7c.branch_pool.bn.running_mean",
    } <= ours.keys()


def test_inception_features_equal_those_by_hand(inception, state):
    """The features are those of every layer written out by hand."""
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(3))
    features, expected = inception(images), features_by_hand(state, images)
    assert features.shape == (2, 2048)
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3 * expected.max().item())


def test_inception_resizes_without_antialiasing(inception):
    """Images that are larger than the network's input are resized without antialiasing."""
    images = torch.rand(1, 3, 400, 310, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(inception(images), inception(resized_by_hand(images)), rtol=1e-3, atol=1e-3)


def test_inception_stays_frozen_inside_a_trained_module(inception):
    """The network is frozen and stays in eval mode as a part of a module in training."""
    outer = nn.Sequential(inception).train()
    assert not any(parameter.requires_grad for parameter in outer.parameters())
    assert not any(module.training for module in inception.modules())


def test_inception_ignores_training_counters(inception, state, tmp_path):
    """A file with the counters of batch norm gives the same network as one without."""
    counters = {f"{name}.bn.num_batches_tracked": torch.tensor(7) for name, *_ in LAYERS}
    torch.save(state | counters, tmp_path / "with.pth")
    loaded = InceptionFeatures.from_file(str(tmp_path / "with.pth")).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in inception.state_dict().items())


def test_inception_from_file_draws_no_random_numbers(file):
    """Loading leaves the global random state as it was."""
    before = torch.get_rng_state()
    InceptionFeatures.from_file(file)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Mixed_7c.branch_pool.bn.bias", None, r"no tensor 'Mixed_7c.branch_pool.bn.bias' of the shape \(192,\)"),
        ("Conv2d_1a_3x3.bn.bias", torch.zeros(3), r"'Conv2d_1a_3x3.bn.bias' of the shape \(3,\), not \(32,\)"),
        ("Mixed_8a.conv.weight", torch.zeros(3), "unknown entry 'Mixed_8a.conv.weight'"),
        ("AuxLogits.fc.bias", torch.zeros(1000), "unknown entry 'AuxLogits.fc.bias'"),
    ],
    ids=["missing", "shape", "surprise", "torchvision"],
)
def test_inception_refuses_other_files(state, tmp_path, name, value, message):
    """A file of another layout is refused with the first wrong tensor and the expected file."""
    changed = {key: tensor for key, tensor in (state | {name: value}).items() if tensor is not None}
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=rf"other\.pth' has.*{message}.*expected pytorch-fid's Inception weights"):
        InceptionFeatures.from_file(tmp_path / "other.pth")


# -------------------------------------------------------------------- moments


def drawn(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated features, each with a mean and a spread of its own."""
    generator = torch.Generator().manual_seed(seed)
    mixing, mean = torch.randn(width, width, generator=generator), torch.randn(width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixing + 3 * mean


def moments_of(features: Tensor) -> Moments:
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments


def given_moments(mean: np.ndarray, covariance: np.ndarray, count: int = 11) -> Moments:
    moments = Moments(len(mean))
    moments.count, moments.mean_D, moments.scatter_DD = count, mean, covariance * (count - 1)
    return moments


def test_moments_agree_with_numpy():
    """Count, mean and covariance agree with NumPy."""
    features = drawn(40, 6)
    moments = moments_of(features)
    assert moments.count == 40
    np.testing.assert_allclose(moments.mean_D, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features.double().numpy().T), rtol=1e-12)


@given(cuts=st.lists(st.integers(0, 30), max_size=6), workers=st.integers(1, 4))
def test_moments_merged_from_parts_are_those_of_the_whole(cuts, workers):
    """Moments that are added in parts and merged are those of all features at once."""
    features = drawn(30, 4)
    bounds = [0, *sorted(cuts), 30]
    parts = [Moments(4) for _ in range(workers)]
    for i, (start, stop) in enumerate(pairwise(bounds)):
        parts[i % workers].add(features[start:stop])
    total = Moments(4)
    for part in parts:
        total.merge(part)
    expected = moments_of(features)
    assert total.count == expected.count
    np.testing.assert_allclose(total.mean_D, expected.mean_D, rtol=1e-12)
    np.testing.assert_allclose(total.scatter_DD, expected.scatter_DD, rtol=1e-10, atol=1e-10)


def test_merge_leaves_the_other_moments_unchanged():
    """Merging changes one of both moments only."""
    other, total = moments_of(drawn(5, 3)), moments_of(drawn(7, 3, seed=1))
    before = pickle.dumps(other)
    empty = Moments(3)
    empty.merge(other)
    empty.add(drawn(4, 3))
    total.merge(other)
    total.add(drawn(4, 3))
    assert pickle.dumps(other) == before


def test_moments_are_exact_for_large_means():
    """The covariance is exact for features that are far from zero."""
    features = drawn(50, 5).double()
    far = Moments(5)
    for batch in (features + 2.0**30).split(7):
        far.add(batch)
    np.testing.assert_allclose(far.covariance, moments_of(features).covariance, rtol=1e-4)


def test_moments_survive_pickling():
    """Moments are the same after pickling."""
    moments = moments_of(drawn(9, 5))
    thawed = pickle.loads(pickle.dumps(moments))
    assert thawed.count == 9
    assert np.array_equal(thawed.mean_D, moments.mean_D)
    assert np.array_equal(thawed.scatter_DD, moments.scatter_DD)


def test_moments_of_half_precision_are_float64():
    """Features in half precision, with gradients, are counted in float64."""
    features = drawn(8, 3).bfloat16().requires_grad_()
    moments = moments_of(features)
    assert moments.mean_D.dtype == moments.scatter_DD.dtype == np.float64
    np.testing.assert_allclose(moments.mean_D, features.detach().double().numpy().mean(0), rtol=1e-12)


def test_moments_refuse_features_that_are_not_finite():
    """Features of NaN or infinity are refused with their number, and not counted."""
    moments = moments_of(drawn(4, 3))
    features = drawn(5, 3)
    features[1, 2], features[4, 0], features[4, 1] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(AlitError, match="2 images have features of NaN or infinity"):
        moments.add(features)
    assert moments.count == 4


def test_moments_refuse_features_of_another_width():
    """Features of another width are refused with both widths."""
    with pytest.raises(AlitError, match="of 3 and of 1 features"):
        moments_of(drawn(4, 3)).add(torch.zeros(2, 1))


# -------------------------------------------------------------------- the distance


def test_frechet_distance_agrees_with_scipy():
    """The distance agrees with SciPy's root of a matrix."""
    linalg = pytest.importorskip("scipy.linalg", reason="needs scipy, which scikit-image brings")
    a, b = moments_of(drawn(200, 24)), moments_of(drawn(300, 24, seed=1))
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean_D - b.mean_D) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_one_dimension():
    """In one dimension, the distance is that of the means and of the deviations."""
    a, b = given_moments(np.array([1.0]), np.array([[4.0]])), given_moments(np.array([4.0]), np.array([[25.0]]))
    assert frechet_distance(a, b) == pytest.approx(3.0**2 + (5.0 - 2.0) ** 2)


VARIANCES = {
    "both full": ([1.0, 4.0, 9.0, 0.25], [2.0, 1.0, 9.0, 16.0]),
    "one flat": ([1.0, 4.0, 0.0, 0.0], [2.0, 1.0, 9.0, 16.0]),
    "flat within flat": ([1.0, 0.0, 0.0, 0.0], [2.0, 1.0, 9.0, 0.0]),
    "nothing shared": ([1.0, 4.0, 0.0, 0.0], [0.0, 0.0, 9.0, 16.0]),
    "overlapping": ([1.0, 4.0, 5.0, 0.0], [0.0, 3.0, 9.0, 16.0]),
    "a point": ([0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 9.0, 16.0]),
    "two points": ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    "wide range": ([1e6, 1.0, 1e-6, 0.0], [1e-6, 1.0, 1e6, 0.0]),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", VARIANCES)
def test_frechet_distance_of_gaussians_with_the_same_axes(case, turned):
    """The distance of Gaussians with the same axes, flat ones among them, is that of the closed form."""
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0] if turned else np.eye(4)
    first, second = (np.array(variances) for variances in VARIANCES[case])
    shift = np.array([0.5, -1.0, 0.0, 2.0])
    a = given_moments(np.zeros(4), axes @ np.diag(first) @ axes.T)
    b = given_moments(shift, axes @ np.diag(second) @ axes.T)
    expected = 5.25 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("counts", [(2, 2), (6, 9), (9, 200), (63, 64)])
def test_frechet_distance_of_few_images(counts):
    """The distance is exact for fewer images than features."""
    first, second = drawn(counts[0], 64), drawn(counts[1], 64, seed=1)
    # the root's trace from the images themselves: the sum of singular values of their centred products
    x, y = (part.double().numpy() - part.double().numpy().mean(0) for part in (first, second))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((counts[0] - 1) * (counts[1] - 1))
    shift = (first.double().mean(0) - second.double().mean(0)).numpy()
    spread = (x**2).sum() / (counts[0] - 1) + (y**2).sum() / (counts[1] - 1)
    distance = frechet_distance(moments_of(first), moments_of(second))
    assert distance == pytest.approx(shift @ shift + spread - 2 * root, rel=1e-10)


@pytest.mark.parametrize("count", [2, 10, 500])
def test_frechet_distance_of_equal_moments_is_zero(count):
    """Equal moments are at a distance of zero, within rounding."""
    moments, again = moments_of(drawn(count, 48)), Moments(48)
    for batch in drawn(count, 48).split(3):
        again.add(batch)
    assert 0 <= frechet_distance(moments, again) < 1e-10 * np.trace(moments.covariance)


def test_frechet_distance_of_shifted_features():
    """Features that are shifted are at the square of their shift."""
    features, shift = drawn(30, 12), torch.arange(12.0)
    distance = frechet_distance(moments_of(features), moments_of(features + shift))
    assert distance == pytest.approx(shift.square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_frechet_distance_needs_two_images(count):
    """Fewer than two images on either side are refused with their number."""
    few, enough = moments_of(drawn(count, 3)), moments_of(drawn(5, 3))
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(AlitError, match=f"at least 2 images, got {count}"):
            frechet_distance(*pair)


def test_frechet_distance_refuses_other_widths():
    """Moments of different widths are refused with both widths."""
    with pytest.raises(AlitError, match="of 3 and of 4 features"):
        frechet_distance(moments_of(drawn(5, 3)), moments_of(drawn(5, 4)))
