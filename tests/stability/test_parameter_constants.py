"""Gradients, Hessians and their extremes in the parameters, against autograd's dense ones in the coordinates D^½θ."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

from stability.risk_constants import RiskHessian, gradient_norms, is_affine, parameter_constants
from tests.reference import trainable
from tests.stability.dense import F64, small_problem
from tests.stability.test_influence import mass_vector

LOSSES = {  # of one sample, written with torch's own
    "squared": lambda y, a: nn.functional.mse_loss(y, a, reduction="none").sum(-1) / 2,
    "cross_entropy": lambda y, a: nn.functional.cross_entropy(y, a, reduction="none"),
    "logistic": lambda y, a: nn.functional.binary_cross_entropy_with_logits(y, a, reduction="none").sum(-1),
}
MASSES = {"one": 1.0, "number": 0.3, "dict": {"0": 0.5, "2": 2.0, "4.weight": 0.1, "4.bias": 3.0}}


def flat(tree):
    return torch.cat([t.flatten() for t in tree.values()])


def dense_hessian(model, x, a, loss):
    params = trainable(model)
    risk = lambda values: LOSSES[loss](functional_call(model, values, (x,)), a).mean()  # noqa: E731
    blocks = hessian(risk)(params)
    rows = [torch.cat([blocks[i][j].reshape(params[i].numel(), -1) for j in params], 1) for i in params]
    return torch.cat(rows)


def data(seed=0, **shape):
    model, x, a, zs, _ = small_problem(seed, **shape)
    return model, x, a.softmax(1), torch.stack([z.x for z in zs]), torch.stack([z.target for z in zs]).softmax(1)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("loss", LOSSES)
def test_products_and_extremes_are_those_of_the_dense_hessian(loss, mass):
    model, x, a, *_ = data(seed=1)
    D = mass_vector(model, MASSES[mass])
    dense = (dense_hessian(model, x, a, loss) + 0.2 * torch.eye(len(D), dtype=F64)) / (D[:, None] * D).sqrt()
    operator = RiskHessian(model, x, a, weight_decay=0.2, mass=MASSES[mass], loss=loss)
    V = torch.randn(len(D), 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator @ V, dense @ V)
    torch.testing.assert_close(operator @ V[:, 0], dense @ V[:, 0])
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert operator.shape == dense.shape
    assert operator.extremes() == pytest.approx((eigenvalues[0].item(), eigenvalues[-1].item()), rel=1e-5, abs=1e-7)


def test_extremes_of_a_larger_model_by_lanczos():
    model, x, a, *_ = data(seed=2, width=20, d=4)  # m > 512: both ends by Lanczos
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(model, x, a, "squared"))
    assert len(eigenvalues) > 512
    found = RiskHessian(model, x, a).extremes()
    assert found == pytest.approx((eigenvalues[0].item(), eigenvalues[-1].item()), rel=1e-4)


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_norms_are_those_of_autograd(loss, mass):
    model, x, a, *_ = data(seed=3)
    params = {n: p + 0.3 for n, p in trainable(model).items()}
    D = mass_vector(model, MASSES[mass])
    found = gradient_norms(model, x, a, params=params, mass=MASSES[mass], loss=loss)
    for i in range(len(x)):
        one = lambda values: LOSSES[loss](functional_call(model, values, (x[i : i + 1],)), a[i : i + 1]).sum()  # noqa: B023, E731
        g = flat(jacrev(one)(params))
        assert found[i].item() == pytest.approx((g / D.sqrt()).norm().item(), rel=1e-10)


def test_constants_are_extremes_over_what_was_looked_at():
    model, x, a, others, other_a = data(seed=4)
    draw = torch.Generator().manual_seed(1)
    move = lambda: {n: p + 0.5 * torch.randn(p.shape, dtype=F64, generator=draw) for n, p in trainable(model).items()}  # noqa: E731
    run, twin = ([(move(), 0.1 * (t + 1)) for t in range(3)] for _ in range(2))
    points, aims = torch.cat([x, others]), torch.cat([a, other_a])

    def dense(runs, batches, every=1):
        norms, eigenvalues = [], []
        for one in runs:
            for t, (params, _) in enumerate(one):
                with torch.no_grad():
                    for n, p in model.named_parameters():
                        p.copy_(params[n])
                norms.append(gradient_norms(model, points, aims).max().item())
                if t % every == 0 or t == len(one) - 1:
                    eigenvalues += [torch.linalg.eigvalsh(dense_hessian(model, i, j, "squared")) for i, j in batches]
        return max(norms), max(e[-1].item() for e in eigenvalues), min(e[0].item() for e in eigenvalues)

    whole, single = [(x, a)], list(zip(points.split(1), aims.split(1), strict=True))
    for runs, batches, sampling, every in (
        ([run], whole, "full batch", 1),
        ([run, twin], whole, "full batch", 1),
        ([run], whole, "full batch", 5),
        ([run], single, "one sample", 2),
    ):
        found = parameter_constants(
            model, x, a, others, other_a, iter(run), twins=runs[1:], sampling=sampling, curvature_every=every
        )
        expected = dense(runs, batches, every)
        assert (found.lipschitz, found.smoothness, found.curvature) == pytest.approx(expected, rel=1e-5)
        assert found.lrs == pytest.approx((0.1, 0.2, 0.3))
        assert (found.n, found.both_runs, found.everywhere) == (len(x), len(runs) == 2, False)
    assert found.smooth.verdict == "holds"
    assert found.steepest == pytest.approx(max(expected[1], -expected[2]), rel=1e-5)
    assert not parameter_constants(model, x, a, others, other_a, run, scale="mean", curvature_every=5).constant_metric


def test_a_constant_hessian_is_recognised_and_looked_at_once(monkeypatch):
    _, x, a, others, other_a = data(seed=5)
    model, looked = nn.Linear(3, 2).to(F64), []
    extremes = RiskHessian.extremes
    monkeypatch.setattr(RiskHessian, "extremes", lambda self: looked.append(1) or extremes(self))
    run = [({n: p + t for n, p in trainable(model).items()}, 0.1) for t in range(4)]
    found = parameter_constants(model, x, a, others, other_a, run, weight_decay=0.4, mass=2.0)
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(model, x, a, "squared")) / 2 + 0.2
    assert found.everywhere
    assert len(looked) == 1
    assert (found.curvature, found.smoothness) == pytest.approx((eigenvalues[0].item(), eigenvalues[-1].item()))
    assert not parameter_constants(model, x, a, others, other_a, run, loss="cross_entropy").everywhere


@pytest.mark.parametrize(
    ("model", "affine"),
    [
        (nn.Linear(3, 2), True),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False)), True),
        (nn.Sequential(nn.Linear(3, 2), nn.Tanh()), False),
        (nn.Sequential(nn.Linear(3, 2), nn.ReLU()), False),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), False),
    ],
)
def test_models_affine_in_their_parameters(model, affine):
    assert is_affine(model, torch.randn(5, 3, generator=torch.Generator().manual_seed(0))) == affine


def test_nothing_is_changed():
    model, x, a, others, other_a = data(seed=6)
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    parameter_constants(model, x, a, others, other_a, [(trainable(model), 0.1)])
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_bad_input():
    model, x, a, others, other_a = data(seed=7)
    run = [(trainable(model), 0.1)]
    for options, message in (
        ({"sampling": "batch"}, "sampling must be one of"),
        ({"curvature_every": 0}, "curvature_every must be an int"),
        ({"loss": "square"}, "unknown loss"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"mass": 0.0}, "mass"),
    ):
        with pytest.raises(ValueError, match=message):
            parameter_constants(model, x, a, others, other_a, run, **options)
    with pytest.raises(ValueError, match="checkpoints is empty"):
        parameter_constants(model, x, a, others, other_a, [])
