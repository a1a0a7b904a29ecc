"""Continuous time against closed forms, and Euler's method against continuous time."""

import numpy as np
import pytest
import torch
from torch import nn

from nt_kernel import NumericalError
from optim import gradient_flow, woodbury_step
from tests.nt_kernel.cases import F64, mlp
from tests.reference import Dense, definite_metric, run

MODELS = {"identity": "identity", "definite": lambda y: 2 * torch.eye(2, dtype=F64).expand(*y.shape, 2)}


def velocity(model, x, a, **options):
    """θ̇ = −G⁻¹∇h for K stacked networks: the unit step of the pure function."""
    gradient = lambda y: (y - a) / a.shape[-2]  # noqa: E731

    def v(params):
        stepped = woodbury_step(model, params, x, gradient, lr=1.0, **options)
        return {n: stepped[n] - p for n, p in params.items()}

    return v


@pytest.mark.parametrize("metric", MODELS)
@pytest.mark.parametrize("scale", ["mean", "sum", "none"])
def test_a_linear_model_decays_as_the_matrix_exponential(scale, metric):
    """For a model linear in θ, G and H are constants of the motion: y(t) − a = exp(−Ht)(y(0) − a)."""
    torch.manual_seed(0)
    K, options = 2, {"scale": scale, "mass": 0.3, "output_metric": MODELS[metric]}
    model, x = nn.Linear(3, 2).to(F64), torch.randn(K, 4, 3, dtype=F64)
    params = {n: torch.stack([p.detach() * (k + 1) for k in range(K)]) for n, p in model.named_parameters()}
    a = torch.randn(K, 4, 2, dtype=F64)
    times = [0.0, 0.3, 1.0, 4.0]
    path = gradient_flow(velocity(model, x, a, **options), params, times)
    assert len(path) == len(times)
    for k in range(K):
        H = Dense(model, x[k], **options).H()
        start = (run(model, {n: p[k] for n, p in params.items()}, x[k]) - a[k]).flatten()
        for t, at in zip(times, path, strict=True):
            found = (run(model, {n: p[k] for n, p in at.items()}, x[k]) - a[k]).flatten()
            torch.testing.assert_close(found, torch.linalg.matrix_exp(-t * H) @ start, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{}, {"scale": "none"}, {"mass": 0.05}, {"output_metric": definite_metric}], ids=str
)
def test_euler_converges_to_the_flow_at_first_order(options):
    torch.manual_seed(0)
    model, x, a = mlp(3, 5, 2).to(F64), torch.randn(1, 4, 3, dtype=F64), torch.randn(1, 4, 2, dtype=F64)
    start = {n: p.detach()[None] for n, p in model.named_parameters()}
    end = gradient_flow(velocity(model, x, a, **options), start, [0.0, 1.0])[-1]
    counts, errors = [32, 64, 128], []
    for count in counts:
        params = start
        for _ in range(count):
            params = woodbury_step(model, params, x, lambda y: (y - a) / 4, lr=1 / count, **options)
        errors.append(sum((params[n] - end[n]).square().sum() for n in end).sqrt().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.05)
    # Richardson: two Euler runs, extrapolated, are much closer than either.
    assert errors[-1] > 1e-5


def test_the_rotation():
    """ẋ = ωy, ẏ = −ωx, over three turns; parameters of two shapes, in the order they were given."""
    turn = lambda p: {"b": -2 * p["a"][0], "a": 2 * p["b"][None]}  # noqa: E731
    start = {"b": torch.tensor([0.0], dtype=F64), "a": torch.tensor([[1.0]], dtype=F64)}
    times = np.linspace(0, 3 * np.pi, 5)
    for t, at in zip(times, gradient_flow(turn, start, times), strict=True):
        assert list(at) == ["b", "a"]
        assert at["a"].shape == (1, 1)
        assert at["a"].item() == pytest.approx(np.cos(2 * t), abs=1e-8)
        assert at["b"].item() == pytest.approx(-np.sin(2 * t), abs=1e-8)


def test_dtype_comes_back_and_the_start_is_untouched():
    start = {"w": torch.ones(2, dtype=torch.float32)}
    path = gradient_flow(lambda p: {"w": -p["w"]}, start, [0.0, 1.0], rtol=1e-6, atol=1e-8)
    assert path[-1]["w"].dtype == torch.float32
    assert torch.equal(path[0]["w"], torch.ones(2))
    assert torch.equal(start["w"], torch.ones(2))


def test_a_solution_that_escapes_is_a_numerical_error():
    with pytest.raises(NumericalError, match="gradient flow: the flow could not be integrated"):
        gradient_flow(lambda p: {"w": p["w"] ** 2}, {"w": torch.ones(1, dtype=F64)}, [0.0, 2.0])
