"""Inner systems by conjugate gradients: steps, budgets and verdicts against Cholesky's."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nt_kernel import LayerMetric, NumericalError, layer_factors
from nt_kernel.factors import join_factors, stacked_layer_factors
from nt_kernel.metric.cg_system import TOLERANCE, ConjugateGradientSystem
from nt_kernel.metric.cost_model import too_slow
from nt_kernel.metric.inner import InnerSystem, Solve
from nt_kernel.metric.layer_metric import inner_system, model_mass, resolve_blocks, scale_factor, step_system
from nt_kernel.metric.output_metric import resolve_output_metric
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.reference import Dense, definite_metric, distance, singular_metric, trainable

METRICS = ["identity", "cross_entropy", definite_metric, singular_metric]


def systems(factor, y, scale, metric, mass, **options):
    c, metric = scale_factor(scale, len(y)), resolve_output_metric(metric)
    masses = factor.resolved_mass(mass)
    exact = inner_system(factor, len(y), masses, c, metric, y)[0]
    return exact, ConjugateGradientSystem(factor, len(y), masses, c, metric, y, **options)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["mlp", "frozen biases", "biases only", "tokens, pairs", "layer norm", "root linear"])
def test_conjugate_gradients_agree_with_cholesky(name, metric):
    model, x, _ = CASES[name].make()
    y, factors = layer_factors(model, x)
    torch.manual_seed(1)
    r = torch.randn_like(y)
    for factor in [*factors.values(), join_factors(factors)]:
        for scale in ("mean", "sum", "none"):
            exact, cg = systems(factor, y, scale, metric, 0.1)
            size = 1 + (exact.c * exact.gram.norm().item())
            for verb in ("dual", "woodbury"):
                expected, found = getattr(exact, verb)(r), getattr(cg, verb)(r)
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-12 * size * r.norm().item())
                if scale == "none":
                    assert cg.last == Solve("none")
                    continue
                assert cg.last.solver == "cg"
                assert cg.last.residual <= TOLERANCE[F64]


@pytest.mark.parametrize("mass", [1.0, 1e-2])
def test_the_step_is_as_close_in_the_metric_as_the_residual(mass):
    """‖δθ − G⁻¹g‖_G ≤ ‖b − Su‖/√c, in float32 against the dense step in float64."""
    torch.manual_seed(0)
    model, x = mlp(4, 20, 20, 3).to(F64), torch.randn(12, 4, dtype=F64)
    dense = Dense(model, x, mass=mass)
    r = torch.randn(12, 3, dtype=F64)
    exact = dense.solve(dense.pull(r))
    y, factors = layer_factors(model.float(), x.float())
    for name, factor in factors.items():
        masses = factor.resolved_mass(mass)
        cg = ConjugateGradientSystem(factor, 12, masses, 1 / 12, resolve_output_metric("identity"), y)
        v = cg.dual(r.float())
        assert cg.last.solver == "cg"
        assert 0 < cg.last.residual <= 1e-4
        gap = torch.cat([(factor.vjp(v)[n].double() / mass - exact[n]).flatten() for n in factor.shapes])
        error = (gap @ dense.G[name] @ gap).sqrt().item()
        assert error <= 12**0.5 * cg.last.residual * r.norm().item() + 1e-5 * r.norm().item()


def test_stacked_networks_and_more_right_hand_sides():
    torch.manual_seed(0)
    model, x = mlp(3, 5, 2).to(F64), torch.randn(3, 4, 3, dtype=F64)
    params = {n: torch.stack([p.detach() * (1 + k) for k in range(3)]) for n, p in model.named_parameters()}
    y, factors = stacked_layer_factors(model, params, x)
    for metric in METRICS:
        resolved = resolve_output_metric(metric)
        for factor in factors.values():
            masses = factor.resolved_mass(0.1)
            exact = inner_system(factor, 4, masses, 0.25, resolved, y)[0]
            cg = ConjugateGradientSystem(factor, 4, masses, 0.25, resolved, y)
            b = torch.randn_like(y)
            torch.testing.assert_close(cg.woodbury(b), exact.woodbury(b), rtol=0, atol=1e-10)
            torch.testing.assert_close(cg.dual(b), exact.dual(b), rtol=0, atol=1e-10)
            many = torch.randn(5, *y.shape, dtype=F64)
            for one, found in zip(many, cg.woodbury(many), strict=True):
                torch.testing.assert_close(found, exact.woodbury(one), rtol=0, atol=1e-10)


def test_fewer_rows_than_the_factor_has():
    model, x, _ = CASES["mlp"].make()
    y, factors = layer_factors(model, x)
    for solver in ("cg", "cholesky", "auto"):
        for scale in ("mean", "mean-jacobian"):
            part, whole = (
                step_system(
                    f, 3, f.resolved_mass(1.0), scale, resolve_output_metric("cross_entropy"), out, solver=solver
                )
                for f, out in ((factors["2"], y), (factors["2"].rows(3), y[:3]))
            )
            assert torch.equal(part.dual(y[:3]), whole.dual(y[:3]))


@pytest.mark.parametrize("solver", ["cg", "auto"])
@pytest.mark.parametrize("name", ["mlp", "convolution", "embedding", "bare parameters"])
def test_layer_metric(name, solver):
    case = CASES[name]
    model, x, _ = case.make()
    y, factors = layer_factors(model, x, output=case.output)
    torch.manual_seed(1)
    r, g = torch.randn_like(y), {n: torch.randn_like(p) for n, p in trainable(model).items()}
    for options in ({"mass": 0.1}, {"scale": "sum", "output_metric": "cross_entropy"}, {"scale": "none"}):
        dense = Dense(model, x, output=case.output, **options)
        pull, solved = dense.solve({n: t / dense.N for n, t in dense.pull(r).items()}), dense.solve(g)
        for block, factor in resolve_blocks(factors, "layer").items():
            metric, names = LayerMetric(factor, y, solver=solver, **options), list(factor.shapes)
            size = 4e-12 * dense.stiffness() * max(1, r.norm().item())
            for _ in range(2):  # before and after the kernel, which brings Cholesky's factor
                assert distance(metric.push(r), {n: pull[n] for n in names}) <= size
                assert distance(metric.solve(g), {n: solved[n] for n in names}) <= size
                K = metric.kernel().flatten(2).flatten(0, 1)
                torch.testing.assert_close(K, dense.kernel(block), rtol=0, atol=size * max(1, K.norm().item()))
            assert metric.system.last.solver in ("cholesky", "none")


def ill_conditioned():
    """A layer whose sensitivities nothing is known of: conjugate gradients need hundreds of steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.ReLU(), torch.nn.Linear(60, 8)).to(F64)
    y, factors = layer_factors(model, torch.randn(30, 40, dtype=F64))
    return factors["0"], y, {"0.weight": 1e-9, "0.bias": 1e-9}


def test_cg_that_misses_its_tolerance_warns_and_auto_turns_to_cholesky(monkeypatch):
    monkeypatch.setattr("nt_kernel.metric.cg_system.MOST_STEPS", 20)
    factor, y, mass = ill_conditioned()
    metric, r = resolve_output_metric("identity"), torch.randn_like(y)
    cg = step_system(factor, 30, mass, "mean", metric, y, solver="cg")
    with pytest.warns(
        RuntimeWarning, match=r"layer '0': conjugate gradients stopped at residual .* after 20 steps, short"
    ):
        cg.dual(r)
    assert cg.last.solver == "cg"
    assert cg.last.residual > 1e-12
    exact = step_system(factor, 30, mass, "mean", metric, y, solver="cholesky")
    auto = ConjugateGradientSystem(factor, 30, mass, 1 / 30, metric, y, budget=30.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(auto.dual(r), exact.dual(r), rtol=0, atol=1e-14)
    assert auto.last.solver == "cholesky"
    assert 3 <= auto.last.iterations <= 45
    assert auto.last.residual > 1e-12
    auto.dual(r)  # from now on without trying
    assert auto.last == Solve("cholesky")


def test_many_right_hand_sides_use_the_budget_up():
    model, x, _ = CASES["mlp"].make()
    y, factors = layer_factors(model, x)
    metric = resolve_output_metric("identity")
    system = ConjugateGradientSystem(factors["0"], 4, factors["0"].resolved_mass(1.0), 0.25, metric, y, budget=40.0)
    used = []
    for _ in range(20):
        system.woodbury(torch.randn_like(y))
        used.append(system.last.solver)
    assert used[0] == "cg"
    assert used[-1] == "cholesky"


def test_auto_is_cholesky_for_small_systems_and_cg_for_large_ones():
    metric = resolve_output_metric("identity")

    def chosen(N, dtype=torch.float32, **options):
        torch.manual_seed(0)
        model = mlp(20, 64, 64, 10).to(dtype)
        y, factors = layer_factors(model, torch.randn(N, 20, dtype=dtype))
        mass = model_mass(factors, 1.0)
        made = {n: step_system(f, N, mass, "mean", metric, y, **options) for n, f in factors.items()}
        return {n: type(system) for n, system in made.items()}

    assert set(chosen(4).values()) == {InnerSystem}
    assert chosen(128) == {"0": ConjugateGradientSystem, "2": ConjugateGradientSystem, "4": InnerSystem}
    assert set(chosen(128, solver="cholesky").values()) == {InnerSystem}
    assert set(chosen(4, solver="cg").values()) == {ConjugateGradientSystem}


def test_bad_solver_is_named():
    model, x, _ = CASES["mlp"].make()
    y, factors = layer_factors(model, x)
    with pytest.raises(
        ValueError, match=r"unknown solver 'cgg'; known are 'auto', 'cholesky', 'cg'; did you mean 'cg'\?"
    ):
        LayerMetric(factors["0"], y, solver="cgg")


@given(st.integers(1, 500), st.floats(1e-12, 2.0), st.floats(3, 200))
def test_the_budget_is_kept(taken, residual, budget):
    """Whatever the residuals, no more than 1.5 times the price of Cholesky is spent; what has converged is kept."""
    assert not too_slow(taken, 1e-13, 1e-12, budget)
    if taken >= 1.5 * budget and residual > 1e-12:
        assert too_slow(taken, residual, 1e-12, budget)


def test_what_is_not_finite_is_said():
    model, x, _ = CASES["mlp"].make()
    y, factors = layer_factors(model, x)
    for solver in ("cg", "cholesky"):
        broken = {"0.weight": 1e-310, "0.bias": 1.0}
        with pytest.raises((NumericalError, ZeroDivisionError), match=r"finite|division"):
            step_system(factors["0"], 4, broken, "mean", resolve_output_metric("identity"), y, solver=solver).dual(y)
