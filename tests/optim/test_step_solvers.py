"""Steps by every solver and at scale "mean-jacobian", held against dense solves; what the optimizer says of them."""

import pytest
import torch

from optim import StepTooLargeError, Woodbury, woodbury_step
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.nt_kernel.test_mean_jacobian import DenseMean
from tests.optim.problems import LR, OPTIONS, gradients, optimizer, problem
from tests.reference import Dense, distance, singular_metric, trainable

NAMES = [
    "mlp",
    "no bias",
    "tied weights",
    "tokens, pairs",
    "layer norm",
    "convolution",
    "output [N]",
    "bare parameters",
]
MEAN_OPTIONS = {
    "default": {},
    "small mass": {"mass": 1e-3},
    "softmax": {"output_metric": "cross_entropy", "mass": 1e-2},
    "singular": {"output_metric": singular_metric, "mass": 0.1},
    "network": {"blocks": "network", "mass": 0.1},
}


def check_step(model, opt, dense, size=1.0):
    before, expected = {n: p.detach().clone() for n, p in trainable(model).items()}, dense.solve(gradients(model))
    opt.step()
    moved = {n: (before[n] - p) / LR for n, p in trainable(model).items()}
    assert distance(moved, expected) <= size * 1e-12 * dense.stiffness()


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_every_solver_takes_the_dense_step(solver, name, option, edit):
    model, x, loss = problem(name)
    options = OPTIONS[option]
    if options.get("output_metric") == "cross_entropy" and Dense(model, x).C == 1:
        return
    opt = optimizer(model, solver=solver, **options)
    loss(model(x)).backward()
    if edit:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    check_step(model, opt, Dense(model, x, **options), size=2.0)
    used = {"none" if options.get("scale") == "none" and solver == "cg" else solver}
    assert {solve.solver for solve in opt.solves.values()} == used
    assert all(solve.residual <= 1e-12 for solve in opt.solves.values() if solve.solver == "cg")


@pytest.mark.parametrize("edit", [False, True])
@pytest.mark.parametrize("option", MEAN_OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_mean_jacobian_takes_the_dense_step(name, option, edit):
    model, x, loss = problem(name)
    options = MEAN_OPTIONS[option]
    if options.get("output_metric") == "cross_entropy" and Dense(model, x).C == 1:
        return
    opt = optimizer(model, scale="mean-jacobian", **options)
    loss(model(x)).backward()
    if edit:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    check_step(model, opt, DenseMean(model, x, **options))


@pytest.mark.parametrize("options", [{"solver": "cg"}, {"solver": "cg", "mass": 0.01}, {"scale": "mean-jacobian"}])
def test_stacked_networks_take_their_own_dense_steps(options):
    model, x, _ = CASES["mlp"].make()
    torch.manual_seed(1)
    params = {
        n: torch.stack([p + 0.3 * k * torch.randn_like(p) for k in range(3)]) for n, p in trainable(model).items()
    }
    xs, kept = torch.stack([x + 0.2 * k for k in range(3)]), {}

    def gradient(y):
        return kept.setdefault("r", torch.randn_like(y))

    stepped = woodbury_step(model, params, xs, gradient, lr=LR, **options)
    for k in range(3):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(params[n][k])
        rest = {key: value for key, value in options.items() if key == "mass"}
        dense = (DenseMean if "scale" in options else Dense)(model, xs[k], **rest)
        expected = dense.solve(dense.pull(kept["r"][k]))
        moved = {n: (params[n][k] - stepped[n][k]) / LR for n in params}
        assert distance(moved, expected) <= 4e-12 * dense.stiffness()


@pytest.mark.parametrize("options", [{"solver": "cg"}, {"scale": "mean-jacobian"}])
def test_the_step_check_uses_the_kernel(options):
    model, x, loss = problem()
    options = {"mass": 1e-2, **options}
    dense = (DenseMean if "scale" in options else Dense)(model, x, mass=1e-2)
    largest = dense.lambda_max()
    for lr, allowed in ((2.001 / largest, False), (1.999 / largest, True)):
        opt = Woodbury(model, lr, **options)
        opt.zero_grad()
        loss(model(x)).backward()
        if allowed:
            opt.step()
            assert opt.lambda_max < 2 / lr
            assert {solve.solver for solve in opt.solves.values()} == {"cholesky"}  # the kernel brought the factor
        else:
            with pytest.raises(StepTooLargeError) as error:
                opt.step()
            assert error.value.limit == pytest.approx(2 / largest, rel=1e-9)
        opt.close()


def test_auto_lr_is_refused_where_its_bound_does_not_hold():
    model, _, _ = problem()
    with pytest.raises(
        ValueError, match=r'lr="auto" rests on λ_max ≤ N, which needs scale="mean"; with scale=\'mean-jacobian\''
    ):
        Woodbury(model, "auto", scale="mean-jacobian")


def test_bad_solvers_are_named():
    model, x, _ = problem()
    message = r"unknown solver 'cgg'; known are 'auto', 'cholesky', 'cg'; did you mean 'cg'\?"
    with pytest.raises(ValueError, match=message):
        Woodbury(model, solver="cgg")
    params = {n: p.detach()[None] for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        woodbury_step(model, params, x[None], lambda y: y, lr=0.1, solver="cgg")


def test_float32_steps_of_auto_by_conjugate_gradients():
    """B·C = 640: a large enough system for CG; the step solves G s = ∇h to the tolerance, in float64 arithmetic."""
    torch.manual_seed(0)
    model, x = mlp(10, 64, 64, 10), torch.randn(64, 10)
    exact = mlp(10, 64, 64, 10).to(F64)
    exact.load_state_dict({n: p.double() for n, p in model.state_dict().items()})
    opt = Woodbury(model, LR, mass=0.1)
    assert opt.solves == {}
    (0.5 * (model(x) - 1).square().sum() / 64).backward()
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    gradient = {n: g.double() for n, g in gradients(model).items()}
    opt.step()
    assert {n: solve.solver for n, solve in opt.solves.items()} == {"0": "cg", "2": "cg", "4": "cholesky"}
    assert all(0 < solve.residual <= 1e-4 for n, solve in opt.solves.items() if n != "4")
    dense = Dense(exact, x.double(), mass=0.1)
    moved = {n: (before[n] - p.detach().double()) / LR for n, p in model.named_parameters()}
    assert distance(moved, dense.solve(gradient)) < 1e-3


def test_the_path_of_a_run_does_not_depend_on_the_solver():
    paths = []
    for solver in ("cholesky", "cg"):
        torch.manual_seed(0)
        model, x = mlp(4, 12, 12, 2).to(F64), torch.randn(10, 4, dtype=F64)
        opt = Woodbury(model, LR, mass=0.1, solver=solver)
        for _ in range(10):
            opt.zero_grad()
            (0.5 * (model(x) - 1).square().sum() / 10).backward()
            opt.step()
        paths.append({n: p.detach() for n, p in model.named_parameters()})
    assert distance(*paths) < 1e-9
