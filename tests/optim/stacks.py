"""What the tests of stacked training share: stacks of networks with their data, and K separate runs as the reference."""

from copy import deepcopy

import torch
from torch import nn

from optim import Woodbury
from optim.stacks.stacked import StackedState, stacked_step
from tests.nt_kernel.cases import CASES, Custom, of
from tests.reference import trainable


def _recurrent(kind):
    return lambda: Custom(lambda s, x: s.o(s.r(x)[0][:, -1]), r=kind(3, 4, batch_first=True), o=nn.Linear(4, 2))


def _encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))


MAKES = {
    **{name: case.make for name, case in CASES.items() if case.output is None},
    "RNN": of(_recurrent(nn.RNN), 5, 3),
    "LSTM": of(_recurrent(nn.LSTM), 5, 3),
    "transformer layer": of(_encoder, 3, 4),
}


def half_square(y, a):
    """h = (1/N) Σ ½‖y_i − a_i‖²."""
    return 0.5 * (y - a).square().sum() / len(a)


def networks(name, K=3, dtype=torch.float64):
    """(model, params {name: [K, …]}, x (tuple of [K, N, …]), targets [K, N, …]), all K different."""
    model, x, _ = MAKES[name]()
    model, x = model.to(dtype), x if isinstance(x, tuple) else (x,)
    x = tuple(t.to(dtype) if t.is_floating_point() else t for t in x)
    draw = torch.Generator().manual_seed(1)

    def noise(t):
        return torch.randn(t.shape, generator=draw, dtype=t.dtype)

    with torch.no_grad():
        y = model(*x)
    params = {n: torch.stack([p + 0.3 * k * noise(p) for k in range(K)]) for n, p in trainable(model).items()}
    x = tuple(torch.stack([t + 0.2 * k * noise(t) if t.is_floating_point() else t for k in range(K)]) for t in x)
    return model, params, x, torch.stack([noise(y) for _ in range(K)])


def network(model, params, k):
    """Network k of the stack, as a module of its own."""
    model = deepcopy(model)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in params.items():
            own[name].copy_(p[k])
    return model


def train(model, params, x, targets, method, steps, loss=half_square, **options):
    """(params, state) after so many stacked steps."""
    state = StackedState()
    for _ in range(steps):
        params, state = stacked_step(model, params, state, x, targets, loss, method, **options)
    return params, state


def separate_runs(model, params, x, targets, make_optimizer, steps, loss=half_square):
    """The parameters of K separate runs, [K, …]; ``make_optimizer`` takes a network, ``x`` and ``targets`` the stack's."""
    ends = []
    for k in range(len(targets)):
        own = network(model, params, k)
        optimizer = make_optimizer(own)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(own(*(t[k] for t in x)), targets[k]).backward()
            optimizer.step()
        ends.append(trainable(own))
    return {name: torch.stack([end[name] for end in ends]) for name in params}


class Recursion:
    """momentum and decay by hand around a direction G⁻¹g, which the class gives as its own step with lr = 1."""

    def __init__(
        self, model, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, decay="decoupled", **kw
    ):
        self.model, self.lr, self.b, self.damp, self.nesterov = model, lr, momentum, dampening, nesterov
        self.wd, self.decay, self.v = weight_decay, decay, None
        self.inner = Woodbury(model, lr=1.0, check_step=False, **kw)

    def zero_grad(self):
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self):
        params = {n: p for n, p in self.model.named_parameters() if p.grad is not None}
        before = {n: p.clone() for n, p in params.items()}
        if self.decay == "riemannian":
            for p in params.values():
                p.grad += self.wd * p
        self.inner.step()
        d = {n: before[n] - p for n, p in params.items()}
        self.v = d if self.v is None else {n: self.b * self.v[n] + (1 - self.damp) * d[n] for n in d}
        for n, p in params.items():
            shrink = 1 - self.lr * self.wd if self.decay == "decoupled" else 1.0
            p.copy_(shrink * before[n] - self.lr * (d[n] + self.b * self.v[n] if self.nesterov else self.v[n]))
