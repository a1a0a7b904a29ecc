"""Architectures drawn at random by hypothesis, and fixed modern ones; each with two point sets, masses and expected kinds.

A network is drawn as a chain of blocks. Every block takes the shape of one sample and gives a module, the new shape and
a line of its story; what a block is made of is drawn with it (strides, paddings, groups, sharing, frozen parameters).
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.nt_kernel.cases import F64, Custom
from tests.reference import layers_of, trainable

KINDS_ARE_CHECKED = True

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
KINDS = {
    (nn.Linear,): "linear",
    CONVOLUTIONS: "convolution",
    (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *BATCH_NORMS, *INSTANCE_NORMS): "normalisation",
    (nn.Embedding,): "embedding",
    (nn.RNNBase, nn.RNNCellBase): "linear",
    TRANSPOSED: "explicit",
}


@dataclass(frozen=True)
class Architecture:
    """``x`` and ``other`` are point sets of different sizes; a parameter missing in ``kinds`` may be seen either way.

    ``plain`` is the same network, parameter by parameter, where torch.func cannot differentiate ``model`` as it stands.
    """

    model: nn.Module
    x: Tensor | tuple
    other: Tensor | tuple
    kinds: dict[str, str]
    mass: dict[str, float] | float = 1.0
    story: str = ""
    output: Callable | None = None
    plain: nn.Module | None = None

    def _repr_pretty_(self, printer, cycle: bool) -> None:  # what hypothesis prints of a failing one
        printer.text(self.story)


def expected_kinds(model: nn.Module, **known: str) -> dict[str, str]:
    """{parameter: kind} by the type of the module that owns it, then ``known`` (dots written as two underscores)."""
    kinds = {}
    for layer, names in layers_of(model).items():
        module = model.get_submodule("" if layer == "." else layer)
        for types, kind in KINDS.items():
            if isinstance(module, types):
                kinds |= dict.fromkeys(names, kind)
        if isinstance(module, nn.MultiheadAttention):
            fused = [n for n in names if n.endswith("weight") or module.in_proj_weight is not None]
            kinds |= dict.fromkeys(fused, "linear")
    return kinds | {name.replace("__", "."): kind for name, kind in known.items()}


def settled(model: nn.Module) -> nn.Module:
    """In eval mode and float64, with normalisations that do something: gains, offsets and statistics drawn."""
    for module in model.modules():
        if isinstance(module, tuple(t for types, kind in KINDS.items() if kind == "normalisation" for t in types)):
            for p in module.parameters(recurse=False):
                p.data.add_(0.3 * torch.randn_like(p))
        if isinstance(module, BATCH_NORMS):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.to(F64).eval()


# --- blocks: (draw, shape of a sample) -> (module, new shape, story) ------------------------------------------------

ACTIVATIONS = {
    "tanh": lambda inplace: nn.Tanh(),
    "relu": nn.ReLU,
    "leaky": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "elu": lambda inplace: nn.ELU(inplace=inplace),
    "silu": nn.SiLU,
    "gelu": lambda inplace: nn.GELU(),
    "softplus": lambda inplace: nn.Softplus(),
}


def activation(draw):
    """In place on what the block before has made, in every second network where that can be."""
    name, inplace = draw(st.sampled_from(list(ACTIVATIONS))), draw(st.booleans())
    return ACTIVATIONS[name](inplace), f" {name}{' in place' * inplace}"


def activated(block):
    """The block, and an activation behind it in two cases of three."""

    def drawn(draw, shape):
        module, shape, story = block(draw, shape)
        if draw(st.integers(0, 2)):
            after, more = activation(draw)
            module, story = nn.Sequential(module, after), story + more
        return module, shape, story

    return drawn


def linear(draw, shape):
    width, bias = draw(st.integers(3, 5)), draw(st.booleans())
    return nn.Linear(shape[-1], width, bias), (*shape[:-1], width), f"linear {width}{'' if bias else ' without bias'}"


def square_linear(draw, shape):
    return nn.Linear(shape[-1], shape[-1]), shape, "linear"


def convolution_settings(draw, channels: int, sizes: tuple[int, ...]):
    """(keyword arguments, new sizes): any stride, padding, padding mode, dilation and groups that the sizes allow."""
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", "valid", "number"]))
    dilation = [draw(st.integers(1, 2)) for _ in sizes]
    kernel = [min(draw(st.integers(1, 3)), (n - 1) // d + 1) for n, d in zip(sizes, dilation, strict=True)]
    stride = [1 if padding == "same" else draw(st.integers(1, 2)) for _ in sizes]
    pads = [0] * len(sizes)
    if padding == "number":
        pads = padding = tuple(draw(st.integers(0, min(2, n - 1))) for n in sizes)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    after = [(n + 2 * p - r - 1) // s + 1 for n, p, r, s in zip(sizes, pads, reach, stride, strict=True)]
    settings = {
        "kernel_size": tuple(kernel),
        "stride": tuple(stride),
        "padding": padding,
        "dilation": tuple(dilation),
        "groups": groups,
        "padding_mode": mode,
        "bias": draw(st.booleans()),
    }
    return settings, sizes if padding == "same" else tuple(after)


def convolution(draw, shape):
    channels, *sizes = shape
    settings, after = convolution_settings(draw, channels, tuple(sizes))
    out = settings["groups"] * draw(st.integers(1, max(1, 4 // settings["groups"])))
    module = CONVOLUTIONS[len(sizes) - 1](channels, out, **settings)
    return module, (out, *after), f"{len(sizes)}d convolution {out} {settings}"


def square_convolution(draw, shape):
    channels, *sizes = shape
    kernel, mode = draw(st.integers(1, 3)), draw(st.sampled_from(["zeros", "circular"]))
    kernel = min(kernel, *sizes)
    module = CONVOLUTIONS[len(sizes) - 1](channels, channels, kernel, padding="same", padding_mode=mode)
    return module, shape, f"same convolution {kernel} {mode}"


def transposed_convolution(draw, shape):
    channels, *sizes = shape
    stride, kernel = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, channels]))
    module = TRANSPOSED[len(sizes) - 1](channels, groups * (1 + (groups == 1)), kernel, stride, groups=groups)
    after = [(n - 1) * stride + kernel for n in sizes]
    return module, (module.out_channels, *after), f"transposed convolution {kernel}, stride {stride}, groups {groups}"


def feature_norm(draw, shape):
    name = draw(st.sampled_from(["layer", "rms", "layer, whole sample"]))
    normalized = shape if "whole" in name else shape[-1:]
    return (nn.RMSNorm if name == "rms" else nn.LayerNorm)(normalized), shape, f"{name} norm"


def channel_norm(draw, shape):
    """Not with fewer than four numbers to a group: a norm of two has no derivative but that of its ε."""
    channels, *sizes = shape
    positions = torch.Size(sizes).numel()
    known = ["batch", "layer"] if channels * positions >= 4 else ["batch"]
    known += ["group"] * any(channels % g == 0 and channels // g * positions >= 4 for g in range(1, channels + 1))
    known += ["instance"] * (positions >= 4)
    name = draw(st.sampled_from(known))
    if name == "batch":
        module = BATCH_NORMS[max(len(sizes) - 1, 0)](channels)
    elif name == "instance":
        module = INSTANCE_NORMS[len(sizes) - 1](channels, affine=True)
    elif name == "layer":
        module = nn.LayerNorm(shape)
    else:
        choices = [g for g in range(1, channels + 1) if channels % g == 0 and channels // g * positions >= 4]
        module = nn.GroupNorm(draw(st.sampled_from(choices)), channels)
    return module, shape, f"{name} norm"


def pooling(draw, shape):
    channels, *sizes = shape
    dims, name = len(sizes), draw(st.sampled_from(["Avg", "Max", "AdaptiveAvg"]))
    if min(sizes) < 2 or name == "AdaptiveAvg":
        to = min(2, *sizes)
        return getattr(nn, f"AdaptiveAvgPool{dims}d")(to), (channels, *[to] * dims), f"adaptive pooling to {to}"
    module = getattr(nn, f"{name}Pool{dims}d")(2)
    return module, (channels, *[n // 2 for n in sizes]), f"{name} pooling"


def attention(draw, shape):
    T, d = shape
    heads = draw(st.sampled_from([h for h in range(1, d + 1) if d % h == 0]))
    causal, weights, bias, wide = (draw(st.booleans()) for _ in range(4))
    at = nn.MultiheadAttention(d, heads, bias=bias, batch_first=True, kdim=2 * d if wide else None)
    mask = torch.triu(torch.ones(T, T, dtype=torch.bool), 1) if causal else None
    key = (lambda x: torch.cat([x, x.tanh()], -1)) if wide else (lambda x: x)
    module = Custom(lambda s, x: x + s.at(x, key(x), x, need_weights=weights, attn_mask=mask)[0], at=at)
    return (
        module,
        shape,
        f"attention{' causal' * causal}{' with weights' * weights}{' wide keys' * wide}, {heads} heads",
    )


def token_mixing(draw, shape):
    return Custom(lambda s, x: x + s.mix(x.mT).mT, mix=nn.Linear(shape[0], shape[0])), shape, "mixing of tokens"


def recurrent_module(draw, shape):
    T, d = shape
    name, both = draw(st.sampled_from(["RNN", "GRU", "LSTM"])), draw(st.booleans())
    inner = getattr(nn, name)(d, 3, batch_first=True, bidirectional=both)
    return Custom(lambda s, x: s.inner(x)[0], inner=inner), (T, 6 if both else 3), f"{name}{' both ways' * both}"


def recurrent_cell(draw, shape):
    """A cell unrolled over the tokens: one module, T calls."""
    name = draw(st.sampled_from(["RNNCell", "GRUCell", "LSTMCell"]))

    def unrolled(s, x):
        state, seen = None, []
        for t in range(x.shape[1]):
            state = s.cell(x[:, t], state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(seen, 1)

    return Custom(unrolled, cell=getattr(nn, name)(shape[1], 3)), (shape[0], 3), f"{name} over the tokens"


def bare_parameters(draw, shape):
    name = draw(st.sampled_from(["gain", "offset", "gate"]))
    if name == "offset":
        return Custom(lambda s, x: x + s.p, p=nn.Parameter(torch.randn(shape))), shape, "offset"
    size = {"gain": (shape[0],) + (1,) * (len(shape) - 1), "gate": ()}[name]
    return Custom(lambda s, x: x * s.p, p=nn.Parameter(1 + 0.3 * torch.randn(size))), shape, name


def matrix_parameter(draw, shape):
    W = nn.Parameter(torch.randn(shape[-1], 3) / shape[-1] ** 0.5)
    return Custom(lambda s, x: x @ s.p, p=W), (*shape[:-1], 3), "product with a bare parameter"


def residual(block):
    def drawn(draw, shape):
        inner, _, story = block(draw, shape)
        return Custom(lambda s, x: x + torch.tanh(s.inner(x)), inner=inner), shape, f"residual ({story})"

    return drawn


def branches(block):
    def drawn(draw, shape):
        a, _, first = block(draw, shape)
        b, _, second = block(draw, shape)
        axis = 1 if len(shape) > 2 else -1
        sizes = list(shape)
        sizes[axis - 1 if axis > 0 else axis] *= 2
        module = Custom(lambda s, x: torch.cat([torch.tanh(s.a(x)), s.b(x)], axis), a=a, b=b)
        return module, tuple(sizes), f"branches ({first} | {second})"

    return drawn


def repeated(block):
    def drawn(draw, shape):
        inner, _, story = block(draw, shape)
        times, after = draw(st.integers(2, 3)), activation(draw)

        def forward(s, x):
            for _ in range(times):
                x = s.after(s.inner(x))
            return x

        return Custom(forward, inner=inner, after=after[0]), shape, f"{times} times ({story}{after[1]})"

    return drawn


def tied(block):
    def drawn(draw, shape):
        a, _, story = block(draw, shape)
        b = deepcopy(a)
        b.bias.data.normal_()
        b.weight = a.weight
        return Custom(lambda s, x: s.b(torch.tanh(s.a(x))), a=a, b=b), shape, f"tied ({story})"

    return drawn


def around(block) -> list:
    return [residual(block), branches(block), repeated(block), tied(block)]


VECTOR = [activated(b) for b in (linear, feature_norm, channel_norm, channel_norm, bare_parameters, matrix_parameter)]
TOKENS = [activated(b) for b in (linear, feature_norm, token_mixing, bare_parameters, matrix_parameter)]
TOKENS += [attention, attention]
RECURRENT = [recurrent_module, recurrent_cell]
MAP = [activated(b) for b in (convolution, convolution, channel_norm, channel_norm, transposed_convolution)]
MAP += [pooling, activated(bare_parameters)]
BLOCKS = {1: VECTOR + around(square_linear), 2: TOKENS + around(square_linear), 3: MAP + around(square_convolution)}


# --- networks -------------------------------------------------------------------------------------------------------

ENTRIES = ("vector", "tokens", "ids", "recurrent", "map1", "map2", "map3")


def first_block(draw, entry: str):
    """(module or None, shape behind it, story, maker of N samples)."""
    if entry == "ids":
        T, d, padding = draw(st.integers(1, 4)), draw(st.integers(3, 4)), draw(st.sampled_from([None, 0, -1]))
        ids = lambda n: torch.randint(0, 5, (n, T))  # noqa: E731
        return nn.Embedding(5, d, padding_idx=padding), (T, d), f"embedding, padding {padding}", ids
    shape = {"vector": (4,), "tokens": (draw(st.integers(1, 4)), 4)}.get(entry)
    if shape is None:
        dims = int(entry[-1])
        shape = (draw(st.integers(1, 4)), *(draw(st.integers(3, 7 - dims)) for _ in range(dims)))
    block = activated(convolution if len(shape) > 1 and entry != "tokens" else linear)
    return *block(draw, shape), lambda n: torch.randn(n, *shape, dtype=F64)


def head(draw, shape, per_token: bool):
    """Down to C outputs; of tokens, sometimes C for each."""
    C = draw(st.integers(1, 3))
    if per_token and draw(st.booleans()):
        return nn.Linear(shape[-1], 1, draw(st.booleans())), "1 output per token"
    if len(shape) > 1 and draw(st.booleans()):
        keep = 1 if per_token else -1
        pool = lambda s, x: s.readout(x.mean(1) if keep == 1 else x.flatten(2).mean(2))  # noqa: E731
        return Custom(pool, readout=nn.Linear(shape[-1] if per_token else shape[0], C)), f"mean to {C}"
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), C, draw(st.booleans()))), f"flat to {C}"


@st.composite
def architectures(draw, entry: str):
    """A network for inputs of kind ``entry``: one of ``ENTRIES``."""
    recurrent, entry = entry == "recurrent", "tokens" if entry == "recurrent" else entry
    torch.manual_seed(draw(st.integers(0, 10_000)))
    module, shape, story, samples = first_block(draw, entry)
    modules, stories, per_token = [module], [story], entry in ("tokens", "ids")
    kind = 1 if entry == "vector" else 2 if per_token else 3
    for i in range(draw(st.integers(1, 3))):
        module, shape, story = draw(st.sampled_from(RECURRENT if recurrent and i == 0 else BLOCKS[kind]))(draw, shape)
        modules.append(module)
        stories.append(story)
    module, story = head(draw, shape, per_token)
    model = settled(nn.Sequential(*modules, module))
    names = list(trainable(model))
    frozen = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if draw(st.booleans()) else []
    for name in frozen[: len(names) - 1]:
        model.get_parameter(name).requires_grad_(False)
    mass = {layer: draw(st.sampled_from([0.3, 1.0, 2.5])) for layer in layers_of(model)}
    N = draw(st.integers(1, 4))
    M = draw(st.integers(1, 4).filter(lambda m: m != N))
    story = "; ".join([*stories, story, f"frozen: {frozen}", f"N = {N}, {M}"])
    return Architecture(model, samples(N), samples(M), expected_kinds(model), mass, story)
