"""The mean-Jacobian metric G = D + J̄ᵀM̄ J̄ against dense matrices: steps, kernels, their error, what it refuses."""

import itertools

import pytest
import torch

from nt_kernel import LayerMetric, NumericalError, layer_factors
from nt_kernel.factors import join_factors, stacked_layer_factors
from nt_kernel.metric.layer_metric import resolve_blocks, scale_factor
from nt_kernel.metric.mean_jacobian import MeanJacobianSystem, mean_factor
from nt_kernel.metric.output_metric import resolve_output_metric
from nt_kernel.spectra.spectrum import rounding_radius
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.reference import Dense, definite_metric, distance, singular_metric, trainable
from tests.thinned import thinned

METRICS = ["identity", "cross_entropy", definite_metric, singular_metric]


class DenseMean(Dense):
    """G = D + J̄ᵀM̄ J̄, straight from the definition."""

    def _build(self, mass=1.0, output_metric="identity", blocks="layer"):
        super()._build(mass, output_metric, "none", blocks)
        C, M = self.C, self.M
        M_bar = sum(M[i * C : (i + 1) * C, i * C : (i + 1) * C] for i in range(self.N)) / self.N
        self.c, self._stiffness = 1.0, 1.0
        for b, J in self.J.items():
            J_bar = J.unflatten(0, (self.N, C)).mean(0)
            self.G[b] = torch.diag(self.D(b)) + J_bar.T @ M_bar @ J_bar
            weighed = M_bar @ (J_bar / self.D(b)) @ J_bar.T
            self._stiffness = max(self._stiffness, weighed.norm().item())


def size_of(dense, *others):
    return 1e-12 * dense.stiffness() * max([1.0, *(t.norm().item() for t in others)])


@pytest.mark.parametrize(("name", "metric"), thinned(itertools.product(CASES, METRICS), 3))
def test_layer_metric(name, metric):
    case = CASES[name]
    model, x, x2 = case.make()
    y, factors = layer_factors(model, x, output=case.output)
    if metric == "cross_entropy" and y.shape[1] == 1:
        return
    _, others = layer_factors(model, x2, output=case.output)
    torch.manual_seed(1)
    r, g = torch.randn_like(y), {n: torch.randn_like(p) for n, p in trainable(model).items()}
    by_name = {n: 0.01 * 3.0**i for i, n in enumerate(trainable(model))}
    for mass, blocks in ((1e-3, "layer"), (by_name, "layer"), (by_name, "network")):
        dense = DenseMean(model, x, output=case.output, mass=mass, output_metric=metric, blocks=blocks)
        pull, solved = dense.solve({n: t / dense.N for n, t in dense.pull(r).items()}), dense.solve(g)
        grouped, other = resolve_blocks(factors, blocks), resolve_blocks(others, blocks)
        for block, factor in grouped.items():
            found = LayerMetric(factor, y, mass=mass, output_metric=metric, scale="mean-jacobian")
            names = list(factor.shapes)
            pushed, exact = found.push(r), {n: pull[n] for n in names}
            assert distance(pushed, exact) <= size_of(dense)
            assert distance(found.solve(g), {n: solved[n] for n in names}) <= size_of(dense)
            for A, B, xA, xB in (
                (None, None, None, None),
                (other[block], None, x2, None),
                (None, other[block], None, x2),
            ):
                expected = dense.kernel(block, xA, xB)
                K = found.kernel(A, B).flatten(2).flatten(0, 1)
                torch.testing.assert_close(
                    K, expected, rtol=0, atol=size_of(dense, expected, dense.gram(block, xA, xB))
                )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mass", [1e-4, 0.1, 1e3])
def test_the_error_of_a_kernel_is_within_its_scale(metric, mass):
    model, x, _ = CASES["mlp"].make()
    y, factors = layer_factors(model, x)
    dense = DenseMean(model, x, output_metric=metric, mass=mass)
    for name, factor in factors.items():
        system = MeanJacobianSystem(factor, 4, factor.resolved_mass(mass), resolve_output_metric(metric), y)
        R = system.expand(system.self_kernel())
        error = (R - dense.kernel(name)).norm().item() / 4
        assert error <= rounding_radius(len(R), system.error_scale(4))
        torch.testing.assert_close(R, R.mT, rtol=0, atol=1e-14 * system.error_scale(4))


def test_mean_of_the_metrics():
    torch.manual_seed(0)
    y = torch.randn(2, 5, 3, dtype=F64)
    for metric in METRICS:
        resolved, L = resolve_output_metric(metric), mean_factor(resolve_output_metric(metric), y)
        factor = resolved.factor(y)
        expected = torch.eye(3, dtype=F64).expand(2, 3, 3) if factor is None else (factor.mT @ factor).mean(1)
        torch.testing.assert_close(L.mT @ L, expected, rtol=0, atol=1e-13)


def test_stacked_networks():
    torch.manual_seed(0)
    model, x = mlp(3, 5, 2).to(F64), torch.randn(3, 4, 3, dtype=F64)
    params = {n: torch.stack([p.detach() * (1 + k) for k in range(3)]) for n, p in model.named_parameters()}
    y, factors = stacked_layer_factors(model, params, x)
    for metric in METRICS:
        for factor in [*factors.values(), join_factors(factors)]:
            stack = MeanJacobianSystem(factor, 4, factor.resolved_mass(0.1), resolve_output_metric(metric), y)
            for k in range(3):
                own = factor.runs(slice(k, k + 1))
                alone = MeanJacobianSystem(
                    own, 4, factor.resolved_mass(0.1), resolve_output_metric(metric), y[k : k + 1]
                )
                b = torch.randn_like(y)
                for verb in ("dual", "woodbury"):
                    torch.testing.assert_close(
                        getattr(stack, verb)(b)[k], getattr(alone, verb)(b[k : k + 1])[0], rtol=1e-12, atol=1e-12
                    )
                torch.testing.assert_close(stack.self_kernel()[k], alone.self_kernel()[0], rtol=1e-12, atol=1e-12)


def test_one_sample_is_the_layer_metric_at_scale_mean():
    model, x, _ = CASES["mlp"].make()
    y, factors = layer_factors(model, x[:1])
    for factor in factors.values():
        pair = (LayerMetric(factor, y, scale=scale).kernel() for scale in ("mean", "mean-jacobian"))
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-13)


def test_the_bound_on_lambda_max_does_not_hold():
    """At small mass H grows like 1/μ: only C directions of a layer's K are damped."""
    model, x, _ = CASES["mlp"].make()
    y, factors = layer_factors(model, x)
    largest = [
        torch.linalg.eigvalsh(
            sum(
                LayerMetric(f, y, mass=mass, scale="mean-jacobian").kernel().flatten(2).flatten(0, 1) / 4
                for f in factors.values()
            )
        )[-1].item()
        for mass in (1e-2, 1e-4)
    ]
    assert largest[0] > len(factors)
    assert largest[1] == pytest.approx(100 * largest[0], rel=0.1)


def test_no_factor_c():
    with pytest.raises(ValueError, match=r'scale="mean-jacobian" has no factor c'):
        scale_factor("mean-jacobian", 4)
    with pytest.raises(ValueError, match=r"unknown scale 'mean-jacobean'.*did you mean 'mean-jacobian'\?"):
        scale_factor("mean-jacobean", 4)


def test_what_is_not_finite_is_said():
    model, x, _ = CASES["mlp"].make()
    y, factors = layer_factors(model, x)
    with pytest.raises(NumericalError, match="layer '0': the mean Jacobian is not finite"):
        LayerMetric(factors["0"], y, mass={"0.weight": 1e-310, "0.bias": 1.0}, scale="mean-jacobian")
