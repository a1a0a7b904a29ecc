"""Kernels against other people's code: nngeometry's Gram matrices, curvlinops' Jacobian and Gauss–Newton operators.

Both are an optional extra (``pip install --no-deps -c constraints.txt``); without them these tests are skipped.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from nt_kernel import LayerMetric, empirical_ntk, generalized_ntk, layer_factors
from tests.nt_kernel.architectures import settled
from tests.nt_kernel.cases import F64, mlp
from tests.nt_kernel.exactness import TOLERANCE, relative
from tests.nt_kernel.modern import MODERN
from tests.reference import layers_of, trainable


def images(*layers: nn.Module, channels: int = 2, size: int = 4):
    """(model, x): the layers, then tanh and a linear head."""
    torch.manual_seed(0)
    body = settled(nn.Sequential(*layers, nn.Tanh(), nn.Flatten()))
    x = torch.randn(4, channels, *[size] * (1 if isinstance(layers[0], nn.Conv1d) else 2), dtype=F64)
    return nn.Sequential(*body, nn.Linear(body(x).shape[1], 2, dtype=F64)), x


def vectors(*layers: nn.Module):
    torch.manual_seed(0)
    return settled(nn.Sequential(nn.Linear(3, 5), *layers, nn.Tanh(), nn.Linear(5, 2))), torch.randn(4, 3, dtype=F64)


def small_mlp():
    torch.manual_seed(0)
    return mlp(3, 5, 4, 2).to(F64), torch.randn(4, 3, dtype=F64)


BOTH = {
    "mlp": small_mlp,
    "linear without bias": lambda: (nn.Linear(3, 2, bias=False, dtype=F64), torch.randn(4, 3, dtype=F64)),
    "layer norm": lambda: vectors(nn.LayerNorm(5)),
    "batch norm, vectors": lambda: vectors(nn.BatchNorm1d(5)),
    "conv1d": lambda: images(nn.Conv1d(2, 3, 2)),
    "conv2d, stride and padding": lambda: images(nn.Conv2d(2, 3, 3, stride=2, padding=1)),
    "conv2d, dilation": lambda: images(nn.Conv2d(2, 3, 2, dilation=2)),
    "transposed convolution": lambda: images(nn.ConvTranspose2d(2, 3, 2, stride=2), size=2),
    "batch norm, maps": lambda: images(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)),
    "group norm": lambda: images(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)),
}
# nngeometry leaves groups and padding modes out of account (relative errors of 0.4 and 0.1) and takes no tokens.
CURVLINOPS_ONLY = {
    "conv2d, groups": lambda: images(nn.Conv2d(2, 4, 3, groups=2)),
    "conv2d, circular": lambda: images(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
} | {
    name: (lambda make=MODERN[name]: (make().model, make().x))
    for name in ("ResNet", "ConvNeXt", "MLP-Mixer", "U-Net", "equilibrium", "graph network", "GPT")
}


@contextmanager
def double_by_default() -> Iterator[None]:
    """nngeometry allocates in the default dtype, so that its sums are of single precision otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", BOTH)
def test_gram_against_nngeometry(name):
    gram = pytest.importorskip("nngeometry.gram", reason="nngeometry is not installed (extra 'peers')")
    from nngeometry.layercollection import LayerCollection

    model, x = BOTH[name]()
    found = empirical_ntk(model, x)
    with double_by_default():
        matrix = gram.GramMatrix(model, (x.clone(),), layer_collection=LayerCollection.from_model(model))
        expected = matrix.to_torch().permute(1, 0, 3, 2).detach()  # its axes are [C, N, C, N]
    assert relative(found, expected) <= TOLERANCE


def curvlinops_jacobian(model: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """J [N·C, P] by the parameters ``names``, from curvlinops' transposed Jacobian on the identity."""
    peer = pytest.importorskip("curvlinops", reason="curvlinops is not installed (extra 'peers')")
    params, y = [model.get_parameter(n) for n in names], model(x).detach()
    transposed = peer.TransposedJacobianLinearOperator(model, params, [(x, y)], check_deterministic=False)
    return (transposed @ torch.eye(y.numel(), dtype=y.dtype)).detach().mT


@pytest.mark.parametrize("name", BOTH | CURVLINOPS_ONLY)
def test_jacobians_against_curvlinops(name):
    model, x = (BOTH | CURVLINOPS_ONLY)[name]()
    J = {layer: curvlinops_jacobian(model, x, names) for layer, names in layers_of(model).items()}
    y, factors = layer_factors(model, x)
    for layer, f in factors.items():
        assert relative(f.dense(), J[layer].unflatten(0, y.shape)) <= TOLERANCE
    K = sum(j @ j.mT for j in J.values())
    assert relative(empirical_ntk(model, x).flatten(2).flatten(0, 1), K) <= TOLERANCE


GAUSS_NEWTON = ["mlp", "layer norm", "conv2d, stride and padding", "batch norm, maps", "group norm"]


def curvlinops_gauss_newton(model: nn.Module, x: Tensor, names: list[str], loss: str) -> Tensor:
    """The Gauss–Newton matrix JᵀMJ·c as an array: ½‖·‖² summed, or the mean cross-entropy."""
    peer = pytest.importorskip("curvlinops", reason="curvlinops is not installed (extra 'peers')")
    params = [model.get_parameter(n) for n in names]
    if loss == "cross_entropy":
        target, function, factor = torch.zeros(len(x), dtype=torch.long), nn.CrossEntropyLoss(), 1.0
    else:
        target, function, factor = torch.zeros_like(model(x)), nn.MSELoss(reduction="sum"), 0.5
    operator = peer.GGNLinearOperator(model, function, params, [(x, target)], check_deterministic=False)
    return factor * (operator @ torch.eye(operator.shape[1], dtype=F64)).detach()


@pytest.mark.parametrize("blocks", ["layer", "network"])
@pytest.mark.parametrize(("loss", "scale"), [("cross_entropy", "mean"), ("identity", "sum")])
@pytest.mark.parametrize("name", GAUSS_NEWTON)
def test_metric_and_kernel_against_curvlinops(name, loss, scale, blocks):
    model, x = BOTH[name]()
    parts = layers_of(model) if blocks == "layer" else {"network": list(trainable(model))}
    options = {"mass": 0.5, "output_metric": loss, "scale": scale}
    y, factors = layer_factors(model, x)
    H = 0
    for block, names in parts.items():
        J = curvlinops_jacobian(model, x, names)
        G = curvlinops_gauss_newton(model, x, names, loss)
        G = G + 0.5 * torch.eye(len(G), dtype=F64)
        H = H + J @ torch.linalg.solve(G, J.mT) / len(x)
        if blocks == "layer":
            g = {n: torch.randn_like(model.get_parameter(n)) for n in names}
            step = LayerMetric(factors[block], y, **options).solve(g)
            expected = torch.linalg.solve(G, torch.cat([t.flatten() for t in g.values()]))
            assert relative(torch.cat([step[n].flatten() for n in names]), expected) <= TOLERANCE
    assert relative(generalized_ntk(model, x, **options, blocks=blocks).matrix, H) <= TOLERANCE
