"""Special uses of a network that are exact: weights read behind the module's back, tied, frozen, rewritten in place, compiled.

A table's entry is () -> Architecture; ``test_refused_models`` goes through the tables.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.nt_kernel.architectures import Architecture, settled
from tests.nt_kernel.cases import F64, Custom, frozen, mlp


def special(make: Callable, *shape: int, n: int = 3, m: int = 2, output=None, draw=None, change=None) -> Callable:
    """() -> Architecture; a sample is a normal draw of ``shape`` ([3] if none is given), or what ``draw(n)`` gives.

    ``change(model)`` makes of the model what is to be tested; the reference is taken of the model before.
    """

    def build() -> Architecture:
        torch.manual_seed(0)
        plain = settled(make())
        model = change(deepcopy(plain)) if change else plain
        samples = draw or (lambda count: torch.randn(count, *(shape or (3,)), dtype=F64))
        return Architecture(model, samples(n), samples(m), {}, output=output, plain=plain)

    return build


def two(forward: Callable, **parts) -> nn.Module:
    """Two square layers and a head, put together by ``forward``."""
    return Custom(forward, **({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "head": nn.Linear(3, 2)} | parts))


def ids(*shape: int) -> Callable:
    return lambda n: torch.randint(0, 5, (n, *shape))


# --- exact ----------------------------------------------------------------------------------------------------------


def low_rank_update():
    forward = lambda s, x: s.head(torch.tanh(F.linear(x, s.a.weight + s.up @ s.down, s.a.bias)))  # noqa: E731
    return frozen(two(forward, up=nn.Parameter(torch.randn(3, 1)), down=nn.Parameter(torch.randn(1, 3))), "a.weight")


def transposed_tie():
    return two(lambda s, x: F.linear(torch.tanh(s.a(x)), s.a.weight.T, s.b.bias))


def tied_embedding():
    model = Custom(lambda s, t: s.head(torch.tanh(s.embed(t))), embed=nn.Embedding(5, 3), head=nn.Linear(3, 5, False))
    model.head.weight = model.embed.weight
    return model


def tied_convolutions():
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Tanh(), nn.Conv1d(2, 2, 3, stride=2), nn.Flatten())
    model[2].weight = model[0].weight
    return model


def registered_twice():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2))


def pruned():
    model = mlp(3, 4, 2)
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


def orthogonal():
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2))


def old_spectral_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x).sin()


class Cube(torch.autograd.Function):
    """A user's function in the form that torch.func can differentiate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class OldCube(torch.autograd.Function):
    """The same in the older form, which it cannot."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class CubeLayer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def cubed(function):
    return nn.Sequential(nn.Linear(3, 3), CubeLayer(function), nn.Linear(3, 2))


def written_into(s, x):
    h = s.a(x)
    h[:, 0] = 0
    h += s.b(x)
    return s.head(h.mul_(2).tanh_())


def partly_without_grad(s, x):
    with torch.no_grad():
        h = torch.tanh(s.a(x))
    return s.head(h * s.b(x))


def read_out_behind(s, x):
    return s.head(torch.tanh(s.a(x))) * s.a.weight.square().sum() + torch.einsum("ni,oi->no", x, s.b.weight[:2])


def partly_detached(s, x):
    return s.head(F.linear(s.a(x), s.a.weight.detach(), s.b.bias))


def masked_attention():
    def forward(s, x, hidden):
        return s.head(s.at(x, x, x, key_padding_mask=hidden, need_weights=False)[0].mean(1))

    return Custom(forward, at=nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True), head=nn.Linear(4, 2))


def masked_points(n):
    hidden = torch.zeros(n, 3, dtype=torch.bool)
    hidden[::2, 2] = True
    return torch.randn(n, 3, 4, dtype=F64), hidden


def chosen_per_sample(s, x):
    return s.head(torch.where(x[:, :1] > 0, torch.tanh(s.a(x)), s.b(x)))


def decoder():
    def forward(s, x):
        memory = s.a(x)
        return s.layer(torch.tanh(memory), memory).mean(1)

    layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
    return Custom(forward, a=nn.Linear(2, 4), layer=layer)


def whole_transformer():
    core = nn.Transformer(4, 2, 1, 1, 5, batch_first=True)
    return Custom(lambda s, x: s.core(s.a(x), torch.tanh(s.a(x)))[:, 0], a=nn.Linear(2, 4), core=core)


def stacked_lstm():
    core = nn.LSTM(2, 4, num_layers=2, bidirectional=True, proj_size=2, dropout=0.3)  # time first, as torch has it
    return Custom(lambda s, x: s.head(s.core(x.transpose(0, 1))[0][-1]), core=core, head=nn.Linear(4, 2))


def spectral():
    def forward(s, x):
        return s.head(torch.fft.irfft(torch.fft.rfft(s.a(x)) * s.filter, n=3))

    return two(forward, filter=nn.Parameter(torch.randn(2)))


def with_integer_parameter():
    order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
    return two(lambda s, x: s.head(torch.tanh(s.a(x))[:, s.order]), order=order)


def many_bare_parameters():
    gains = nn.ParameterList([nn.Parameter(torch.rand(3)) for _ in range(2)])
    shifts = nn.ParameterDict({"first": nn.Parameter(torch.rand(3)), "empty": nn.Parameter(torch.rand(0, 3))})
    return two(
        lambda s, x: s.head(s.gains[0] * s.a(x) + s.shifts["first"] * s.gains[1] + s.shifts["empty"].sum()),
        gains=gains,
        shifts=shifts,
    )


def hypernetwork():
    return two(
        lambda s, x: torch.einsum("no,noi,ni->no", s.head(x), s.make(x).unflatten(1, (2, 3)), x), make=nn.Linear(3, 6)
    )


def ineffective_bias():
    """The LayerNorm takes every shift away again: the derivative by the bias is rounding, in place of zero."""
    forward = lambda s, x: s.head(s.norm(x + s.mix(torch.tanh(x).mT).mT).flatten(1))  # noqa: E731
    return Custom(forward, mix=frozen(nn.Linear(1, 1), "weight"), norm=nn.LayerNorm(3), head=nn.Linear(3, 2))


def ineffective_biases():
    """Shifts of all channels of a token, removed by the norm: their derivatives are rounding."""
    return Custom(
        lambda s, x: s.head(torch.tanh(s.norm(x + s.mix(torch.tanh(x).mT).mT)).flatten(1)),
        mix=nn.Linear(2, 2),
        norm=nn.LayerNorm(4),
        head=nn.Linear(8, 2),
    )


def initialised_lazily():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    model(torch.zeros(1, 3))
    return model


def hooked(register: str, hook: Callable):
    model = mlp(3, 4, 2)
    getattr(model[0], register)(hook)
    return model


def by_graph():
    return torch.fx.symbolic_trace(mlp(3, 4, 2))


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_in_part(model):
    model[0].compile(backend="eager")
    return model


def dense_to_sparse(model):
    model[0].sparse = True
    return model


EXACT = {
    "low-rank update": special(low_rank_update),
    "weight used transposed": special(transposed_tie),
    "weight read, sliced, contracted": special(lambda: two(read_out_behind)),
    "weight partly detached": special(lambda: two(partly_detached)),
    "weight as keyword": special(lambda: two(lambda s, x: s.head(F.linear(input=s.a(input=x), weight=s.b.weight)))),
    "weight of one linear as a convolution": special(
        lambda: two(lambda s, x: s.head(F.conv1d(s.a(x)[..., None], s.a.weight[..., None])[..., 0]))
    ),
    "weights made by a network": special(hypernetwork),
    "tied embedding and head": special(tied_embedding, draw=ids()),
    "tied convolutions": special(tied_convolutions, 2, 7),
    "registered twice": special(registered_twice),
    "pruned": special(pruned),
    "orthogonal": special(orthogonal),
    "spectral norm": special(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2))),
    "old spectral norm": special(old_spectral_norm),
    "weight norm of a convolution": special(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), nn.Tanh(), nn.Flatten()), 2, 4
    ),
    "subclass of Linear": special(lambda: nn.Sequential(Doubled(3, 4), nn.Linear(4, 2))),
    "pre-hook": special(lambda: hooked("register_forward_pre_hook", lambda m, a: (a[0].sin(),))),
    "user's function": special(lambda: cubed(Cube)),
    "traced by fx": special(by_graph),
    "compiled": special(lambda: torch.compile(mlp(3, 4, 2), backend="eager")),
    "compiled in place": special(lambda: mlp(3, 4, 2), change=compiled_in_place),
    "compiled in part": special(lambda: mlp(3, 4, 2), change=compiled_in_part),
    "initialised lazily": special(initialised_lazily),
    "written into": special(lambda: two(written_into)),
    "no_grad inside": special(lambda: two(partly_without_grad)),
    "branch chosen per sample": special(lambda: two(chosen_per_sample)),
    "frozen convolution weight": special(
        lambda: frozen(nn.Sequential(nn.Conv1d(2, 2, 2), nn.Tanh(), nn.Conv1d(2, 1, 2), nn.Flatten()), "0.weight"), 2, 4
    ),
    "frozen gain": special(
        lambda: frozen(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "1.weight")
    ),
    "frozen embedding": special(
        lambda: frozen(nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)), "0.weight"), draw=ids(2)
    ),
    "frozen in-projection": special(
        lambda: Custom(
            lambda s, x: s.head(s.at(x, x, x)[0].mean(1)),
            at=frozen(nn.MultiheadAttention(4, 2, batch_first=True), "in_proj_weight"),
            head=nn.Linear(4, 2),
        ),
        *(3, 4),
    ),
    "sparse embedding": special(
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)), draw=ids(2), change=dense_to_sparse
    ),
    "bag of embeddings": special(lambda: nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 2)), draw=ids(4)),
    "PReLU": special(lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))),
    "bilinear": special(lambda: two(lambda s, x: s.head(s.pair(s.a(x), s.b(x))), pair=nn.Bilinear(3, 3, 3))),
    "mask as second input": special(masked_attention, draw=masked_points),
    "decoder layer": special(decoder, 3, 2),
    "whole transformer": special(whole_transformer, 3, 2),
    "stacked LSTM, time first": special(stacked_lstm, 3, 2),
    "Fourier transform": special(spectral),
    "frozen integer parameter": special(with_integer_parameter),
    "lists of parameters": special(many_bare_parameters),
    "bias without effect": special(ineffective_bias, 1, 3),
    "biases without effect": special(ineffective_biases, 2, 4),
    "nested outputs": special(
        lambda: two(lambda s, x: {"y": (s.a(x), s.head(torch.tanh(s.b(x))))}), output=lambda out: out["y"][1]
    ),
    "output [N, T, C]": special(lambda: mlp(3, 4, 2), 2, 3),
    "output [N, C, H, W]": special(lambda: nn.Conv2d(1, 2, 2), 1, 3, 3),
    "a sample and its number": special(
        lambda: two(lambda s, x, k: s.head(torch.tanh(s.a(x)) * k[:, None])),
        draw=lambda n: (torch.randn(n, 3, dtype=F64), torch.arange(1, n + 1)),
    ),
}

IN_PLACE = {
    "linear": special(lambda: nn.Linear(3, 4)),
    "linear on tokens": special(lambda: nn.Linear(3, 4), 2, 3),
    "conv1d": special(lambda: nn.Conv1d(2, 3, 2), 2, 4),
    "conv2d": special(lambda: nn.Conv2d(2, 2, 2, groups=2), 2, 3, 3),
    "conv3d": special(lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="circular"), 1, 2, 2, 2),
    "transposed convolution": special(lambda: nn.ConvTranspose1d(2, 2, 2), 2, 3),
    "layer norm": special(lambda: nn.LayerNorm(4), 4),
    "rms norm": special(lambda: nn.RMSNorm(4), 4),
    "group norm": special(lambda: nn.GroupNorm(1, 4), 4),
    "batch norm": special(lambda: nn.BatchNorm1d(4), 4),
    "instance norm": special(lambda: nn.InstanceNorm1d(2, affine=True), 2, 4),
    "embedding": special(lambda: nn.Embedding(5, 3), draw=ids(2)),
    "attention": special(
        lambda: Custom(lambda s, x: s.at(x, x, x)[0], at=nn.MultiheadAttention(4, 2, batch_first=True)), 3, 4
    ),
    "cell": special(lambda: nn.GRUCell(3, 4)),
    "bilinear": special(lambda: Custom(lambda s, x: s.pair(x, x), pair=nn.Bilinear(3, 3, 3))),
    "gain": special(lambda: Custom(lambda s, x: s.gain * x, gain=nn.Parameter(torch.rand(3)))),
}
