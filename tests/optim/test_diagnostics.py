"""What ``diagnostics=True`` says of a step, figure by figure against dense references."""

import pytest
import torch

from nt_kernel.metric.inner import InnerSystem
from nt_kernel.metric.output_metric import resolve_output_metric
from optim import Woodbury, woodbury
from optim.options.diagnostics import inner_figures
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.nt_kernel.test_mean_jacobian import DenseMean
from tests.optim.problems import OPTIONS, call, problem
from tests.reference import Dense, trainable

NAMES = ["mlp", "tied weights", "convolution", "output [N]", "layer norm"]


def stepped(model, x, loss, **options):
    opt = Woodbury(model, 0.1, check_step=False, diagnostics=True, **options)
    loss(call(model, x)).backward()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    opt.step()
    return opt, {n: before[n] - p for n, p in trainable(model).items()}


def norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_figure(name, option, solver):
    model, x, loss = problem(name)
    options = OPTIONS[option]
    dense = Dense(model, x, **options)
    if options.get("output_metric") == "cross_entropy" and dense.C == 1:
        return
    opt, moved = stepped(model, x, loss, solver=solver, **options)
    assert opt.diagnostics.keys() == dense.blocks.keys()
    values, vectors = torch.linalg.eigh(dense.M)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T  # another factor of M: the spectra are the same
    for block, found in opt.diagnostics.items():
        names = dense.blocks[block]
        assert found.gradient_norm == pytest.approx(
            norm(dict(model.named_parameters())[n].grad for n in names), rel=1e-12
        )
        assert found.update_norm == pytest.approx(norm(moved[n] for n in names), rel=1e-12)
        Q = root @ dense.gram(block) @ root
        spectrum = torch.linalg.eigvalsh(Q)
        assert found.rank == int(torch.linalg.matrix_rank(Q, hermitian=True, rtol=1e-10))
        smallest = spectrum[0].clamp_min(0) if len(spectrum) == found.rank else 0.0
        full = (1 + dense.c * spectrum[-1]) / (1 + dense.c * smallest)
        if options.get("output_metric") == "cross_entropy":  # L has C − 1 rows: S is smaller
            assert 1 <= found.condition <= full * (1 + 1e-9)
        else:
            assert found.condition == pytest.approx(full.item(), rel=1e-9)
        own = root @ dense.kernel(block) @ root / dense.N
        assert found.lambda_max == pytest.approx(torch.linalg.eigvalsh(own)[-1].item(), rel=1e-9, abs=1e-14)
        assert 0 <= found.residual <= 1e-11


def test_the_condition_of_the_small_system_of_cross_entropy():
    model, x, loss = problem()
    opt, _ = stepped(model, x, loss, output_metric="cross_entropy", mass=1e-2)
    model, x, loss = problem()
    dense = Dense(model, x, mass=1e-2)
    L = torch.block_diag(*resolve_output_metric("cross_entropy").factor(dense.y))
    for block, found in opt.diagnostics.items():
        S = torch.eye(len(L), dtype=F64) + dense.c * L @ dense.gram(block) @ L.T
        assert found.condition == pytest.approx(torch.linalg.cond(S).item(), rel=1e-9)


@pytest.mark.parametrize("option", [{}, {"output_metric": "cross_entropy", "mass": 1e-2}, {"blocks": "network"}])
def test_mean_jacobian(option):
    model, x, loss = problem()
    dense = DenseMean(model, x, **option)
    opt, _ = stepped(model, x, loss, scale="mean-jacobian", **option)
    N, C = dense.N, dense.C
    E = torch.eye(C, dtype=F64).repeat(N, 1) / N
    mean = torch.stack([dense.M[i * C : (i + 1) * C, i * C : (i + 1) * C] for i in range(N)]).mean(0)
    values, vectors = torch.linalg.eigh(mean)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    big_values, big = torch.linalg.eigh(dense.M)
    big_root = big @ torch.diag(big_values.clamp_min(0).sqrt()) @ big.T
    for block, found in opt.diagnostics.items():
        Q = root @ E.T @ dense.gram(block) @ E @ root
        assert found.rank == int(torch.linalg.matrix_rank(Q, hermitian=True, rtol=1e-10))
        assert found.condition == pytest.approx(torch.linalg.cond(torch.eye(C, dtype=F64) + Q).item(), rel=1e-8)
        own = big_root @ dense.kernel(block) @ big_root / N
        assert found.lambda_max == pytest.approx(torch.linalg.eigvalsh(own)[-1].item(), rel=1e-9)
        assert 0 <= found.residual <= 1e-12


@pytest.mark.parametrize("options", [{}, {"output_metric": "cross_entropy"}, {"scale": "mean-jacobian"}])
def test_the_residual_is_that_of_the_vector_given(options):
    """A solve that is wrong by 1e-3 shows."""
    from nt_kernel import layer_factors
    from nt_kernel.mass import resolve_mass
    from optim.steps.direction import step_systems

    model, x, _ = CASES["mlp"].make()
    y, factors = layer_factors(model, x)
    metric = resolve_output_metric(options.get("output_metric", "identity"))
    masses = resolve_mass(0.1, {name: tuple(f.shapes) for name, f in factors.items()})
    systems = step_systems(factors, y, masses, options.get("scale", "mean"), metric)
    r = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    for name, system in systems.items():
        v = system.dual(r)
        *_, exact, _ = inner_figures(system, metric, y, r, v)
        *_, off, _ = inner_figures(system, metric, y, r, v + 1e-3 * r)
        K = factors[name].gram(mass=masses).flatten(-4, -3).flatten(-2)
        M = torch.block_diag(
            *(torch.eye(y.shape[1], dtype=F64) if (L := metric.factor(y)) is None else L.mT @ L).expand(len(y), -1, -1)
        )
        if options.get("scale") == "mean-jacobian":
            E = torch.eye(y.shape[1], dtype=F64).repeat(len(y), 1) / len(y)
            cMK = E @ E.T @ K
        else:
            cMK = M @ K / len(y)
        expected = 1e-3 * (r.flatten() + cMK @ r.flatten()).norm() / r.norm()
        assert exact < 1e-12
        assert off == pytest.approx(expected.item(), rel=1e-6)


def test_the_residual_of_conjugate_gradients_in_single_precision():
    torch.manual_seed(0)
    model, x = mlp(6, 20, 20, 4), torch.randn(24, 6)
    opt = Woodbury(model, 0.1, mass=1e-2, solver="cg", check_step=False, diagnostics=True)
    model(x).square().mean().backward()
    opt.step()
    for block, found in opt.diagnostics.items():
        assert opt.solves[block].solver == "cg"
        assert 1e-9 < found.residual < 1e-3


def test_the_update_counts_momentum_and_decay_and_only_what_moves():
    model, x, loss = problem()
    opt = Woodbury(model, 0.1, momentum=0.9, weight_decay=0.3, diagnostics=True)
    for _ in range(3):
        opt.zero_grad()
        loss(model(x)).backward()
        model[2].weight.grad = None
        before = {n: p.detach().clone() for n, p in trainable(model).items()}
        opt.step()
        moved = {n: before[n] - p for n, p in trainable(model).items()}
        for block, found in opt.diagnostics.items():
            assert found.update_norm == pytest.approx(norm(u for n, u in moved.items() if n[0] == block), rel=1e-12)
        assert opt.diagnostics["2"].gradient_norm == pytest.approx(model[2].bias.grad.norm().item(), rel=1e-12)


def test_off_by_default_and_free_then(monkeypatch):
    def never(*_):
        raise AssertionError("diagnosed without being asked")

    monkeypatch.setattr(woodbury, "inner_figures", never)
    monkeypatch.setattr(InnerSystem, "self_kernel", never)
    model, x, loss = problem()
    opt = Woodbury(model, 0.1)
    loss(model(x)).backward()
    opt.step()
    assert opt.diagnostics == {}


def test_a_zero_gradient_has_no_residual():
    model, x, loss = problem()
    opt, _ = stepped(model, x, lambda y: 0.0 * y.sum())
    assert all(found.residual == found.gradient_norm == found.update_norm == 0 for found in opt.diagnostics.values())
    assert loss is not None


@pytest.mark.parametrize("value", [1, "yes", None])
def test_diagnostics_is_a_switch(value):
    with pytest.raises(TypeError, match=f"diagnostics must be True or False, got {value!r}"):
        Woodbury(mlp(3, 2), diagnostics=value)
