"""Models on which everything is compared with the dense reference; each case is built when asked for, from seed 0."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """``make()`` gives (model, x, other x); ``explicit`` names the parameters expected to have no structure."""

    make: Callable
    explicit: tuple[str, ...] = ()
    output: Callable | None = None
    token_route: str = ""  # "pairs" or "summed": which way the double sum over positions must be taken


class Custom(nn.Module):
    """A module with the given children (and parameters), whose forward is a function of (self, *inputs)."""

    def __init__(self, forward: Callable, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, *args):
        return self.function(self, *args)


def mlp(*widths, bias=True, activation=nn.Tanh):
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b, bias=bias), activation())]
    return nn.Sequential(*layers[:-1])


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def of(make_model, *shape, n=4, m=3):
    """(model, x [n, …], other x [m, …]), float64, eval mode."""

    def make():
        torch.manual_seed(0)
        model = make_model().to(F64).eval()
        return model, torch.randn(n, *shape, dtype=F64), torch.randn(m, *shape, dtype=F64)

    return make


def _tied():
    model = mlp(3, 4, 4, 4, 2)
    model[4].weight = model[2].weight
    return model


def _old_weight_norm():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def _hooked():
    model = mlp(3, 4, 2)
    model[0].register_forward_hook(lambda module, args, out: 2 * out.sin())
    return model


def _zero_gate():
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h + self.gate * torch.tanh(h @ self.a.weight))

    return Custom(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 2), gate=nn.Parameter(torch.zeros(())))


def _batchnorm():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def _attention():
    def forward(self, x):
        return self.out(self.at(x, x, x, need_weights=False)[0].mean(1))

    return Custom(forward, at=nn.MultiheadAttention(4, 2, batch_first=True), out=nn.Linear(4, 2))


def _pair_inputs():
    torch.manual_seed(0)
    model = Custom(lambda self, x, z: self.b(torch.tanh(self.a(x)) * z), a=nn.Linear(3, 4), b=nn.Linear(4, 2)).to(F64)
    draw = lambda n: (torch.randn(n, 3, dtype=F64), torch.randn(n, 4, dtype=F64))  # noqa: E731
    return model, draw(4), draw(3)


def _embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)).to(F64)
    return model, torch.tensor([[0, 1], [2, 2], [5, 0]]), torch.tensor([[3, 1], [1, 0]])


CASES = {
    "mlp": Case(of(lambda: mlp(3, 5, 4, 2), 3)),
    "no bias": Case(of(lambda: mlp(3, 5, 2, bias=False), 3)),
    "one sample": Case(of(lambda: mlp(3, 5, 2), 3, n=1)),
    "frozen weight": Case(of(lambda: frozen(mlp(3, 5, 4, 2), "2.weight"), 3)),
    "frozen biases": Case(of(lambda: frozen(mlp(3, 5, 2), "0.bias", "2.bias"), 3)),
    "frozen layer": Case(of(lambda: frozen(mlp(3, 5, 4, 2), "2.weight", "2.bias"), 3)),
    "biases only": Case(of(lambda: frozen(mlp(3, 5, 2), "0.weight", "2.weight"), 3)),
    "tied weights": Case(of(_tied, 3)),
    "layer used twice": Case(
        of(
            lambda: Custom(lambda s, x: s.b(torch.tanh(s.a(torch.tanh(s.a(x))))), a=nn.Linear(3, 3), b=nn.Linear(3, 2)),
            3,
        ),
    ),
    "unused layer": Case(of(lambda: Custom(lambda s, x: s.b(x), a=nn.Linear(3, 3), b=nn.Linear(3, 2)), 3)),
    "weight read functionally": Case(
        of(lambda: Custom(lambda s, x: F.linear(torch.tanh(s.a(x)), s.a.weight), a=nn.Linear(3, 3)), 3),
    ),
    "behind a gate that is zero": Case(of(_zero_gate, 3), explicit=("a.weight",)),
    "skip connection": Case(
        of(lambda: Custom(lambda s, x: s.a(x) + s.b(torch.tanh(x)), a=nn.Linear(3, 2), b=nn.Linear(3, 2)), 3)
    ),
    "residual": Case(
        of(
            lambda: Custom(
                lambda s, x: (lambda h: s.b(h + torch.tanh(s.m(h))))(s.a(x)),
                a=nn.Linear(3, 4),
                m=nn.Linear(4, 4),
                b=nn.Linear(4, 2),
            ),
            3,
        )
    ),
    "hooked layer": Case(of(_hooked, 3)),
    "old weight_norm": Case(of(_old_weight_norm, 3), explicit=("0.weight_g", "0.weight_v")),
    "weight_norm": Case(
        of(
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)), 3
        ),
        explicit=("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
    ),
    "layer norm": Case(
        of(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), 3),
    ),
    "batch norm in eval": Case(of(_batchnorm, 3)),
    "bare parameters": Case(
        of(
            lambda: Custom(
                lambda s, x: s.scale * s.a(x * s.gain),
                a=nn.Linear(3, 2),
                scale=nn.Parameter(torch.tensor(1.5)),
                gain=nn.Parameter(torch.rand(3)),
            ),
            3,
        ),
    ),
    "output [N]": Case(of(lambda: nn.Sequential(mlp(3, 4, 1), nn.Flatten(0)), 3)),
    "output [N, T, C]": Case(of(lambda: mlp(3, 4, 2), 3, 3, n=3)),
    "root linear": Case(of(lambda: nn.Linear(3, 2), 3)),
    "root linear without bias": Case(of(lambda: nn.Linear(3, 2, bias=False), 3)),
    "root linear, bias only": Case(of(lambda: frozen(nn.Linear(3, 2), "weight"), 3)),
    "root linear, tokens": Case(of(lambda: nn.Linear(3, 2), 2, 3, n=3)),
    "tokens, pairs": Case(
        of(lambda: nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)), 2, 9), token_route="pairs"
    ),
    "tokens, summed": Case(
        of(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)), 6, 2),
        token_route="summed",
    ),
    "tokens, no bias, pairs": Case(
        of(lambda: nn.Sequential(nn.Linear(9, 8, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)), 2, 9),
        token_route="pairs",
    ),
    "tokens, bias only": Case(
        of(lambda: frozen(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)), "0.weight"), 3, 2)
    ),
    "two token dimensions": Case(
        of(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), 2, 3, 3)
    ),
    "time first, T = N": Case(  # the first dimension inside is not the samples, though its size is theirs
        of(
            lambda: Custom(
                lambda s, x: s.b(torch.tanh(s.a(x.transpose(0, 1))).mean(0)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)
            ),
            4,
            3,
            m=4,
        ),
    ),
    "samples and tokens merged": Case(
        of(
            lambda: Custom(
                lambda s, x: s.b(torch.tanh(s.a(x.flatten(0, 1))).unflatten(0, (-1, 2)).mean(1)),
                a=nn.Linear(3, 4),
                b=nn.Linear(4, 2),
            ),
            2,
            3,
        ),
    ),
    "attention": Case(of(_attention, 3, 4)),
    "convolution": Case(
        of(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)), 1, 4, 4),
    ),
    "embedding": Case(_embedding),
    "two inputs": Case(_pair_inputs),
    "output chosen": Case(
        of(lambda: Custom(lambda s, x: {"loss": 0, "y": s.a(x)}, a=nn.Linear(3, 2)), 3), output=lambda out: out["y"]
    ),
    "in-place activation": Case(of(lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)), 3)),
    "in-place activation at the output": Case(of(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)), 3)),
}
