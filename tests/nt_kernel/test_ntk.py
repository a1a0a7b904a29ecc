"""What holds of H whatever the network: symmetry, definiteness, sums, limits; and ξ where λ_min is exactly known."""

from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nt_kernel import NumericalError, generalized_ntk
from nt_kernel.metric.layer_metric import rate_limit, scale_factor
from nt_kernel.metric.output_metric import resolve_output_metric
from tests.nt_kernel.cases import CASES, F64, frozen, mlp
from tests.reference import definite_metric, singular_metric

getcontext().prec = 60
ACTIVATIONS = [nn.Tanh, nn.ReLU, nn.Sigmoid]


@st.composite
def networks(draw):
    """(model, x): small MLPs of every shape, with inputs of every size."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    widths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    model = mlp(*widths, bias=draw(st.booleans()), activation=draw(st.sampled_from(ACTIVATIONS))).to(F64)
    x = torch.randn(draw(st.integers(1, 5)), widths[0], dtype=F64) * 10.0 ** draw(st.integers(-2, 2))
    return model, x


def options(draw, outputs):
    metrics = ["identity", definite_metric, singular_metric] + ["cross_entropy"] * (outputs > 1)
    return {
        "mass": 10.0 ** draw(st.integers(-3, 3)),
        "scale": draw(st.sampled_from(["mean", "sum", "none"])),
        "output_metric": draw(st.sampled_from(metrics)),
        "blocks": draw(st.sampled_from(["layer", "network"])),
    }


def ntk_scale(model, x, chosen):
    """‖K‖ of the whole network, the size that rounding starts from."""
    return torch.linalg.matrix_norm(generalized_ntk(model, x, mass=chosen["mass"], scale="none").matrix).item()


@given(networks(), st.data())
def test_symmetric_definite_and_the_sum_of_its_layers(network, data):
    model, x = network
    chosen = options(data.draw, model(x).shape[1])
    ntk = generalized_ntk(model, x, **chosen)
    H = ntk.matrix
    assert (H - H.T).norm() <= ntk.error
    assert ntk.eigenvalues()[0] >= -ntk.error
    assert torch.equal(H, sum(ntk.layers.values()))
    parts = sum(torch.linalg.eigvalsh((R + R.T) / 2)[0].item() for R in ntk.layers.values())
    assert ntk.eigenvalues()[0].item() >= parts - ntk.error  # ξ ≥ Σ_α ξ_α
    assert 0 <= ntk.xi <= max(0.0, ntk.eigenvalues()[0].item())
    metric, c = resolve_output_metric(chosen["output_metric"]), scale_factor(chosen["scale"], len(x))
    limit = rate_limit(len(ntk.layers), len(x), c, metric, ntk.outputs)
    assert ntk.eigenvalues()[-1].item() <= limit * (1 + 1e-9) + ntk.error
    if chosen["output_metric"] == "identity":  # the radius is of use: far below what H can be
        assert ntk.error <= 1e-12 * max(1.0, ntk.eigenvalues()[-1].item(), ntk_scale(model, x, chosen))


@given(networks(), st.integers(-8, 8))
def test_gradient_descent_is_inverse_in_the_mass(network, power):
    model, x = network
    base = generalized_ntk(model, x, scale="none").matrix
    found = generalized_ntk(model, x, scale="none", mass=2.0**power).matrix
    torch.testing.assert_close(found, base / 2.0**power, rtol=1e-14, atol=0)


@given(networks())
def test_a_permutation_of_the_samples_permutes_H(network):
    model, x = network
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    H, other = generalized_ntk(model, x, mass=0.1), generalized_ntk(model, x[order], mass=0.1).matrix
    p = H.outputs.shape[1]
    rows = (order[:, None] * p + torch.arange(p)).flatten()
    torch.testing.assert_close(other, H.matrix[rows][:, rows], rtol=1e-9, atol=H.error)


def exact_lambda_min(x: torch.Tensor, mass: float, c: float, layers: int, m: float = 1.0) -> Decimal:
    """λ_min(H) in 60 digits for two inputs in the plane and a linear network that multiplies by 1, then by 2.

    K_α = XXᵀ·g/μ with g = 1 (last layer) and g = 4 (first), so every K_α has the eigenvectors of XXᵀ, and H the
    eigenvalues Σ_α λ_α/(1 + c·m·λ_α)/2.
    """
    (a, b), (d, e) = ([Decimal(v) for v in row] for row in x.tolist())
    trace, det = a * a + b * b + d * d + e * e, (a * e - b * d) ** 2
    low = 2 * det / (trace + (trace * trace - 4 * det).sqrt())
    total = Decimal(0)
    for gain in [1, 4][:layers]:
        own = gain * low / Decimal(mass)
        total += own / (1 + Decimal(c) * Decimal(m) * own)
    return total / 2


@given(
    st.integers(0, 40),
    st.floats(0.5, 1),
    st.integers(-10, 10),
    st.sampled_from(["mean", "sum", "none"]),
    st.integers(1, 2),
    st.booleans(),
)
def test_xi_is_below_the_true_smallest_eigenvalue(power, mantissa, log_mass, scale, layers, weighted):
    """Two nearly equal inputs: λ_min falls through the rounding level of H, and ξ must let go in time."""
    x = torch.tensor([[1.0, 0.0], [1.0, mantissa * 2.0**-power]], dtype=F64)
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(layers - 1)], nn.Linear(2, 1, bias=False)).to(
        F64
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2, dtype=F64)[: model[0].out_features])
        if layers == 2:
            model[1].weight.copy_(torch.tensor([[2.0, 0.0]]))
    mass, m = 2.0**log_mass, 3.0 if weighted else 1.0
    metric = (lambda y: torch.full((2, 1, 1), m)) if weighted else "identity"
    ntk = generalized_ntk(model, x, mass=mass, scale=scale, output_metric=metric)
    true = exact_lambda_min(x, mass, scale_factor(scale, 2), layers, m)
    assert Decimal(ntk.xi) <= true
    if true > 10 * Decimal(ntk.error):
        assert Decimal(ntk.xi) >= Decimal("0.8") * true
    if power > 30:
        assert ntk.xi == 0.0


def duplicated_rows():
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=F64)
    x[3] = x[1]
    return mlp(3, 8, 2).to(F64), x


def nearly_duplicated_rows():
    model, x = duplicated_rows()
    x[3] += 1e-9
    return model, x


def affinely_dependent_rows():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=F64)
    x[2] = 0.3 * x[0] + 0.7 * x[1]
    return nn.Linear(4, 2).to(F64), x


def fewer_parameters_than_outputs():
    torch.manual_seed(0)
    return mlp(2, 2, 1).to(F64), torch.randn(10, 2, dtype=F64)


def biases_only():
    model, x, _ = CASES["biases only"].make()
    return model, x


def a_zero_row_without_biases():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=F64)
    x[1] = 0
    return mlp(4, 6, 1, bias=False).to(F64), x


def dead_units():
    torch.manual_seed(0)
    model, x = mlp(3, 4, 2, activation=nn.ReLU).to(F64), torch.randn(3, 3, dtype=F64)
    model[0].bias.data.fill_(-1e3)
    return model, x


DEFICIENT = [
    duplicated_rows,
    nearly_duplicated_rows,
    affinely_dependent_rows,
    fewer_parameters_than_outputs,
    biases_only,
    a_zero_row_without_biases,
    dead_units,
]


@pytest.mark.parametrize("scale", ["mean", "sum", "none"])
@pytest.mark.parametrize("make", DEFICIENT)
def test_xi_is_zero_for_a_kernel_without_full_rank(make, scale):
    model, x = make()
    metrics = ["identity", definite_metric, singular_metric] + ["cross_entropy"] * (model(x).shape[1] > 1)
    for metric in metrics:
        for mass in (1e-6, 1e-3, 1.0, 1e3):
            # A user's metric grows with the outputs: beyond ‖cMK‖ = 1e16 there is no Cholesky factor left to compute.
            for size in (1.0, 1e3) if isinstance(metric, str) else (1.0,):
                ntk = generalized_ntk(model, size * x, mass=mass, scale=scale, output_metric=metric)
                assert ntk.xi == 0.0, (metric, mass, size, ntk.eigenvalues()[:2], ntk.error)


@pytest.mark.parametrize("scale", ["mean", "sum", "none"])
@pytest.mark.parametrize("metric", ["identity", "cross_entropy", definite_metric, singular_metric])
def test_xi_is_positive_where_the_rank_is_full(metric, scale):
    torch.manual_seed(0)
    model, x = mlp(6, 20, 20, 3).to(F64), torch.randn(5, 6, dtype=F64)
    for mass in (1e-3, 1.0, 1e3):
        ntk = generalized_ntk(model, x, mass=mass, scale=scale, output_metric=metric)
        assert 0 < ntk.xi <= ntk.eigenvalues()[0]
        assert ntk.xi > 0.99 * ntk.eigenvalues()[0]


def test_one_frozen_layer_leaves_the_kernel_of_the_others():
    model, x, _ = CASES["mlp"].make()
    whole = generalized_ntk(model, x, scale="none")
    rest = generalized_ntk(frozen(model, "2.weight", "2.bias"), x, scale="none")
    torch.testing.assert_close(rest.matrix, whole.matrix - whole.layers["2"], rtol=0, atol=1e-14)


def test_nan_after_the_plan_was_made():
    model, x, _ = CASES["mlp"].make()
    generalized_ntk(model, x)
    x[2, 1] = float("nan")
    for scale in ("mean", "none"):
        with pytest.raises(
            ValueError, match="x must be finite; it holds NaN or inf in 1 of 4 samples, first in sample 2"
        ):
            generalized_ntk(model, x, scale=scale)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="output is not finite at sample 0"):
        generalized_ntk(model, torch.ones(4, 3, dtype=F64), scale="none")
