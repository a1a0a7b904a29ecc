"""Full diagonals and row × column masses in steps and kernels, for every solver and scale, against dense matrices."""

import pytest
import torch

from nt_kernel import LayerMetric, layer_factors
from nt_kernel.mass import RowColumnMass
from nt_kernel.metric.layer_metric import model_mass, resolve_blocks
from optim import Woodbury, woodbury_step
from tests.nt_kernel.cases import CASES, F64
from tests.nt_kernel.test_mean_jacobian import DenseMean
from tests.reference import Dense, distance, trainable

NAMES = ["mlp", "no bias", "frozen weight", "tokens, pairs", "tokens, summed", "convolution", "embedding", "layer norm"]


def masses_of(model, kind):
    """One entry per parameter, spread over a decade; row × column where a parameter has both."""
    torch.manual_seed(5)
    found = {}
    for name, p in trainable(model).items():
        if kind == "diagonal" or p.dim() < 2:
            found[name] = 0.1 + torch.rand_like(p)
        else:
            row, column = 0.1 + torch.rand(len(p), dtype=F64), 0.1 + torch.rand(p[0].numel(), dtype=F64)
            found[name] = RowColumnMass(row, column)
    return found


class _Full:
    """Dense metrics whose masses are tensors."""

    def D(self, block):
        def entries(name):
            mass, p = self.mass[name], self.params[name]
            return (mass.full(p.shape) if isinstance(mass, RowColumnMass) else mass).flatten()

        return torch.cat([entries(name) for name in self.blocks[block]])


class FullDense(_Full, Dense):
    pass


class FullDenseMean(_Full, DenseMean):
    pass


@pytest.mark.parametrize("kind", ["diagonal", "row × column"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_and_kernels(name, kind):
    case = CASES[name]
    model, x, x2 = case.make()
    y, factors = layer_factors(model, x, output=case.output)
    _, others = layer_factors(model, x2, output=case.output)
    torch.manual_seed(1)
    r, g = torch.randn_like(y), {n: torch.randn_like(p) for n, p in trainable(model).items()}
    mass = masses_of(model, kind)
    for solver, scale, metric, blocks in (
        ("cholesky", "mean", "identity", "layer"),
        ("cholesky", "sum", "cross_entropy", "network"),
        ("cg", "mean", "identity", "layer"),
        ("cg", "sum", "cross_entropy", "network"),
        ("auto", "none", "identity", "layer"),
        ("auto", "mean-jacobian", "identity", "layer"),
        ("auto", "mean-jacobian", "cross_entropy", "network"),
    ):
        options = {"mass": mass, "output_metric": metric, "blocks": blocks}
        if scale == "mean-jacobian":
            dense = FullDenseMean(model, x, output=case.output, **options)
        else:
            dense = FullDense(model, x, output=case.output, scale=scale, **options)
        pull, solved = dense.solve({n: t / dense.N for n, t in dense.pull(r).items()}), dense.solve(g)
        grouped, other = (resolve_blocks(f, blocks) for f in (factors, others))
        everything = model_mass(factors, mass)
        for block, factor in grouped.items():
            found = LayerMetric(factor, y, mass=everything, output_metric=metric, scale=scale, solver=solver)
            names, size = list(factor.shapes), 4e-12 * dense.stiffness()
            assert distance(found.push(r), {n: pull[n] for n in names}) <= size
            assert distance(found.solve(g), {n: solved[n] for n in names}) <= size
            for A, B, xA, xB in ((None, None, None, None), (other[block], None, x2, None)):
                expected = dense.kernel(block, xA, xB)
                K = found.kernel(A, B).flatten(2).flatten(0, 1)
                torch.testing.assert_close(K, expected, rtol=0, atol=size * max(1, expected.norm().item()))


@pytest.mark.parametrize("kind", ["diagonal", "row × column"])
def test_the_optimizer_and_stacked_networks(kind):
    model, x, _ = CASES["mlp"].make()
    mass = masses_of(model, kind)
    y, _ = layer_factors(model, x)
    dense = FullDense(model, x, mass=mass)
    expected = dense.solve(dense.pull(y / 4))
    params = {n: torch.stack([p, 2 * p]) for n, p in trainable(model).items()}
    for solver in ("cholesky", "cg"):
        stepped = woodbury_step(model, params, torch.stack([x, x]), lambda y: y / 4, lr=1.0, mass=mass, solver=solver)
        assert distance({n: (params[n] - stepped[n])[0] for n in params}, expected) <= 4e-12 * dense.stiffness()
        before = {n: p.clone() for n, p in trainable(model).items()}
        opt = Woodbury(model, 1.0, mass=mass, solver=solver, check_step=False)
        opt.zero_grad()
        (0.5 * model(x).square().sum() / 4).backward()
        opt.step()
        moved = {n: before[n] - p for n, p in trainable(model).items()}
        assert distance(moved, expected) <= 4e-12 * dense.stiffness()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(before[n])
        opt.close()
