"""Fisher matrices: the exact ones against the sum over all labels, the sampled ones against their mean and spread."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nt_kernel.metric.output_metric import resolve_output_metric, sampled_fisher
from tests.reference import identity_matrix, softmax_matrix

F64 = torch.float64
SHORT = {"categorical": "fisher_categorical", "bernoulli": "fisher_bernoulli", "gaussian": "fisher_gaussian"}


def labels(likelihood: str, y):
    """(log p(label | y), ∇_y log p) of every label, by autograd of torch's own distributions; y [C]."""
    if likelihood == "categorical":
        every = torch.arange(len(y))
        log_p = lambda y, k: torch.distributions.Categorical(logits=y, validate_args=False).log_prob(k)  # noqa: E731
    else:
        every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(y))), dtype=F64)
        log_p = lambda y, b: -torch.nn.functional.binary_cross_entropy_with_logits(y, b, reduction="sum")  # noqa: E731
    return [(log_p(y, label), torch.func.grad(log_p)(y, label)) for label in every]


def moments(likelihood: str, y):
    """Mean and variance of every entry of one draw's ssᵀ, [C, C] each: the dense Fisher sums."""
    outer = [(log_p.exp(), score[:, None] * score[None, :]) for log_p, score in labels(likelihood, y)]
    mean = sum(p * m for p, m in outer)
    return mean, sum(p * m.square() for p, m in outer) - mean.square()


@given(st.sampled_from(["categorical", "bernoulli"]), st.integers(1, 6), st.floats(0, 30), st.integers(0, 1000))
def test_the_exact_fisher_matrix_is_the_sum_over_labels(likelihood, C, size, seed):
    torch.manual_seed(seed)
    C = max(C, 2) if likelihood == "categorical" else C
    y = torch.randn(2, C, dtype=F64) * size / 3
    L = resolve_output_metric(SHORT[likelihood]).factor(y)
    expected = torch.stack([moments(likelihood, one)[0] for one in y])
    torch.testing.assert_close(L.mT @ L, expected, rtol=1e-11, atol=1e-13)


def test_the_gaussian_fisher_matrix_is_the_identity():
    assert resolve_output_metric("fisher_gaussian").factor(torch.randn(3, 2)) is None


@pytest.mark.parametrize("likelihood", SHORT)
def test_the_sampled_fisher_matrix_is_unbiased_with_the_spread_of_its_draws(likelihood):
    """Every entry of the mean of 4000·4 draws within 5 of its own standard errors, which the dense sums give."""
    torch.manual_seed(0)
    y, seeds, q = torch.randn(2, 3, dtype=F64), 4000, 4
    factors = torch.stack([sampled_fisher(likelihood, q, seed).factor(y) for seed in range(seeds)])  # [seeds, N, q, C]
    found = factors.mT @ factors
    if likelihood == "gaussian":
        mean, variance = identity_matrix(y), 1 + identity_matrix(y)  # of g_i g_j: 2 on the diagonal, 1 off it
    else:
        mean, variance = (torch.stack(m) for m in zip(*(moments(likelihood, one) for one in y), strict=True))
    band = 5 * (variance / (seeds * q)).sqrt() + 1e-14
    assert (found.mean(0) - mean).abs().le(band).all()
    # and the spread over seeds is that of q independent draws, so the draws of one call are independent
    spread = found.var(0)
    assert (spread * q / variance - 1)[variance > 1e-3].abs().max() < 0.25


@pytest.mark.parametrize("likelihood", SHORT)
def test_the_error_falls_as_one_over_the_root_of_the_probes(likelihood):
    torch.manual_seed(1)
    y = torch.randn(1, 4, dtype=F64)
    exact = resolve_output_metric(SHORT[likelihood]).factor(y)
    M = identity_matrix(y) if exact is None else exact.mT @ exact
    errors = {}
    for q in (4, 64, 1024):
        factors = torch.stack([sampled_fisher(likelihood, q, seed).factor(y) for seed in range(300)])
        errors[q] = (factors.mT @ factors - M).square().sum((-2, -1)).mean().sqrt().item()
    for q in (
        64,
        1024,
    ):  # a factor 4 in the probes' root each time; 300 seeds know the mean square to 10 per cent or so
        assert errors[4] / errors[q] == pytest.approx(math.sqrt(q / 4), rel=0.2)


def test_many_probes_are_the_exact_matrix():
    y = torch.tensor([[2.0, 0.0, -1.0]], dtype=F64)
    L = sampled_fisher("categorical", probes=200_000).factor(y)
    torch.testing.assert_close(L.mT @ L, softmax_matrix(y), rtol=0, atol=5 * 0.5 / math.sqrt(200_000))


def test_equal_logits_are_drawn_equally_however_large():
    """At 1e18 the noise is below one rounding of the logits: they are compared with the largest first."""
    y = torch.full((1, 2), 1e18, dtype=F64)
    drawn = (0.5 - sampled_fisher("categorical", probes=1000).factor(y) * 1000**0.5).round()
    assert abs(drawn[..., 0].mean().item() - 0.5) < 5 * 0.5 / math.sqrt(1000)


@given(st.sampled_from(sorted(SHORT)), st.integers(2, 12), st.integers(1, 5), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_rows_are_scores_of_labels_that_can_be(likelihood, C, q, shift, seed):
    torch.manual_seed(seed)
    y = torch.randn(4, C, dtype=F64) * 100
    y[:, seed % C] += shift
    rows = sampled_fisher(likelihood, q, seed).factor(y) * q**0.5
    assert rows.shape == (4, q, C)
    assert torch.isfinite(rows).all()
    if likelihood == "categorical":
        s = y.softmax(-1)[:, None]
        drawn = (s - rows).round()
        assert torch.equal(drawn.sum(-1), torch.ones(4, q, dtype=F64))
        assert (s.expand_as(drawn)[drawn == 1] > 1e-15).all()  # 4·5 draws do not find what has probability 1e-15
    if likelihood == "bernoulli":
        s = y.sigmoid()[:, None].expand_as(rows)
        assert torch.where((rows - s).abs() < 1e-12, (-y).sigmoid()[:, None] > 1e-15, s > 1e-15).all()


@pytest.mark.parametrize("likelihood", SHORT)
def test_the_same_outputs_have_the_same_factor(likelihood):
    """Whatever was drawn in between; rows and stacked networks share their draws; no global stream is touched."""
    torch.manual_seed(0)
    y, metric = torch.randn(3, 20, 4, dtype=F64), sampled_fisher(likelihood, 3, seed=7)
    state = torch.get_rng_state()
    L = metric.factor(y)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert torch.equal(L, metric.factor(y))
    assert torch.equal(L, sampled_fisher(likelihood, 3, seed=7).factor(y))
    assert not torch.equal(L, sampled_fisher(likelihood, 3, seed=8).factor(y))
    for n in (1, 2, 7, 19):
        torch.testing.assert_close(metric.factor(y[:, :n]), L[:, :n], rtol=1e-15, atol=1e-16)
        torch.testing.assert_close(metric.factor(y[1, :n]), L[1, :n], rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize("likelihood", SHORT)
def test_float32_draws_the_same_labels(likelihood):
    y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    L = sampled_fisher(likelihood).factor(y)
    assert L.dtype == torch.float32
    torch.testing.assert_close(L, sampled_fisher(likelihood).factor(y.double()).float())


def test_a_device_has_the_same_factor(device):
    y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    L = sampled_fisher().factor(y.to(device))
    assert L.device.type == device
    torch.testing.assert_close(L.cpu(), sampled_fisher().factor(y), rtol=1e-14, atol=1e-15)


REFUSED = {
    "likelihood": (("categorial",), r"unknown likelihood 'categorial'.*did you mean 'categorical'\?"),
    "no probes": (("gaussian", 0), "integer probes ≥ 1, got 0"),
    "half a probe": (("gaussian", 1.5), r"integer probes ≥ 1, got 1\.5"),
    "probes true": (("gaussian", True), "integer probes ≥ 1, got True"),
    "negative seed": (("gaussian", 1, -1), "integer seed ≥ 0, got -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        sampled_fisher(*arguments)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match=r"needs at least 2 outputs.*likelihood='bernoulli'"):
        sampled_fisher("categorical").factor(torch.zeros(4, 1))
