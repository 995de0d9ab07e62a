"""Criteria: what parses, what each score means, and at which length an image stops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALLEST
from torch import Tensor

from alit.encoding.criteria import HELP, Candidate, Criterion, criterion_name, parse
from alit.errors import CriterionError
from alit.model.base import BaseTokens
from alit.model.config import AlitConfig, KLConfig
from alit.tokenizer import Alit

pytestmark = pytest.mark.numeric

KL = AlitConfig(
    base=KLConfig(channels=(32, 32), blocks=1, latent_dim=4), image_size=8, width=16, depth=1, heads=2, iterations=4
)
NAMES = ("l1", "mse", "psnr", "ssim", "code", "latent")


def candidate(count: int = 3) -> Candidate:
    """Images of which nothing was computed yet."""
    images = torch.zeros(count, 3, 8, 8)
    base = BaseTokens(
        torch.zeros(count, 4, 4, 4), torch.zeros(count, 4, 4, 4), torch.zeros(count, 16, dtype=torch.long)
    )

    def never(*_: Tensor) -> Tensor:
        raise AssertionError("nothing of this was asked for")

    return Candidate(images, base, predict=never, to_latents=never, to_pixels=never)


def sentence(spec: str, **options: bool) -> str:
    with pytest.raises(CriterionError) as error:
        parse(spec, **options)
    return str(error.value)


# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("spec", "threshold"),
    [
        ("l1:0.05", 0.05),
        ("l1:0", 0),
        ("l1:1", 1),
        ("mse:1e-3", 0.001),
        ("psnr:24.5", 24.5),
        ("psnr:100", 100),
        ("ssim:-1", -1),
        ("ssim:.9", 0.9),
        ("code:0.25", 0.25),
        ("latent:1000", 1000),
    ],
)
def test_parse_reads_name_and_threshold(spec, threshold):
    """`parse` reads a measure's name, its threshold and its direction."""
    criterion = parse(spec)
    assert (criterion.spec, criterion.threshold, criterion.length) == (spec, threshold, None)
    assert criterion.higher_is_better == spec.startswith(("psnr", "ssim"))


@pytest.mark.parametrize("length", [1, 64, 256])
def test_parse_reads_fixed_length(length):
    """`parse` reads a fixed length, which has no measure, threshold or score."""
    criterion = parse(f"fixed:{length}")
    assert (criterion.length, criterion.measure) == (length, None)
    assert math.isnan(criterion.threshold)
    assert criterion.score(candidate()) is None


def test_parse_normalizes_spaces_and_leading_zeros():
    """`parse` accepts surrounding spaces and leading zeros, and leaves them out of the stored text."""
    assert parse("  l1: 0.05 \n").spec == "l1:0.05"
    assert parse("fixed:064").spec == "fixed:64"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", "has no ':'"),
        ("l1", "has no ':'"),
        ("l1 0.05", "has no ':'"),
        (":0.05", "is not known"),
        ("L1:0.05", "is not known"),
        ("lpips:0.3", "is not known"),
        ("l1:", "the threshold must be a number, got ''"),
        ("l1:low", "the threshold must be a number, got 'low'"),
        ("l1:0,05", "the threshold must be a number, got '0,05'"),
        ("l1:0.05:1", "the threshold must be a number, got '0.05:1'"),
        ("l1:0.05@1", "the threshold must be a number, got '0.05@1'"),
        ("l1:-0.01", "the threshold must lie from 0 to 1, got -0.01"),
        ("l1:13", "the threshold must lie from 0 to 1, got 13"),
        ("mse:1.01", "the threshold must lie from 0 to 1, got 1.01"),
        ("code:25", "the threshold must lie from 0 to 1, got 25"),
        ("psnr:-1", "the threshold must lie from 0 to 100, got -1"),
        ("ssim:1.5", "the threshold must lie from -1 to 1, got 1.5"),
        ("latent:-1", "the threshold must lie from 0 to inf, got -1"),
        ("latent:inf", "the threshold must lie from 0 to inf, got inf"),
        ("l1:nan", "the threshold must lie from 0 to 1, got nan"),
        ("fixed:", "fixed takes a token count such as fixed:64, got ''"),
        ("fixed:0", "fixed takes a token count such as fixed:64, got '0'"),
        ("fixed:-32", "fixed takes a token count such as fixed:64, got '-32'"),
        ("fixed:32.0", "fixed takes a token count such as fixed:64, got '32.0'"),
        ("fixed:all", "fixed takes a token count such as fixed:64, got 'all'"),
        ("fixed:٣٢", "fixed takes a token count such as fixed:64, got '٣٢'"),
        ("fixed:" + "9" * 5000, "fixed takes a token count such as fixed:64"),
    ],
)
def test_parse_error_quotes_the_text(spec, expected):
    """The error for a text that does not parse quotes it and states the cause."""
    said = sentence(spec)
    assert repr(spec) in said
    assert expected in said


@pytest.mark.parametrize("spec", ["", "l1", "lpips:0.3", ":0.05"])
def test_parse_error_lists_known_criteria(spec):
    """The error for an unknown criterion lists all known ones."""
    assert HELP in sentence(spec)
    assert all(f"{name}:" in HELP for name in ("fixed", *NAMES))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="l1psnrfixed:@.-+eE0123456789 _\n", max_size=20) | st.text(max_size=20))
def test_parse_accepts_or_quotes_any_text(spec):
    """Any text either parses to a criterion whose own text parses to the same, or raises an error that quotes it."""
    try:
        criterion = parse(spec, functions=False)
    except CriterionError:
        assert repr(spec) in sentence(spec, functions=False)
        return
    again = parse(criterion.spec, functions=False)
    assert again.spec == criterion.spec
    assert (again.length, again.measure) == (criterion.length, criterion.measure)
    assert again.threshold == criterion.threshold or criterion.length is not None


# ---------------------------------------------------------------- users' functions


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A user's module, alit_user_criteria."""
    (tmp_path / "alit_user_criteria.py").write_text(
        "import torch\n"
        "number = 5\n"
        "def brightness(candidate): return candidate.images.double().mean((1, 2, 3))\n"
        "def count(candidate): return torch.arange(len(candidate.images))\n"
        "def scalar(candidate): return torch.tensor(0.5)\n"
        "def column(candidate): return torch.zeros(len(candidate.images), 1)\n"
        "def too_few(candidate): return torch.zeros(len(candidate.images) - 1)\n"
        "def a_list(candidate): return [0.0] * len(candidate.images)\n"
        "def nothing(candidate): return None\n"
        "def broken(candidate): return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize("function", ["brightness", "count"])
def test_user_function_scores_in_float32_lower_is_better(function):
    """A user's function gives float32 scores, of which lower ones are better."""
    spec = f"alit_user_criteria:{function}@-1.5"
    criterion = parse(f" {spec} ")
    assert (criterion.spec, criterion.threshold, criterion.higher_is_better) == (spec, -1.5, False)
    score = criterion.score(candidate())
    assert score is not None
    assert (score.dtype, score.shape) == (torch.float32, (3,))


@pytest.mark.usefixtures("user_module")
def test_user_function_failure_names_function_and_cause():
    """The error of a user's function that fails names the function and the cause."""
    with pytest.raises(CriterionError, match="alit_user_criteria:broken@1' failed: ZeroDivisionError"):
        parse("alit_user_criteria:broken@1").score(candidate())


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("function", "got"),
    [("scalar", "()"), ("column", "(3, 1)"), ("too_few", "(2,)"), ("a_list", "list"), ("nothing", "NoneType")],
)
def test_user_function_must_return_one_number_per_image(function, got):
    """A user's function that does not return one number per image raises an error that describes what it returned."""
    spec = f"alit_user_criteria:{function}@1"
    with pytest.raises(CriterionError) as error:
        parse(spec).score(candidate())
    assert f"criterion {spec!r} must return one number per image, a tensor of shape (3,), got {got}" in str(error.value)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("alit_user_criteria:missing@1", "has no attribute 'missing'"),
        ("alit_user_criteria:number@1", "alit_user_criteria:number is not a function"),
        ("alit_user_criteria:brightness@", "the threshold must be a number, got ''"),
        ("alit_user_criteria:brightness@inf", "the threshold must lie from -inf to inf, got inf"),
        ("alit_user_criteria:brightness", "is not known"),
        ("no_such_module_of_alit:f@1", "No module named 'no_such_module_of_alit'"),
        (":f@1", "cannot be loaded"),
        (".relative:f@1", "cannot be loaded"),
    ],
)
def test_parse_rejects_function_that_cannot_be_loaded(spec, expected):
    """`parse` rejects a user's function that cannot be loaded, and states the cause."""
    said = sentence(spec)
    assert repr(spec) in said
    assert expected in said


def test_parse_without_functions_imports_nothing(tmp_path, monkeypatch):
    """`parse` imports no module where users' functions are not allowed."""
    (tmp_path / "alit_unwanted.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "is not known" in sentence("alit_unwanted:f@1", functions=False)


# ---------------------------------------------------------------- what a model can follow


@pytest.mark.parametrize("length", SMALLEST.lengths)
def test_check_accepts_every_length_of_the_model(length):
    """`check` accepts every length of the model."""
    parse(f"fixed:{length}").check(SMALLEST)


@pytest.mark.parametrize("length", [1, 3, 9, 10])
def test_check_rejects_length_and_lists_valid_ones(length):
    """`check` rejects a length that the model lacks, and lists the lengths that it has."""
    with pytest.raises(CriterionError, match=f"'fixed:{length}': this model gives 2, 4, 6, 8 tokens, not {length}"):
        parse(f"fixed:{length}").check(SMALLEST)


def test_check_code_requires_discrete_base():
    """`check` accepts `code` for a discrete base and rejects it for a continuous one."""
    parse("code:0.5").check(SMALLEST)
    with pytest.raises(CriterionError, match=r"'code:0.5' needs a discrete base; use latent:T"):
        parse("code:0.5").check(KL)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"code"}))
def test_check_accepts_other_measures_for_continuous_base(name):
    """`check` accepts every measure except `code` for a continuous base."""
    parse(f"{name}:0.5").check(KL)


# ---------------------------------------------------------------- what satisfies


@pytest.mark.parametrize("name", NAMES)
def test_satisfied_includes_the_threshold(name):
    """Errors satisfy at or below the threshold, and similarities at or above it."""
    threshold = np.float32(0.3)
    below, above = np.nextafter(threshold, np.float32(-9)), np.nextafter(threshold, np.float32(9))
    scores = torch.tensor([below, threshold, above])
    expected = [False, True, True] if name in ("psnr", "ssim") else [True, True, False]
    assert parse(f"{name}:0.3").satisfied(scores).tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_satisfied_is_false_for_nan(name):
    """A score of NaN satisfies no criterion."""
    assert not parse(f"{name}:0.3").satisfied(torch.full((2,), torch.nan)).any()


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.sampled_from(NAMES))
def test_satisfied_compares_in_float32(threshold, name):
    """A score that equals the threshold in float32 satisfies it, wherever float64 would place it."""
    assert parse(f"{name}:{threshold!r}").satisfied(torch.tensor([threshold], dtype=torch.float32)).all()


# ---------------------------------------------------------------- where an image stops

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 0.5, 1.0])
MODEL: list[Alit] = []


def tiny_model() -> Alit:
    if not MODEL:
        torch.manual_seed(0)
        MODEL.append(Alit(SMALLEST).eval())
    return MODEL[0]


def from_table(table: list[list[float]], threshold: float, higher_is_better: bool) -> Criterion:
    """A criterion whose scores are given: image i, told by its brightness i / 255, scores table[i][k] at length k."""
    calls = iter(range(SMALLEST.iterations))

    def measure(given: Candidate) -> Tensor:
        k = next(calls)
        return torch.tensor([table[round(255 * image.max().item())][k] for image in given.images])

    return Criterion(spec="table", threshold=threshold, measure=measure, higher_is_better=higher_is_better)


def numbered(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(FLOATS, min_size=4, max_size=4), min_size=1, max_size=6),
    st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, 0.5]),
    st.booleans(),
)
def test_encode_stops_at_first_satisfied_length_or_longest(table, threshold, higher):
    """Each image stops at the first length that satisfies the criterion, or else at the longest."""
    encoded = tiny_model().encode(numbered(len(table)), from_table(table, threshold, higher))
    for i, scores in enumerate(table):
        good = [(score >= threshold if higher else score <= threshold) for score in scores]  # False for NaN
        chosen = good.index(True) if True in good else 3
        assert encoded.num_tokens[i] == SMALLEST.lengths[chosen]
        assert encoded.satisfied[i] == any(good)
        assert encoded.tried[i] == chosen + 1
        expected = np.array(scores[: chosen + 1] + [math.nan] * (3 - chosen), np.float32)
        np.testing.assert_array_equal(encoded.trace[i].numpy(), expected)
        np.testing.assert_array_equal(encoded.score[i].numpy(), expected[chosen])


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=6),
    st.floats(0, 1, width=32),
    st.floats(0, 1, width=32),
)
def test_encode_never_shortens_under_stricter_threshold(table, one, other):
    """A stricter threshold never gives an image fewer tokens."""
    lengths = [
        tiny_model().encode(numbered(len(table)), from_table(table, t, False)).num_tokens for t in sorted((one, other))
    ]
    assert (lengths[0] >= lengths[1]).all()


@pytest.mark.parametrize("length", SMALLEST.lengths)
def test_encode_fixed_is_satisfied_without_score(length):
    """`fixed:N` is satisfied for every image and records no scores."""
    encoded = tiny_model().encode(numbered(3), f"fixed:{length}")
    assert encoded.num_tokens.tolist() == [length] * 3
    assert encoded.satisfied.all()
    assert encoded.score.isnan().all()
    assert encoded.trace.isnan().all()
    assert not encoded.tried.any()


def test_encode_uses_criterion_of_config_by_default():
    """`encode` without a criterion uses that of the model's config."""
    model, images = tiny_model(), numbered(3)
    default, named = model.encode(images), model.encode(images, SMALLEST.criterion)
    assert torch.equal(default.tokens, named.tokens)
    torch.testing.assert_close(default.trace, named.trace, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("spec", "name"), [("fixed:64", "fixed"), ("l1:0.07", "l1"), ("a.module:measure@0.5", "a.module")]
)
def test_criterion_name_imports_nothing(spec: str, name: str) -> None:
    """The name of a stored criterion is the text before the colon, even where the module does not exist."""
    assert criterion_name(spec) == name


def test_name_and_is_fixed_describe_a_parsed_criterion() -> None:
    """A criterion has the name of its measure, and only `fixed` is fixed."""
    assert (parse("fixed:8").name, parse("fixed:8").is_fixed) == ("fixed", True)
    assert (parse(" psnr:30").name, parse("psnr:30").is_fixed) == ("psnr", False)
