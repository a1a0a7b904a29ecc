"""Layer factors against dense Jacobians, over the table of models."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nt_kernel import empirical_ntk, layer_factors, stacked_layer_factors
from tests.nt_kernel.cases import CASES, F64
from tests.reference import jacobians, layers_of, run, trainable

# Sums of at most a hundred products of numbers of size 1: 1e-12 is a thousand roundings.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def seen(case, device="cpu"):
    """(model, x, outputs, factors, {layer: names}, {parameter: J [N, C, P]}) and the same for the other points."""
    model, x, x2 = case.make()
    model = model.to(device)
    x, x2 = (tuple(t.to(device) for t in z) if isinstance(z, tuple) else z.to(device) for z in (x, x2))
    y, factors = layer_factors(model, x, output=case.output)
    y2, factors2 = layer_factors(model, x2, output=case.output)
    return (
        model,
        (x, y, factors, jacobians(model, x, case.output)),
        (x2, y2, factors2, jacobians(model, x2, case.output)),
    )


def masses(model):
    """A different mass for every parameter."""
    return {name: 0.1 * 2.0**i for i, name in enumerate(trainable(model))}


@pytest.mark.parametrize("name", CASES)
def test_factors_are_the_jacobian(name, device):
    case = CASES[name]
    model, (x, y, factors, J), (_, _, factors2, J2) = seen(case, device)
    layers, mass = layers_of(model), masses(model)
    torch.testing.assert_close(y, run(model, trainable(model), x, case.output), **CLOSE)
    assert {layer: list(f.shapes) for layer, f in factors.items()} == layers
    assert {n for f in factors.values() for n, kind in f.kinds.items() if kind == "explicit"} == set(case.explicit)
    R, (N, C) = 3, y.shape
    tangent = {n: torch.randn(R, *p.shape, dtype=F64, device=device) for n, p in trainable(model).items()}
    v = torch.randn(R, N, C, dtype=F64, device=device)
    for layer, f in factors.items():
        names = layers[layer]
        dense = torch.cat([J[n] for n in names], -1)
        dense2 = torch.cat([J2[n] for n in names], -1)
        D = torch.cat([torch.full((J[n].shape[-1],), mass[n], dtype=F64, device=device) for n in names])
        assert f.size == len(D)
        torch.testing.assert_close(f.dense(), dense, **CLOSE)
        close = lambda found, A, B, D: torch.testing.assert_close(  # noqa: E731
            found, torch.einsum("ncp,mdp->ncmd", A / D, B), **CLOSE
        )
        close(f.gram(), dense, dense, torch.ones_like(D))
        close(f.gram(mass=mass), dense, dense, D)
        close(f.gram(mass=0.25), dense, dense, torch.full_like(D, 0.25))
        close(f.gram(factors2[layer], mass), dense, dense2, D)
        close(factors2[layer].gram(f, mass), dense2, dense, D)
        torch.testing.assert_close(f.block_gram(mass), dense / D @ dense.mT, **CLOSE)
        torch.testing.assert_close(f.block_norms(), torch.linalg.matrix_norm(dense, 2), rtol=1e-12, atol=1e-7)
        own = {n: tangent[n] for n in names}
        flat = torch.cat([own[n].reshape(R, -1) for n in names], -1)
        torch.testing.assert_close(f.jvp(own), torch.einsum("ncp,rp->rnc", dense, flat), **CLOSE)
        torch.testing.assert_close(
            f.jvp({n: t[0] for n, t in own.items()}), torch.einsum("ncp,p->nc", dense, flat[0]), **CLOSE
        )
        torch.testing.assert_close(
            f.jvp({names[-1]: own[names[-1]]}),
            torch.einsum("ncp,rp->rnc", J[names[-1]], own[names[-1]].reshape(R, -1)),
            **CLOSE,
        )
        pulled, single = f.vjp(v), f.vjp(v[1])
        assert list(pulled) == names
        for n in names:
            expected = torch.einsum("ncp,rnc->rp", J[n], v).reshape(R, *trainable(model)[n].shape)
            torch.testing.assert_close(pulled[n], expected, **CLOSE)
            torch.testing.assert_close(single[n], expected[1], **CLOSE)
        torch.testing.assert_close(f.rows(1).gram(mass=mass), f.gram(mass=mass)[:1, :, :1], **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_empirical_ntk_is_the_sum(name):
    case = CASES[name]
    model, (x, _, _, J), (x2, _, _, J2) = seen(case)
    flat, flat2 = torch.cat(list(J.values()), -1), torch.cat(list(J2.values()), -1)
    K = torch.einsum("ncp,mdp->ncmd", flat, flat2)
    torch.testing.assert_close(empirical_ntk(model, x, x2, output=case.output), K, **CLOSE)
    K = torch.einsum("ncp,mdp->ncmd", flat, flat)
    torch.testing.assert_close(empirical_ntk(model, x, output=case.output), K, **CLOSE)


STACKED = [
    "mlp",
    "no bias",
    "frozen weight",
    "tokens, pairs",
    "tokens, summed",
    "layer norm",
    "tied weights",
    "root linear",
    "convolution",
    "bare parameters",
]


@pytest.mark.parametrize("name", STACKED)
def test_stacked_factors_are_those_of_each_network(name):
    model, x, _ = CASES[name].make()
    mass = masses(model)
    draw = lambda p: torch.stack([p, p + 0.3 * torch.randn_like(p), p * 1.5])  # noqa: E731
    params = {n: draw(p) for n, p in trainable(model).items()}
    xs = torch.stack([x, x.flip(0), 2 * x])
    before = {n: p.clone() for n, p in model.named_parameters()}
    y, factors = stacked_layer_factors(model, params, xs)
    v = torch.randn_like(y)
    for k in range(3):
        model.load_state_dict({n: p[k] for n, p in params.items()} | _rest(model, params))
        yk, single = layer_factors(model, xs[k])
        torch.testing.assert_close(y[k], yk, **CLOSE)
        for layer, f in factors.items():
            torch.testing.assert_close(f.gram(mass=mass)[k], single[layer].gram(mass=mass), **CLOSE)
            torch.testing.assert_close(f.block_gram(mass)[k], single[layer].block_gram(mass), **CLOSE)
            torch.testing.assert_close(f.dense()[k], single[layer].dense(), **CLOSE)
            for n, pulled in f.vjp(v).items():
                torch.testing.assert_close(pulled[k], single[layer].vjp(v[k])[n], **CLOSE)
            own = {n: params[n] for n in f.shapes}
            torch.testing.assert_close(f.jvp(own)[k], single[layer].jvp({n: t[k] for n, t in own.items()}), **CLOSE)
            torch.testing.assert_close(f.runs(slice(k, k + 1)).gram(mass=mass)[0], f.gram(mass=mass)[k], **CLOSE)
        model.load_state_dict(before | _rest(model, before))


def _rest(model, params):
    """Entries of the state that ``params`` leaves out: buffers, frozen and tied parameters (by their second name)."""
    aliases = {n: p for n, p in model.named_parameters(remove_duplicate=False)}
    of = {id(p): n for n, p in model.named_parameters()}
    out = {}
    for n, t in model.state_dict().items():
        if n not in params:
            owner = of.get(id(aliases.get(n)))
            out[n] = params[owner] if owner in params and params[owner].shape == t.shape else t
    return out


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.token_route])
def test_both_routes_of_the_double_sum_are_taken(name):
    case = CASES[name]
    model, x, _ = case.make()
    _, factors = layer_factors(model, x)
    o, d = model[0].weight.shape
    for verb in (factors["0"].gram, factors["0"].block_gram):
        with Shapes() as shapes:
            verb()
        per_sample_matrices = any(s[-1] == o * d for s in shapes.seen if s)
        assert per_sample_matrices == (case.token_route == "summed")


def test_structure_does_not_depend_on_the_data_that_came_first():
    """All units active on the first batch: the in-place ReLU leaves the output as it was, and is there all the same."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True)).to(F64)
    model[0].bias.data.fill_(50.0)
    x = torch.randn(4, 3, dtype=F64)
    layer_factors(model, x)
    model[0].bias.data.fill_(-0.1)
    y, factors = layer_factors(model, x)
    assert 0 < (y == 0).sum() < y.numel()
    torch.testing.assert_close(factors["0"].dense()[..., :6], jacobians(model, x)["0.weight"], **CLOSE)


def test_structure_does_not_depend_on_the_parameters_that_came_first():
    model, x, _ = CASES["behind a gate that is zero"].make()
    layer_factors(model, x)
    model.gate.data.fill_(0.7)
    _, factors = layer_factors(model, x)
    J = jacobians(model, x)
    torch.testing.assert_close(factors["a"].dense(), torch.cat([J["a.weight"], J["a.bias"]], -1), **CLOSE)


def test_a_plan_is_made_anew_when_the_model_changes():
    model, x, _ = CASES["mlp"].make()
    _, before = layer_factors(model, x)
    assert list(before) == ["0", "2", "4"]
    model[2].requires_grad_(False)
    _, after = layer_factors(model, x)
    assert list(after) == ["0", "4"]
    model[0].weight = model[0].weight  # tie what was not tied
    model[2].requires_grad_(True)
    model[4] = nn.Linear(4, 4, dtype=F64)
    model[4].weight = nn.Parameter(torch.randn(4, 4, dtype=F64))
    model.append(nn.Linear(4, 4, dtype=F64))
    model[5].weight = model[4].weight
    _, tied = layer_factors(model, x)
    J = jacobians(model, x)
    torch.testing.assert_close(tied["4"].dense()[..., :16], J["4.weight"], **CLOSE)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_make_no_difference(mode):
    model, x, _ = CASES["mlp"].make()
    J = jacobians(model, x)
    with mode():
        _, factors = layer_factors(model, x.clone())
    torch.testing.assert_close(factors["0"].dense(), torch.cat([J["0.weight"], J["0.bias"]], -1), **CLOSE)
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_left_as_it_was():
    model, x, _ = CASES["batch norm in eval"].make()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    x.requires_grad_()
    rng, dtype = torch.get_rng_state(), torch.get_default_dtype()
    layer_factors(model, x)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert x.grad is None
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.get_default_dtype() == dtype


def test_bad_tangents_are_named():
    _, factors = layer_factors(nn.Linear(3, 2), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"layer '\.' has no parameter 'wieght'; it has weight, bias"):
        factors["."].jvp({"wieght": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"tangent of 'weight' has shape \(3, 2\), expected \[\.\.\., 2, 3\]"):
        factors["."].jvp({"weight": torch.ones(3, 2)})


@pytest.mark.parametrize(
    "mass", [-1.0, 0.0, float("nan"), {"weight": -1.0, "bias": 1.0}, {"weight": 1.0, "bias": float("inf")}]
)
def test_bad_masses_are_refused_by_the_factor_too(mass):
    _, factors = layer_factors(nn.Linear(3, 2), torch.ones(4, 3))
    with pytest.raises(ValueError, match="must be positive and finite"):
        factors["."].gram(mass=mass)
