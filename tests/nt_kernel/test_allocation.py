"""No m_α × m_α matrix and no dense Jacobian of a linear layer: the largest tensor that any operation returns."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nt_kernel import LayerMetric, empirical_ntk, generalized_ntk, layer_factors
from optim import Woodbury, woodbury_step
from tests.nt_kernel.cases import CASES, F64, Custom

N, C = 8, 3


class Largest(TorchDispatchMode):
    """``numel`` of the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def wide():
    return nn.Sequential(nn.Linear(60, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, C)).to(F64)


def wide_tokens():
    return nn.Sequential(nn.Linear(150, 150), nn.Tanh(), nn.Flatten(), nn.Linear(300, C)).to(F64)


PROBLEMS = {"samples": (wide, (60,)), "tokens": (wide_tokens, (2, 150))}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    torch.manual_seed(0)
    make, shape = PROBLEMS[request.param]
    model = make()
    largest_layer = max(p.numel() for p in model.parameters())
    if largest_layer < 4 * (N * C) ** 2:  # else the watch could not tell a kernel from a Jacobian
        pytest.fail("widen the model")
    return model, torch.randn(N, *shape, dtype=F64), largest_layer


@pytest.mark.parametrize("metric", ["identity", "cross_entropy"])
def test_nothing_is_larger_than_the_parameters(problem, metric):
    model, x, largest = problem
    with Largest() as seen:
        y, factors = layer_factors(model, x)
        for name, factor in factors.items():
            factor.gram(mass=0.5)
            factor.block_norms()
            layer = LayerMetric(factor, y, output_metric=metric)
            layer.push(y)
            layer.solve({n: model.get_parameter(n).detach() for n in factor.shapes})
            layer.kernel(), layer.kernel(factor.rows(2), factor), name
        for blocks in ("layer", "network"):
            _ = generalized_ntk(model, x, output_metric=metric, blocks=blocks).xi
        empirical_ntk(model, x, x[:3])
    assert 0 < seen.numel <= largest


@pytest.mark.parametrize("edited", [False, True])
def test_the_optimizer_neither(problem, edited):
    model, x, largest = problem
    opt = Woodbury(model, lr=0.1, output_metric="cross_entropy")
    with Largest() as seen:
        for _ in range(2):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), torch.arange(N) % C).backward()
            if edited:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            opt.step()
    assert 0 < seen.numel <= largest


def test_stacked_networks_neither(problem):
    model, x, largest = problem
    K = 3
    params = {n: torch.stack([p.detach()] * K) for n, p in model.named_parameters()}
    with Largest() as seen:
        woodbury_step(model, params, torch.stack([x] * K), lambda y: y / N, lr=0.1)
    assert 0 < seen.numel <= K * largest


def test_the_watch_sees_a_dense_jacobian(problem):
    model, x, largest = problem
    _, factors = layer_factors(model, x)
    with Largest() as seen:
        factors["0"].dense()
    assert seen.numel >= N * C * model[0].weight.numel() > largest


def test_the_watch_sees_an_explicit_jacobian_inside_the_transforms():
    torch.manual_seed(0)
    model = Custom(lambda s, x: nn.functional.linear(x, s.a.weight.sin())[:, :C], a=nn.Linear(60, 200)).to(F64)
    with Largest() as seen:
        layer_factors(model, torch.randn(N, 60, dtype=F64))
    assert seen.numel >= N * C * 60 * 200


def test_the_watch_sees_a_metric_matrix():
    model, x, _ = CASES["mlp"].make()
    J = layer_factors(model, x)[1]["0"].dense().flatten(0, 1)
    with Largest() as seen:
        J.T @ J
    assert seen.numel == J.shape[1] ** 2
