"""Special uses of a network: each is exact to 1e-12, or refused with the name of the layer or parameter at fault."""

import re
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nt_kernel import generalized_ntk, layer_factors
from tests.nt_kernel.architectures import Architecture
from tests.nt_kernel.cases import F64, Custom, mlp
from tests.nt_kernel.exactness import TOLERANCE, factor_errors, kernel_errors, relative
from tests.nt_kernel.special_uses import EXACT, IN_PLACE, OldCube, cubed, hooked, special, two
from tests.thinned import thinned


def exact(a: Architecture) -> None:
    before = {name: (id(p), p.detach().clone()) for name, p in a.model.named_parameters()}
    buffers = {name: b.clone() for name, b in a.model.named_buffers()}
    errors = factor_errors(a) | kernel_errors(a, ["identity"])
    assert {what: e for what, e in errors.items() if not e <= TOLERANCE} == {}
    after = dict(a.model.named_parameters())
    assert list(after) == list(before), "parameters were lost"
    assert all(id(after[n]) == i and torch.equal(after[n], p) for n, (i, p) in before.items()), (
        "parameters were exchanged"
    )
    assert all(torch.equal(b, buffers[n]) for n, b in a.model.named_buffers()), "buffers were written to"


@pytest.mark.parametrize("name", thinned(EXACT, 3))
def test_exact(name):
    exact(EXACT[name]())


@pytest.mark.parametrize("last", [False, True], ids=["inside", "at the output"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_activations_behind_every_kind(name, last):
    a = IN_PLACE[name]()
    with torch.no_grad():
        size = a.model(a.x).flatten(1).shape[1]
    tail = [nn.ReLU(inplace=True), nn.Flatten()] + ([] if last else [nn.Linear(size, 2, dtype=F64)])
    exact(Architecture(nn.Sequential(a.model, *tail), a.x, a.other, {}))


def test_an_embedding_scaled_by_frequency_has_the_plain_jacobian():
    """``scale_grad_by_freq`` divides the gradient, not the Jacobian: the outputs do not know of it."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(9, 2)).to(F64)
    scaled = deepcopy(plain)
    scaled[0].scale_grad_by_freq = True
    x = torch.tensor([[0, 0, 1], [2, 0, 2]])
    expected, found = (layer_factors(model, x)[1]["0"].dense() for model in (plain, scaled))
    assert relative(found, expected) <= TOLERANCE


# --- refused --------------------------------------------------------------------------------------------------------


class Centre(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, x):
        return x - x.mean(0)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def within(layer: nn.Module, width: int = 4) -> nn.Module:
    """The layer two modules down: its name is "blocks.1.inner"."""
    block = Custom(lambda s, x: torch.tanh(s.inner(s.before(x))), before=nn.Linear(width, width), inner=layer)
    return Custom(
        lambda s, x: s.head(s.blocks(s.first(x))),
        first=nn.Linear(3, width),
        blocks=nn.Sequential(nn.Linear(width, width), block),
        head=nn.Linear(width, 2),
    ).to(F64)


def function(forward: Callable) -> nn.Module:
    return Custom(lambda s, x: forward(x))


def training(make: Callable) -> Callable:
    return lambda: make().train()


def evaluated(make: Callable) -> Callable:
    return lambda: make().eval()


def attention_over_samples():
    """[N, T, d] given to attention that expects [T, N, d]: samples attend to each other."""
    at = nn.MultiheadAttention(4, 2)
    return Custom(lambda s, x: s.head(s.at(x, x, x)[0].flatten(1)), at=at, head=nn.Linear(8, 2)).to(F64).eval()


def attention_in_training():
    at = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
    return Custom(lambda s, x: s.head(s.at(x, x, x)[0].flatten(1)), at=at, head=nn.Linear(8, 2)).to(F64).train()


def drawn_lstm():
    core = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)
    return Custom(lambda s, x: s.core(x)[0][:, -1], core=core).to(F64).train()


def complex_parameter():
    phase = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    return Custom(lambda s, x: s.a((x * s.phase).abs()), a=nn.Linear(3, 2, dtype=F64), phase=phase)


def lazy():
    return nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)).to(F64)


def lookup(**options):
    return nn.Sequential(nn.Embedding(5, 3, **options), nn.Flatten(), nn.Linear(6, 2)).to(F64)


def normal(*shape: int) -> Callable:
    return lambda: torch.randn(4, *shape, dtype=F64, generator=torch.Generator().manual_seed(0))


INNER = r"blocks\.1\.inner"
# name: (model, points, pattern of the message)
REFUSED = {
    "batch norm": (lambda: within(nn.BatchNorm1d(4)), normal(3), INNER),
    "batch norm as a function": (
        evaluated(lambda: within(function(lambda x: F.batch_norm(x, None, None, training=True)))),
        normal(3),
        INNER,
    ),
    "batch mean": (lambda: within(Centre()), normal(3), INNER),
    "softmax over the batch": (lambda: within(nn.Softmax(0)), normal(3), INNER),
    "softmax over the batch as a function": (lambda: within(function(lambda x: x.softmax(0))), normal(3), INNER),
    "normalised over the batch": (lambda: within(function(lambda x: F.normalize(x, dim=0))), normal(3), INNER),
    "largest of the batch": (lambda: within(function(lambda x: x - x.amax(0))), normal(3), INNER),
    "running sum over the batch": (lambda: within(function(lambda x: x.cumsum(0))), normal(3), INNER),
    "layer norm over the batch": (
        lambda: within(function(lambda x: F.layer_norm(x, x.shape))),
        normal(3),
        INNER,
    ),
    "neighbours in the batch": (lambda: within(function(lambda x: x + x.roll(1, 0))), normal(3), INNER),
    "attention over samples": (attention_over_samples, normal(2, 4), r"'at'"),
    "dropout": (lambda: within(nn.Dropout(0.5)), normal(3), INNER),
    "alpha dropout": (lambda: within(nn.AlphaDropout(0.5)), normal(3), INNER),
    "dropout as a function": (evaluated(lambda: within(function(lambda x: F.dropout(x, 0.5)))), normal(3), INNER),
    "randomised ReLU": (lambda: within(nn.RReLU()), normal(3), INNER),
    "noise": (evaluated(lambda: within(Noise())), normal(3), INNER),
    "attention with dropout": (attention_in_training, normal(2, 4), r"'at'"),
    "LSTM with dropout": (drawn_lstm, normal(2, 4), r"'core'"),
    "lazy layer": (lazy, normal(3), r"1\.weight"),
    "complex parameter": (complex_parameter, normal(3), "phase"),
    "embedding that rewrites its table": (
        lambda: lookup(max_norm=1.0),
        lambda: torch.tensor([[0, 1], [2, 2], [3, 4]]),
        r"'0'.*max_norm|max_norm.*'0",
    ),
}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    make, points, pattern = REFUSED[name]
    torch.manual_seed(0)
    model = make()
    state = {n: t.clone() for n, t in model.state_dict().items() if not isinstance(t, nn.UninitializedParameter)}
    rng, before = torch.get_rng_state(), hooks(model)
    for _ in range(2):  # and the refusal is not remembered as a permission
        with pytest.raises(ValueError, match=pattern):
            generalized_ntk(model, points())
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items()), "the model was changed"
    assert hooks(model) == before, "hooks were left behind"
    assert torch.equal(rng, torch.get_rng_state()) or "drop" in name or name in ("noise", "randomised ReLU")


# --- exact or refused, as torch allows ------------------------------------------------------------------------------


def scripted():
    return nn.Sequential(nn.Linear(3, 4), torch.jit.script(mlp(4, 4, 2).to(F64)))


def counting(s, x):
    s.count += 1
    return s.head(torch.tanh(s.a(x)))


def counted():
    model = two(counting)
    model.register_buffer("count", torch.zeros(()))
    return model


def branch_on_the_batch(s, x):
    h = torch.tanh(s.a(x))
    return s.head(h * s.gain if x.square().sum() > 0 else s.b(h))


def loop_on_the_values(s, x):
    h = s.a(x)
    while h.norm() > 0.5:
        h = h / 2
    return s.head(h * s.gain)


def inference_inside(s, x):
    with torch.inference_mode():
        h = torch.tanh(s.a(x))
    return s.head(h.clone() * s.b(x))


def number_inside(s, x):
    return s.head(s.a(x) * s.b.weight.norm().item() * s.gain)


def remembering(s, x):
    """Keeps the last hidden state as an attribute, as some recurrent code does."""
    s.state = torch.tanh(s.a(x))
    return s.head(s.state)


def gained(forward):
    return two(forward, gain=nn.Parameter(torch.rand(3)))


EITHER = {  # (model, samples as in `special`, pattern of the message where it is refused)
    "checkpoint": (special(lambda: within(Checkpointed(nn.Linear(4, 4), False))), r"blocks\.1\.inner"),
    "reentrant checkpoint": (special(lambda: within(Checkpointed(nn.Linear(4, 4), True))), r"blocks\.1\.inner"),
    "user's function in the old form": (special(lambda: cubed(OldCube)), r"'1'"),
    "backward hook": (special(lambda: hooked("register_full_backward_hook", lambda m, i, o: None)), r"'0'"),
    "scripted part": (special(scripted), r"'1"),
    "counter": (special(counted), r"layer '\.'|count"),
    "branch on the batch": (special(lambda: gained(branch_on_the_batch)), r"layer|gain"),
    "loop on the values": (special(lambda: gained(loop_on_the_values)), r"layer|gain"),
    "a number taken out": (special(lambda: gained(number_inside)), r"layer|gain|weight"),
    "inference_mode inside": (special(lambda: two(inference_inside)), r"layer"),
    "state kept as an attribute": (special(lambda: two(remembering)), r"layer|state"),
}


@pytest.mark.parametrize("name", EITHER)
def test_exact_or_refused(name):
    make, pattern = EITHER[name]
    a, refusal = make(), ""
    try:
        layer_factors(a.model, a.x)
    except ValueError as error:
        refusal = str(error)
    if not refusal:
        exact(a)
    else:
        assert re.search(pattern, refusal), refusal
