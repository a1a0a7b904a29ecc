"""Layer metric, kernels and H against dense solves: models × scales × output metrics × masses × blocks."""

from itertools import product

import pytest
import torch

from nt_kernel import LayerMetric, generalized_ntk, layer_factors
from nt_kernel.metric.layer_metric import model_mass, rate_limit, resolve_blocks, scale_factor
from nt_kernel.metric.output_metric import resolve_output_metric
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.reference import SCALE, Dense, definite_metric, distance, singular_metric, trainable
from tests.thinned import thinned

METRICS = ["identity", "cross_entropy", definite_metric, singular_metric]
MASSES = [(1e-3, "layer"), (1e3, "layer"), ("one per parameter", "layer"), ("one per parameter", "network")]


def mass_of(model, mass):
    return {n: 0.01 * 3.0**i for i, n in enumerate(trainable(model))} if mass == "one per parameter" else mass


def close(found, expected, dense: Dense):
    """1e-12 relative, multiplied by the condition 1 + ‖cMK‖ of the dense metric, which both sides pay."""
    size = max(1.0, expected.norm().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * dense.stiffness() * size)


def settings(model, x, output, masses=MASSES):
    """Every combination of options the model allows, each with its dense reference."""
    plain = Dense(model, x, output=output)
    for scale, metric, (mass, block) in product(SCALE, METRICS, masses):
        if not (metric == "cross_entropy" and plain.C == 1):
            options = {"mass": mass_of(model, mass), "output_metric": metric, "scale": scale}
            yield options | {"blocks": block}, plain.with_options(**options, blocks=block)


@pytest.mark.parametrize("name", thinned(CASES, 2))
def test_generalized_ntk(name, device):
    case = CASES[name]
    model, x, _ = case.make()
    model = model.to(device)
    x = tuple(t.to(device) for t in x) if isinstance(x, tuple) else x.to(device)
    for options, dense in settings(model, x, case.output):
        ntk = generalized_ntk(model, x, **options, output=case.output)
        assert list(ntk.layers) == list(dense.blocks)
        for block, H in ntk.layers.items():
            close(H, dense.kernel(block) / dense.N, dense)
        close(ntk.matrix, dense.H(), dense)
        close(ntk.outputs, dense.y, dense)
        spectrum = torch.linalg.eigvalsh((dense.H() + dense.H().T) / 2)
        close(ntk.eigenvalues(), spectrum, dense)
        assert ntk.xi <= spectrum[0].item() + 1e-12 * dense.stiffness()
        assert ntk.xi == 0.0 or ntk.xi > 0
        assert ntk.matrix.dtype == F64


@pytest.mark.parametrize("name", thinned([*CASES][::-1], 2))
def test_layer_metric(name):
    case = CASES[name]
    model, x, x2 = case.make()
    y, factors = layer_factors(model, x, output=case.output)
    _, others = layer_factors(model, x2, output=case.output)
    torch.manual_seed(1)
    r, g = torch.randn_like(y), {n: torch.randn_like(p) for n, p in trainable(model).items()}
    for options, dense in settings(model, x, case.output, masses=[MASSES[0], MASSES[3]]):
        pull, solved = dense.solve({n: t / dense.N for n, t in dense.pull(r).items()}), dense.solve(g)
        blocks, other_blocks = (resolve_blocks(f, options["blocks"]) for f in (factors, others))
        del options["blocks"]
        for block, factor in blocks.items():
            metric = LayerMetric(factor, y, **options)
            names = list(factor.shapes)
            assert list(metric.push(r)) == list(metric.solve(g)) == names
            assert distance(metric.push(r), {n: pull[n] for n in names}) <= 1e-12 * dense.stiffness()
            assert distance(metric.solve(g), {n: solved[n] for n in names}) <= 1e-12 * dense.stiffness()
            other = other_blocks[block]
            pairs = [(None, None), (other, None), (None, other), (other, other)]
            for A, B in pairs if options["scale"] != "sum" else []:
                xA, xB = (x2 if point is other else None for point in (A, B))
                kernel = metric.kernel(A, B)
                close(kernel.flatten(2).flatten(0, 1), dense.kernel(block, xA, xB), dense)
            rows = metric.kernel(factor.rows(1), other)
            close(rows.flatten(2).flatten(0, 1), dense.kernel(block, None, x2)[: dense.C], dense)


@pytest.mark.parametrize("metric", ["identity", "cross_entropy", definite_metric])
def test_rate_limit_holds_and_is_reached(metric):
    model, x, _ = CASES["mlp"].make()
    for scale, mass in product(["mean", "sum"], [1e-3, 1.0]):
        ntk = generalized_ntk(model, x, mass=mass, output_metric=metric, scale=scale)
        c = scale_factor(scale, len(x))
        limit = rate_limit(3, len(x), c, resolve_output_metric(metric), ntk.outputs)
        largest = ntk.eigenvalues()[-1].item()
        if metric == "cross_entropy":  # M is singular, and λ_max(H) then knows no limit but the mass
            assert limit == float("inf") or limit > largest
            continue
        M = Dense(model, x, output_metric=metric).M
        assert limit == pytest.approx(3 / (c * len(x) * torch.linalg.eigvalsh(M)[0].item()), rel=1e-12)
        assert largest <= limit
    if metric == "identity":
        tight = generalized_ntk(model, x, mass=1e-6)
        assert 2.5 < tight.eigenvalues()[-1] <= 3


def test_rate_limit_of_gradient_descent_is_infinite():
    model, x, _ = CASES["mlp"].make()
    y, _ = layer_factors(model, x)
    assert rate_limit(3, 4, 0.0, resolve_output_metric("identity"), y) == float("inf")
    assert rate_limit(3, 4, 0.25, resolve_output_metric(lambda y: torch.zeros(4, 2, 2)), y) == float("inf")


def test_small_mass_drives_H_to_the_number_of_layers():
    """Scale "mean", D → 0: each block of full rank tends to M⁻¹, H to N·M⁻¹ (theory §2), in proportion to the mass."""
    torch.manual_seed(0)
    model, x = mlp(5, 8, 8, 2).to(F64), torch.randn(3, 5, dtype=F64)
    gaps = {}
    for metric in ("identity", definite_metric):
        for mass in (1e-4, 1e-5):
            ntk = generalized_ntk(model, x, mass=mass, output_metric=metric)
            M = Dense(model, x, output_metric=metric).M
            gaps[mass] = (ntk.matrix - 3 * torch.linalg.inv(M)).norm().item()
        assert gaps[1e-5] < 0.05
        assert gaps[1e-4] / gaps[1e-5] == pytest.approx(10, rel=0.1)


def test_mass_and_scale_laws():
    model, x, _ = CASES["mlp"].make()
    H = lambda **options: generalized_ntk(model, x, **options).matrix  # noqa: E731
    base = H(scale="none")
    # Powers of two scale exactly.
    assert torch.equal(H(scale="none", mass=0.25), 4 * base)
    # (D, c) → (tD, tc) divides H by t: "sum" at mass n·μ is "mean" at mass μ, over n.
    torch.testing.assert_close(H(scale="sum", mass=4 * 0.5), H(scale="mean", mass=0.5) / 4, rtol=1e-12, atol=1e-14)
    # H grows as mass falls, as quadratic forms.
    assert torch.linalg.eigvalsh(H(mass=0.1) - H(mass=1.0))[0] >= -1e-13
    # One block for all layers has a smaller trace than their sum (Rotfel'd's inequality), and at c = 0 the same matrix.
    torch.testing.assert_close(H(scale="none", blocks="network"), base, rtol=1e-13, atol=1e-14)
    assert H(blocks="network").trace() <= H().trace()


def test_squared_loss_has_the_identity_as_its_metric():
    model, x, _ = CASES["mlp"].make()
    identity, squared = (generalized_ntk(model, x, output_metric=m).matrix for m in ("identity", "squared"))
    assert torch.equal(identity, squared)


def test_mass_by_layer_by_parameter_and_as_a_list_are_the_same_thing():
    model, x, _ = CASES["mlp"].make()
    by_list = generalized_ntk(model, x, mass=[0.5, 1.0, 0.1]).matrix
    by_layer = generalized_ntk(model, x, mass={"0": 0.5, "4": torch.tensor(0.1, dtype=F64)}).matrix
    by_name = generalized_ntk(
        model, x, mass={"0.weight": 0.5, "0.bias": 0.5, "4": 9.0, "4.weight": 0.1, "4.bias": 0.1}
    ).matrix
    assert torch.equal(by_list, by_layer)
    assert torch.equal(by_list, by_name)
    factors = layer_factors(model, x)[1]
    assert model_mass(factors, {"0.bias": 2.0})["0.bias"] == 2.0
    assert torch.equal(
        generalized_ntk(model, x, mass={"2": 0.5}, blocks="network").matrix,
        generalized_ntk(model, x, mass={"2.weight": 0.5, "2.bias": 0.5}, blocks="network").matrix,
    )


def test_a_float32_model_gives_a_float64_kernel():
    model, x, _ = CASES["mlp"].make()
    exact = generalized_ntk(model, x).matrix
    single = generalized_ntk(model.float(), x.float())
    assert single.matrix.dtype == F64
    assert next(model.parameters()).dtype == torch.float32
    # Only the parameters and inputs were rounded to float32; nothing was computed in it.
    torch.testing.assert_close(
        single.matrix, generalized_ntk(model.double(), x.float().double()).matrix, rtol=0, atol=0
    )
    torch.testing.assert_close(single.matrix, exact, rtol=0, atol=1e-5)
    constant = generalized_ntk(model.float(), x.float(), output_metric=lambda y: torch.eye(2).expand(4, 2, 2)).matrix
    torch.testing.assert_close(constant, single.matrix, rtol=0, atol=1e-13)


def test_a_metric_that_is_data_of_its_samples():
    """The callable sees all outputs at once, so it may hold one matrix per sample (weights of the samples, say)."""
    model, x, _ = CASES["mlp"].make()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=F64)
    metric = lambda y: weights[:, None, None] * torch.eye(2, dtype=F64)  # noqa: E731
    dense = Dense(model, x, output_metric=metric)
    close(generalized_ntk(model, x, output_metric=metric).matrix, dense.H(), dense)
