"""A plan is only as good as the pass it was read off: what changes later is noticed, and what no call explains is explicit."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nt_kernel import layer_factors, structured
from tests.nt_kernel.cases import F64, Custom


def two(forward: Callable, **parts) -> nn.Module:
    torch.manual_seed(0)
    return Custom(forward, **({"a": nn.Linear(3, 3), "head": nn.Linear(3, 2)} | parts)).to(F64)


def assert_exact(model: nn.Module, x: torch.Tensor) -> None:
    """Against autograd on the batch, row by row."""
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    y = model(x).reshape(len(x), -1)
    rows = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True) for e in y.flatten()]
    J = {
        n: torch.stack([torch.zeros_like(p) if r[k] is None else r[k] for r in rows]).reshape(*y.shape, -1)
        for k, (n, p) in enumerate(zip(names, params, strict=True))
    }
    for factor in layer_factors(model, x)[1].values():
        torch.testing.assert_close(factor.dense(), torch.cat([J[n] for n in factor.shapes], -1), rtol=1e-12, atol=1e-13)


def plain(s, x):
    return s.head(torch.tanh(s.a(x)))


def switched(s, x):
    return plain(s, x).log_softmax(-1) if getattr(s, "flag", False) else plain(s, x)


def folded(s, x):
    return s.head(torch.tanh(s.a(x.mT.movedim(2, 0).reshape(-1, 3))).reshape(4, -1, 3).mean(0))


def sorted_within(s, x):
    order = x[:, 0].argsort()
    return s.head(torch.tanh(s.a(x[order]))[order.argsort()])


def in_another_order_of_use(s, x):
    y = torch.tanh(s.head(torch.tanh(s.a(x))))
    return y if x.mean() < 0 else y + s.a(x)[:, :2]


X = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
LATER = {
    "output wrapped by an attribute": (two(switched), X, lambda m: setattr(m, "flag", True), X),
    "hook on the output layer": (two(plain), X, lambda m: m.head.register_forward_hook(lambda m, a, o: 2 * o), X),
    "hook on the model": (two(plain), X, lambda m: m.register_forward_hook(lambda m, a, o: 2 * o), X),
    "branch on the data, output": (two(lambda s, x: plain(s, x) * (1 if x.mean() < 0 else 2)), -X.abs(), None, X.abs()),
    "branch on the data, one use more": (two(in_another_order_of_use), -X.abs(), None, X.abs()),
    "branch on the data, one use less": (two(in_another_order_of_use), X.abs(), None, -X.abs()),
    "use hidden by zero data": (
        two(lambda s, x: plain(s, x) + x[:, :1] * s.a.weight.square().sum()), 0 * X, None, X,
    ),
    "order of folding hidden by zero data": (
        two(folded), torch.zeros(3, 4, 3, dtype=F64), None, torch.randn(3, 4, 3, dtype=F64),
    ),
    "sorted by the data": (two(sorted_within), X[X[:, 0].argsort()], None, X),
    "padding index": (
        two(lambda s, t: s.head(torch.tanh(s.e(t)).mean(1)), e=nn.Embedding(5, 3)),
        torch.tensor([[0, 1], [2, 1]]), lambda m: setattr(m.e, "padding_idx", 1), torch.tensor([[0, 1], [2, 1]]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_what_changes_after_the_first_use_is_noticed(name):
    model, first, change, then = LATER[name]
    layer_factors(model, first)
    if change:
        change(model)
    assert_exact(model, then)


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e-13])
def test_small_uses_without_structure_count(size):
    hidden = lambda s, x: plain(s, x) + size * torch.einsum("ni,oi->no", x, s.a.weight)[:, :2].sin()  # noqa: E731
    model = two(hidden)
    assert layer_factors(model, X)[1]["a"].kinds["a.weight"] == "explicit"
    assert_exact(model, X)


def borrowed_biases(s, x):
    for weight, bias in ((s.u, s.b), (s.v, s.b), (s.w, s.b), (s.u, s.c)):
        x = torch.tanh(F.linear(x, weight, bias))
    return s.head(x.sum(1))[:, :2]


USES = {
    "biases borrowed between calls": (
        two(borrowed_biases, **{n: nn.Parameter(torch.randn(*k)) for n, k in
            {"u": (5, 5), "v": (5, 5), "w": (5, 5), "b": (5,), "c": (5,)}.items()}, head=nn.Linear(5, 2)),
        torch.randn(4, 2, 5, dtype=F64),
    ),
    "linear with a vector": (two(lambda s, x: F.linear(torch.tanh(s.a(x)), s.a.bias)), X),
    "names of arguments, sum": (two(lambda s, x: s.head(torch.add(input=torch.tanh(s.a(x)), other=s.a.bias))), X),
    "names of arguments, product": (two(lambda s, x: s.head(torch.mm(torch.tanh(s.a(x)), mat2=s.a.weight))), X),
    "vmap inside": (two(lambda s, x: s.head(torch.func.vmap(s.a, 1, 1)(x).tanh().mean(1))), torch.randn(4, 5, 3, dtype=F64)),
    "grad inside": (two(lambda s, x: torch.func.grad(lambda z: torch.tanh(s.a(z)).sum())(x)), X),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_uses(name):
    assert_exact(*USES[name])


@pytest.mark.parametrize("lengths", [(3, 1), (1, 3)])
def test_cross_gram_between_one_position_and_several(lengths):
    model = two(lambda s, x: s.head(torch.tanh(s.a(x)).mean(1)))
    one, other = (layer_factors(model, torch.randn(3, T, 3, dtype=F64))[1]["a"] for T in lengths)
    expected = torch.einsum("ncp,mdp->ncmd", one.dense(), other.dense())
    torch.testing.assert_close(one.gram(other), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["linear", "convolution", "elementwise"])
def test_a_function_of_the_user_may_bear_any_name(name):
    def function(x, weight):
        return x @ weight.mT

    function.__name__ = name
    function = structured(lambda x, delta: delta[..., None] * x[:, None, None])(function)
    assert_exact(two(lambda s, x: function(torch.tanh(s.a(x)), s.a.weight)), X)


REFUSED = {
    "integers": (lambda s, x: plain(s, x).argmax(1), X, "torch.int64"),
    "truth values": (lambda s, x: plain(s, x) > 0, X, "torch.bool"),
    "complex outputs": (lambda s, x: torch.fft.fft(plain(s, x)), X, "torch.complex128"),
    "no outputs": (lambda s, x: plain(s, x)[:, :0], X, r"\(4, 0\)"),
    "another dtype": (lambda s, x: plain(s, x).float(), X, "several dtypes"),
    "samples that are numbers, one not finite": (
        lambda s, x: plain(s, x[:, None].expand(-1, 3)), torch.tensor([1, float("nan")], dtype=F64), "sample 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_outputs_refused_by_name(name):
    forward, x, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        layer_factors(two(forward), x)
