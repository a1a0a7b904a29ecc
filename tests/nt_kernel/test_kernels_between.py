"""Kernels between two point sets, whole, per class, traced and per layer, against dense references; chunks change nothing."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nt_kernel import empirical_ntk, generalized_ntk, layer_factors
from nt_kernel.products.forms import Decoupled, Flat, Outer, Weighted
from nt_kernel.products.positions import Positions
from nt_kernel.products.reduced import diagonal_of, positions_costs, trace_of
from nt_kernel.products.tiles import gram_of
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.reference import Dense, definite_metric, jacobians, layers_of, singular_metric
from tests.thinned import thinned

REDUCED = {
    "full": lambda K: K,
    "diagonal": lambda K: torch.einsum("icjc->ijc", K),
    "trace": lambda K: torch.einsum("icjc->ij", K),
}
CHUNKS = [None, 1, 3]


def size_of(x) -> int:
    return len(x[0] if isinstance(x, tuple) else x)


def close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * max(1.0, expected.norm())


def reference(model, x, x2, output) -> dict[str, torch.Tensor]:
    """{layer: J(x) J(x2)ᵀ [N, C, M, C]}."""
    first, second = jacobians(model, x, output), jacobians(model, x2, output)
    return {
        layer: sum(torch.einsum("ncp,mdp->ncmd", first[n], second[n]) for n in names)
        for layer, names in layers_of(model).items()
    }


@pytest.mark.parametrize(("name", "same"), thinned(itertools.product(CASES, [True, False]), 3))
def test_empirical_ntk(name, same):
    case = CASES[name]
    model, x, other = case.make()
    x2 = None if same else other
    layers = reference(model, x, x if same else other, case.output)
    K = sum(layers.values())
    for outputs, reduce in REDUCED.items():
        for chunk in CHUNKS if outputs == "full" else (None,):
            options = {"outputs": outputs, "chunk_size": chunk, "output": case.output}
            close(empirical_ntk(model, x, x2, **options), reduce(K))
        found = empirical_ntk(model, x, x2, per_layer=True, **options)
        assert list(found) == list(layers)
        for layer in layers:
            close(found[layer], reduce(layers[layer]))


@pytest.mark.parametrize("outputs", REDUCED)
@pytest.mark.parametrize("name", ["mlp", "convolution", "attention", "embedding"])
def test_chunks_change_nothing(name, outputs):
    model, x, other = CASES[name].make()
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
        for x2 in (None, other):
            whole = empirical_ntk(model, x, x2, outputs=outputs, dtype=dtype)
            assert whole.dtype == dtype
            for chunk in (1, 3, size_of(x)):
                tiled = empirical_ntk(model, x, x2, outputs=outputs, dtype=dtype, chunk_size=chunk)
                assert (tiled - whole).norm() <= tolerance * whole.norm()


@pytest.mark.parametrize("mass", ["number", "layers", "row and column", "diagonal"])
def test_masses(mass):
    from nt_kernel.mass import RowColumnMass

    model, x, other = CASES["mlp"].make()
    weight = model[2].weight
    row, column = torch.rand(weight.shape[0], dtype=F64) + 0.5, torch.rand(weight.shape[1], dtype=F64) + 0.5
    full = row[:, None] * column
    chosen = {
        "number": 0.5,
        "layers": {"2": 0.1},
        "row and column": {"2.weight": RowColumnMass(row, column)},
        "diagonal": {"2.weight": full},
    }[mass]
    D = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    if mass == "number":
        D = {n: 0.5 * d for n, d in D.items()}
    elif mass == "layers":
        D |= {n: 0.1 * D[n] for n in ("2.weight", "2.bias")}
    else:
        D["2.weight"] = full
    first, second = jacobians(model, x), jacobians(model, other)
    K = sum(torch.einsum("ncp,mdp->ncmd", first[n] / D[n].flatten(), second[n]) for n in D)
    for outputs, reduce in REDUCED.items():
        for chunk in (None, 2):
            found = empirical_ntk(model, x, other, mass=chosen, outputs=outputs, chunk_size=chunk)
            close(found, reduce(K))


def draws(*shape):
    return torch.randn(*shape, dtype=F64)


FORMS = {
    "outer": lambda N: Outer(draws(N, 4), draws(N, 3, 5)),
    "flat": lambda N: Flat(draws(N, 3, 7)),
    "decoupled": lambda N: Decoupled(draws(N, 4), 3),
    "weighted": lambda N: Weighted(draws(N, 2, 4), draws(N, 3, 2, 5), torch.ones(5, 4, dtype=F64) / 3),
    "positions, summed": lambda N: Positions(draws(N, 9, 2), draws(N, 3, 9, 2)),
    "positions, pairs": lambda N: Positions(draws(N, 2, 9), draws(N, 3, 2, 9)),
    "lookup": lambda N: Positions(torch.randint(0, 50, (N, 2)), draws(N, 3, 2, 4), 50),
    "short lookup": lambda N: Positions(torch.randint(0, 2, (N, 9)), draws(N, 3, 9, 4), 2),
}


@pytest.mark.parametrize("kind", FORMS)
def test_reduced_forms(kind, monkeypatch):
    torch.manual_seed(0)
    a, b = FORMS[kind](6), FORMS[kind](4)
    for limit in (1, 2**25):  # bytes: position products in pieces, and at once
        monkeypatch.setattr("nt_kernel.products.reduced.CHUNK_BYTES", limit)
        for others in (None, [b, b]):
            K = gram_of([a, a], others)
            close(diagonal_of([a, a], others), REDUCED["diagonal"](K))
            close(trace_of([a, a], others), REDUCED["trace"](K))


def test_both_routes_are_met():
    def route(form):
        N, C, T, o = form.deltas.shape
        costs = positions_costs(N, N, C, T, T, o, form.width, bool(form.vocabulary))
        return min(costs, key=costs.get)

    routes = {kind: route(make(6)) for kind, make in FORMS.items() if isinstance(make(1), Positions)}
    assert routes == {
        "positions, summed": "summed",
        "positions, pairs": "pairs",
        "lookup": "pairs",
        "short lookup": "summed",
    }


def test_classes_never_meet():
    """The largest array on the way to a trace is far below [N, C, N, C]."""
    from tests.nt_kernel.test_allocation import Largest

    torch.manual_seed(0)
    N, C = 20, 30
    model, x = mlp(4, 8, C).to(F64), draws(N, 4)
    for outputs, most in (("trace", N * C * 8), ("diagonal", N * N * C)):
        empirical_ntk(model, x, outputs=outputs)
        with Largest() as seen:
            empirical_ntk(model, x, outputs=outputs)
        assert seen.numel <= max(most, N * C * C) < (N * C) ** 2 / 4


def test_dtypes():
    model, x, _ = CASES["mlp"].make()
    model = model.float()
    assert empirical_ntk(model, x.float()).dtype == torch.float64
    assert empirical_ntk(model, x.float(), dtype="model").dtype == torch.float32
    exact = sum(factor.gram() for factor in layer_factors(model.double(), x.float().double())[1].values())
    close(empirical_ntk(model.float(), x.float()), exact)
    with pytest.raises(TypeError, match=r"dtype must be torch.float64, torch.float32 or 'model', got 'float64'"):
        empirical_ntk(model, x, dtype="float64")


OPTIONS = [
    {},
    {"scale": "sum", "mass": 0.1},
    {"scale": "none"},
    {"blocks": "network", "mass": 0.5},
    {"output_metric": "cross_entropy", "mass": 0.1},
    {"output_metric": definite_metric, "scale": "sum"},
    {"output_metric": singular_metric, "blocks": "network"},
]


PROBLEMS = [("mlp", options) for options in OPTIONS]
PROBLEMS += [
    (name, {"mass": 0.5, "output_metric": "cross_entropy"}) for name in ("convolution", "attention", "embedding")
]
PROBLEMS += [(name, {"mass": 0.1}) for name in ("attention", "root linear", "tied weights", "layer norm")]


@pytest.mark.parametrize(("name", "options"), PROBLEMS)
def test_generalized_ntk_between(name, options):
    model, x, other = CASES[name].make()
    third = other[:2]
    dense = Dense(model, x, **options)
    for x1, x2 in ((None, None), (other, None), (None, other), (other, third), (other, x), (x, x)):
        A = x if x1 is None else x1
        B = A if x2 is None else x2
        layers = {b: dense.kernel(b, A, B) / dense.N for b in dense.blocks}
        for chunk in (None, 2):
            ntk = generalized_ntk(model, x, x1, x2, chunk_size=chunk, **options)
            tolerance = 1e-12 * dense.stiffness()
            assert list(ntk.layers) == list(layers)
            for layer in layers:
                close(ntk.layers[layer], layers[layer], tolerance)
            H = sum(layers.values())
            close(ntk.matrix, H, tolerance)
            K = H.unflatten(1, (-1, dense.C)).unflatten(0, (-1, dense.C))
            for outputs, reduce in REDUCED.items():
                close(ntk.reduced(outputs), reduce(K), tolerance)
            assert ntk.symmetric == (A is B)
            if ntk.symmetric:
                assert (ntk.matrix - ntk.matrix.T).norm() <= ntk.error
                assert torch.linalg.matrix_norm(ntk.matrix - H, 2) <= ntk.error
                assert ntk.xi <= max(0.0, torch.linalg.eigvalsh(H)[0].item())


@pytest.mark.parametrize("blocks", ["layer", "network"])
def test_mean_jacobian_between(blocks):
    model, x, other = CASES["mlp"].make()
    J, J2 = jacobians(model, x), jacobians(model, other)
    groups = layers_of(model) if blocks == "layer" else {"network": list(J)}
    options = {"scale": "mean-jacobian", "blocks": blocks, "mass": 0.5}
    for x1, x2, left, right in ((None, None, J, J), (other, None, J2, J2), (None, other, J, J2), (other, x, J2, J)):
        expected = 0
        for names in groups.values():
            S, A, B = (torch.cat([j[n] for n in names], -1) for j in (J, left, right))
            mean = S.mean(0)
            G = 0.5 * torch.eye(mean.shape[1], dtype=F64) + mean.T @ mean
            expected = expected + A.flatten(0, 1) @ torch.linalg.solve(G, B.flatten(0, 1).T) / len(x)
        close(generalized_ntk(model, x, x1, x2, **options).matrix, expected)
    with pytest.raises(ValueError, match="sees all samples of the metric at once; leave chunk_size"):
        generalized_ntk(model, x, chunk_size=2, **options)


@pytest.mark.slow
@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4), st.integers(1, 7), st.booleans())
def test_symmetry_and_transposition(seed, n, m, chunk, generalized):
    """K(x1, x2) = K(x2, x1)ᵀ, and the kernel of a union holds that of its parts."""
    torch.manual_seed(seed)
    model, x, other = mlp(3, 5, 2).to(F64), draws(n, 3), draws(m, 3)

    def kernel(a, b):
        if generalized:
            return generalized_ntk(model, x, a, b, chunk_size=chunk).kernel
        return empirical_ntk(model, a, b, chunk_size=chunk)

    both = kernel(torch.cat([x, other]), None)
    close(kernel(x, other), both[:n, :, n:])
    close(kernel(other, x), kernel(x, other).permute(2, 3, 0, 1))


def test_a_kernel_between_sets_has_no_spectrum():
    model, x, other = CASES["mlp"].make()
    ntk = generalized_ntk(model, x, other, x)
    for ask in (
        lambda: ntk.eigenvalues(),
        lambda: ntk.xi,
        lambda: ntk.condition_number,
        lambda: ntk.effective_rank(),
        lambda: ntk.extremal(1),
    ):
        with pytest.raises(ValueError, match=r"this kernel \[6, 8\] is between two point sets and has no eigenvalues"):
            ask()
    with pytest.raises(ValueError, match=r"unknown outputs 'tracs'; .*did you mean 'trace'"):
        ntk.reduced("tracs")


def test_the_spectrum_of_a_kernel():
    torch.manual_seed(0)
    model, x = mlp(6, 20, 20, 3).to(F64), draws(5, 6)
    ntk = generalized_ntk(model, x)
    values = ntk.eigenvalues()
    kappa = ntk.condition_number
    assert kappa.lower <= values[-1] / values[0] <= kappa.upper <= kappa.lower * (1 + 1e-6)
    assert 0 < ntk.xi <= values[0]
    assert ntk.extremal(2).values[-1] == pytest.approx(values[-1].item(), rel=1e-12)
    assert ntk.extremal(1, "smallest").values[0] == pytest.approx(values[0].item(), rel=1e-9)
    p = values / values.sum()
    assert ntk.effective_rank() == pytest.approx((-(p * p.log()).sum()).exp().item())
    assert ntk.effective_rank("intrinsic") == pytest.approx((values.sum() / values[-1]).item())
    few = generalized_ntk(model, torch.cat([x, x]))  # rank 15 of 30
    assert few.effective_rank("participation") <= 15
    assert few.condition_number.upper == float("inf")


def test_one_block_is_not_copied():
    model, x, _ = CASES["mlp"].make()
    ntk = generalized_ntk(model, x, blocks="network")
    assert ntk.matrix.data_ptr() == ntk.layers["network"].data_ptr() == ntk.kernel.data_ptr()


def test_refusals():
    model, x, other = CASES["mlp"].make()
    with pytest.raises(ValueError, match="unknown outputs 'traces'; known are 'full', 'diagonal', 'trace'"):
        empirical_ntk(model, x, outputs="traces")
    with pytest.raises(ValueError, match="mass names 'nothing'"):
        empirical_ntk(model, x, mass={"nothing": 1.0})
    for chunk in (None, 1):
        broken = x.clone()
        broken[2, 1] = float("nan")
        with pytest.raises(
            ValueError, match="x must be finite; it holds NaN or inf in 1 of 4 samples, first in sample 2"
        ):
            empirical_ntk(model, other, broken, chunk_size=chunk)


def test_classes_must_agree():
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten()).to(F64)
    with pytest.raises(ValueError, match="6 outputs per sample at the rows, 4 at the columns"):
        empirical_ntk(model, draws(2, 3, 3), draws(2, 2, 3))
