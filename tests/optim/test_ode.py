"""Differential equations as modules: the integrator against scipy, its derivatives against the variational equation."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from optim.riemannian.manifold import Manifold, positive
from optim.riemannian.module_step import metric_factors
from optim.riemannian.ode import ode_module, rk4
from tests.optim.modules import generator, normal
from tests.reference import F64


def pendulum(t, z, p):
    """θ̈ = −k sin θ − c θ̇ + cos t."""
    return torch.stack([z[:, 1], -p["k"] * z[:, 0].sin() - p["c"] * z[:, 1] + math.cos(t)], 1)


POINT = {"k": torch.tensor(2.0, dtype=F64), "c": torch.tensor(0.3, dtype=F64)}
TIMES = [0.5, 0.75, 2.0, 3.0]


def test_states_are_those_of_an_adaptive_solver():
    z = normal(generator(0), 3, 2)
    found = rk4(pendulum, z, POINT, TIMES, 0.01)
    assert found.shape == (3, 3, 2)
    for i, zi in enumerate(z):
        f = lambda t, s: pendulum(t, torch.as_tensor(s)[None], POINT)[0].numpy()  # noqa: E731
        exact = solve_ivp(f, (TIMES[0], TIMES[-1]), zi.numpy(), "DOP853", t_eval=TIMES[1:], rtol=1e-12, atol=1e-13)
        assert np.abs(exact.y.T - found[i].numpy()).max() < 1e-8


def test_fourth_order():
    """Halving the step divides the error by 16; ż = −z³ + cos t has every derivative."""
    f = lambda t, z, p: -(z**3) + math.cos(t)  # noqa: E731
    z = torch.full((1, 1), 0.7, dtype=F64)
    fine = rk4(f, z, {}, [0.0, 2.0], 1 / 400)
    errors = [(rk4(f, z, {}, [0.0, 2.0], 1 / k) - fine).abs().item() for k in (5, 10, 20)]
    for coarse, half in pairwise(errors):
        assert 12 < coarse / half < 20


@pytest.mark.parametrize(("max_step", "calls"), [(1.0, 4), (0.5, 8), (0.3, 16), (0.25, 16), (1 / 3, 12), (0.1, 40)])
def test_number_of_steps(max_step, calls):
    seen = []
    rk4(lambda t, z, p: seen.append(t) or z, torch.ones(1, 1), {}, [0.0, 1.0], max_step)
    assert len(seen) == calls
    assert max(seen) == pytest.approx(1.0)


def test_rounding_adds_no_step():
    """3·0.1 = 0.30000000000000004 is three steps of 0.1."""
    seen = []
    rk4(lambda t, z, p: seen.append(t) or z, torch.ones(1, 1), {}, [0.0, 3 * 0.1], 0.1)
    assert len(seen) == 12


def test_the_factor_solves_the_variational_equation():
    """∂z(t)/∂θ and ∂z(t)/∂z(0) as Ż = (∂f/∂z) Z + ∂f/∂θ, integrated beside the state by scipy."""
    module = ode_module(
        pendulum, Manifold((2,)), {"k": positive(()), "c": Manifold((), 1.0)}, TIMES, max_step=0.01, name="m"
    )
    z = normal(generator(1), 2, 2)
    point = {f"m.{n}": p for n, p in POINT.items()}
    K = metric_factors(module, z, point, torch.eye(6, dtype=F64).expand(2, 6, 6))["m"]  # [N, T·2, (k, c)]
    L_in = module.linearise(z, point)[1](torch.eye(6, dtype=F64).expand(2, 6, 6))[1]
    k, c = 2.0, 0.3

    def augmented(t, s):
        angle, speed, S = s[0], s[1], s[2:].reshape(2, 4)  # columns: ∂/∂k, ∂/∂c, ∂/∂z(0)
        A = np.array([[0, 1], [-k * np.cos(angle), -c]])
        B = np.array([[0, 0, 0, 0], [-np.sin(angle), -speed, 0, 0]])
        return np.concatenate([[speed, -k * np.sin(angle) - c * speed + np.cos(t)], (A @ S + B).ravel()])

    for i, zi in enumerate(z.numpy()):
        begin = np.concatenate([zi, np.array([[0, 0, 1, 0], [0, 0, 0, 1]]).ravel()])
        exact = solve_ivp(augmented, (TIMES[0], TIMES[-1]), begin, "DOP853", t_eval=TIMES[1:], rtol=1e-11, atol=1e-12)
        S = exact.y[2:].T.reshape(6, 4)  # [T·2, 4]
        assert np.abs(S[:, :2] - K[i].numpy()).max() < 1e-7
        assert np.abs(S[:, 2:] - L_in[i].numpy()).max() < 1e-7


def test_what_is_refused():
    space, f = Manifold((1,)), lambda t, z, p: z
    for times in ([0.0], [0.0, 0.0], [1.0, 0.5], [0.0, math.inf], [0.0, math.nan]):
        with pytest.raises(ValueError, match="times must be"):
            ode_module(f, space, {}, times, max_step=0.1)
    for step in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="max_step must be"):
            ode_module(f, space, {}, [0.0, 1.0], max_step=step)
    module = ode_module(f, space, {}, [0.0, 1.0], max_step=0.1, outputs=Manifold((1, 1), 2.0))
    assert module.outputs.mass == 2.0
