"""The timed networks in JAX, in the layouts that suit it: ``x @ w`` with w [d, o], images NHWC, filters HWIO.

neural-tangents' structured mode is two orders slower on ``x @ w.T``: this is fair play, not taste. Parameters keep the
names that they have in torch.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Linear weights are stored [o, d]; embeddings and positions are no products and stay as they are.
TABLES = ("embedding.weight", "positions")


def build(kind, activation, arrays, x):
    """(f(parameters, x), parameters, x) from arrays by torch's names, in torch's layouts."""
    arrays = {name: jnp.asarray(lay_out(name, a)) for name, a in arrays.items() if a.dtype.kind == "f"}
    fixed = {name: a for name, a in arrays.items() if "running_" in name}
    trained = {name: a for name, a in arrays.items() if name not in fixed}
    forward = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "transformer": transformer}[kind]

    def f(p, x):
        return forward({**fixed, **p}, x, ACTIVATIONS[activation])

    return f, trained, jnp.asarray(x.transpose(0, 2, 3, 1).copy() if x.ndim == 4 else x)


def lay_out(name, array):
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0).copy()
    return array.T.copy() if array.ndim == 2 and name not in TABLES else array


ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


def linear(p, name, x):
    return x @ p[name + ".weight"] + p[name + ".bias"]


def conv(p, name, x, stride=1):
    size = p[name + ".weight"].shape[0]
    padding = [(size // 2, size // 2)] * 2
    y = lax.conv_general_dilated(
        x, p[name + ".weight"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + p[name + ".bias"] if name + ".bias" in p else y


def max_pool(x):
    return lax.reduce_window(x, -float("inf"), lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def mlp(p, x, act):
    layers = sorted({int(name.split(".")[0]) for name in p})
    for i in layers[:-1]:
        x = act(linear(p, str(i), x))
    return linear(p, str(layers[-1]), x)


def cnn(p, x, act):
    x = max_pool(act(conv(p, "0", x)))
    x = max_pool(act(conv(p, "3", x)))
    # torch flattens channels first, and the linear layer's rows are in that order.
    return linear(p, "7", x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))


def batch_norm(p, name, x):
    scale = p[name + ".weight"] * (p[name + ".running_var"] + 1e-5) ** -0.5
    return (x - p[name + ".running_mean"]) * scale + p[name + ".bias"]


def resnet(p, x, act):
    x = act(batch_norm(p, "1", conv(p, "0", x)))
    blocks = sorted({name.split(".")[0] for name in p if ".conv1." in name})
    for i, b in enumerate(blocks):
        stride = 1 if i == 0 else 2
        y = act(batch_norm(p, b + ".bn1", conv(p, b + ".conv1", x, stride)))
        y = batch_norm(p, b + ".bn2", conv(p, b + ".conv2", y))
        if b + ".shortcut.0.weight" in p:
            x = batch_norm(p, b + ".shortcut.1", conv(p, b + ".shortcut.0", x, stride))
        x = act(y + x)
    return linear(p, str(int(blocks[-1]) + 3), x.mean((1, 2)))


def layer_norm(p, name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[name + ".weight"] + p[name + ".bias"]


def transformer(p, x, act, heads=4):
    h = jnp.take(p["embedding.weight"], x, axis=0) + p["positions"]
    N, T, d = h.shape
    for b in sorted({".".join(name.split(".")[:2]) for name in p if name.startswith("blocks.")}):
        qkv = h @ p[b + ".self_attn.in_proj_weight"] + p[b + ".self_attn.in_proj_bias"]
        q, k, v = (t.reshape(N, T, heads, d // heads) for t in jnp.split(qkv, 3, -1))
        weights = jax.nn.softmax(jnp.einsum("nshe,nthe->nhst", q, k) / (d // heads) ** 0.5)
        mixed = jnp.einsum("nhst,nthe->nshe", weights, v).reshape(N, T, d)
        h = layer_norm(p, b + ".norm1", h + linear(p, b + ".self_attn.out_proj", mixed))
        hidden = act(linear(p, b + ".linear1", h))
        h = layer_norm(p, b + ".norm2", h + linear(p, b + ".linear2", hidden))
    return linear(p, "head", h.mean(1))
