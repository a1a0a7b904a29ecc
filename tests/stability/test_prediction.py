"""Predicted twins against twins trained the slow way: exact where theory says so, close elsewhere, within the memory limit."""

import itertools
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nt_kernel import NumericalError, RowColumnMass, from_factor, huber
from nt_kernel.kernels.live_bytes import LiveBytes
from nt_kernel.metric.output_metric import resolve_output_metric
from optim import Woodbury
from stability import Replacement, train_twins
from stability.losses import resolve_loss
from stability.prediction.predict import TwinPredictor, predict_twins
from stability.prediction.states import aligned
from tests.stability.dense import F64, DenseRun, small_problem, twin_data
from tests.thinned import thinned

METHODS = ["kernel-path", "parameter-path", "strided-path", "cg"]


class LinearFeatures(nn.Module):
    """Linear in θ, with three metric blocks; in the root's own, s, the outputs of a sample share their parameters."""

    def __init__(self, d, p, draw):
        super().__init__()
        self.a, self.b = nn.Linear(d, p).double(), nn.Linear(2 * d, p, bias=False).double()
        self.s = nn.Parameter(torch.empty(3, dtype=F64))
        self.register_buffer("B", torch.randn(d, p, 3, generator=draw, dtype=F64))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw, dtype=F64)

    def forward(self, x):
        own = torch.einsum("nd,dpm,m->np", x, self.B, self.s)
        return own + self.a(x) * x.sum(-1, keepdim=True) + self.b(torch.cat([x.sin(), x.square()], -1))


def trained(model, x, a, zs, held_out, *, steps, lr, loss="squared", mass=1.0, c=None, metric="identity", watch=None):
    """The twins' outputs on S, at their own z and on held-out points at the end, densely; ``watch`` sees y on S as it goes."""
    rule = resolve_output_metric(metric)

    def M(y):
        L = rule.factor(y)
        return torch.eye(y.shape[-1], dtype=F64).expand(len(y), -1, -1) if L is None else L.mT @ L

    found = []
    for z in [None, *zs]:
        data = (x, a) if z is None else twin_data(x, a, z)
        run = DenseRun(model, *data, mass=mass, c=1 / len(x) if c is None else c, M=M, loss=resolve_loss(loss).value)
        for _ in range(steps):
            run.step(lr)
        own = None if z is None else run.outputs(z.x[None])[0]
        found.append((run.outputs(x), own, run.outputs(held_out)))
    return found


def assert_predicted(prediction, runs, tolerance):
    scale = max(1.0, max((run[0] - runs[0][0]).abs().max().item() for run in runs))
    torch.testing.assert_close(prediction.run_outputs, runs[0][0], rtol=0, atol=1e-9 * scale)
    for j, (S, own, held_out) in enumerate(runs[1:]):
        for got, true in (
            (prediction.outputs[j], S),
            (prediction.own_outputs[j], own),
            (prediction.held_out_outputs[j], held_out),
        ):
            assert (got - true).abs().max() <= tolerance * scale


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 5),
    p=st.integers(1, 3),
    q=st.integers(0, 4),
    mass=st.sampled_from([0.05, 1.0, [0.3, 2.0, 0.7]]),
    scale=st.sampled_from(["mean", "sum", "none"]),
    loss=st.sampled_from(["squared", "logistic"]),
    method=st.sampled_from(METHODS),
    steps=st.sampled_from([0, 2]),
)
@settings(max_examples=12, deadline=None)
def test_exact_for_models_linear_in_their_parameters(seed, n, p, q, mass, scale, loss, method, steps):
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64)  # noqa: E731
    target = lambda *shape: randn(*shape).sigmoid() if loss == "logistic" else randn(*shape)  # noqa: E731
    model, x, a, held_out = LinearFeatures(2, p, draw), randn(n, 2), target(n, p), randn(3, 2)
    zs = [Replacement(j % n, randn(2), target(p)) for j in range(3)]
    L = randn(q, p)  # any rank, singular included; 0: M = I
    metric = from_factor(lambda y: L.expand(len(y), -1, -1)) if q else "identity"
    lr = 0.002 if scale == "none" or q else 0.1
    given = {"steps": 6, "lr": lr, "mass": mass, "loss": loss}
    runs = trained(model, x, a, zs, held_out, metric=metric, c={"mean": 1 / n, "sum": 1.0, "none": 0.0}[scale], **given)
    predicted = predict_twins(
        model, x, a, zs, held_out=held_out, output_metric=metric, scale=scale, method=method, cg_steps=steps, **given
    )
    assert_predicted(predicted, runs, 1e-10)


@pytest.mark.parametrize(("q", "method"), thinned(itertools.product([1, 2, 4], METHODS), 3))
def test_exact_where_the_metric_is_singular_and_outputs_share_parameters(method, q):
    """r⊥, which no ρ reaches, goes through K to outputs that M does see."""
    draw = torch.Generator().manual_seed(q)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64)  # noqa: E731
    model, x, a, held_out = LinearFeatures(2, 3, draw), randn(4, 2), randn(4, 3), randn(3, 2)
    zs, L = [Replacement(j, randn(2), randn(3)) for j in range(3)], randn(q, 3)
    metric, given = from_factor(lambda y: L.expand(len(y), -1, -1)), {"steps": 6, "lr": 0.004, "mass": 0.2}
    runs = trained(model, x, a, zs, held_out, metric=metric, **given)
    for steps in (0, 2):
        found = predict_twins(
            model, x, a, zs, held_out=held_out, output_metric=metric, method=method, cg_steps=steps, **given
        )
        assert_predicted(found, runs, 1e-10)


CASES = [
    ("squared", "identity", {"mass": 0.2}),
    ("squared", "identity", {"blocks": "network"}),
    ("cross_entropy", "cross_entropy", {"mass": 0.1}),
    ("cross_entropy", "identity", {"scale": "sum"}),
    ("logistic", "logistic", {}),
    ("huber", "identity", {}),
    ("mse", "identity", {}),
    (lambda y, a: (y - a).cosh().log().sum(-1), "identity", {"scale": "none", "mass": 5.0}),
]


@pytest.mark.parametrize(("loss", "metric", "options"), thinned(CASES, 2))
def test_cg_is_the_trained_twin_for_any_loss_and_metric(loss, metric, options):
    model, x, a, zs, held_out = small_problem(seed=3, n=4, p=3, twins=3)
    if loss in ("cross_entropy", "logistic"):
        a, zs = a.softmax(-1), [Replacement(z.index, z.x, z.target.softmax(-1)) for z in zs]
    runs = trained_stacked(model, x, a, zs, held_out, loss, metric, steps=12, lr=0.2, **options)
    given = {"loss": loss, "output_metric": metric, "held_out": held_out, "steps": 12, "lr": 0.2} | options
    assert_predicted(predict_twins(model, x, a, zs, method="cg", **given), runs, 1e-8)
    far = max((run[0] - runs[0][0]).abs().max().item() for run in runs)
    errors = [
        max((got - run[0]).abs().max().item() for got, run in zip(found.outputs, runs[1:], strict=True)) / far
        for found in (predict_twins(model, x, a, zs, **given, **of) for of in VARIANTS)
    ]
    assert errors[2] < 0.02
    assert errors[2] < errors[1] < 0.3 or errors[1] < 1e-9  # at c = 0 there is no inner system, and both are exact
    assert errors[0] < 0.8


VARIANTS = [
    {"method": "kernel-path"},
    {"method": "parameter-path", "cg_steps": 0},
    {"method": "parameter-path", "cg_steps": 3},
]


def trained_stacked(model, x, a, zs, held_out, loss, metric, *, blocks="layer", scale="mean", **given):
    if blocks == "layer":
        c = {"mean": 1 / len(x), "sum": 1.0, "none": 0.0}[scale]
        return trained(model, x, a, zs, held_out, loss=loss, metric=metric, c=c, **given)
    runs = []
    for z in [None, *zs]:  # one block for all parameters: the optimizer itself
        twin, (xs, ts) = deepcopy(model), ((x, a) if z is None else twin_data(x, a, z))
        opt = Woodbury(twin, lr=given["lr"], blocks=blocks, scale=scale, output_metric=metric, solver="cholesky")
        for _ in range(given["steps"]):
            opt.zero_grad()
            (0.5 * (twin(xs) - ts).square().sum(1).mean()).backward()
            opt.step()
        with torch.no_grad():
            runs.append((twin(x), None if z is None else twin(z.x[None])[0], twin(held_out)))
    return runs


def test_factors_of_equal_metrics_are_turned_onto_each_other():
    draw = torch.Generator().manual_seed(0)
    L_S = torch.randn(4, 2, 3, generator=draw, dtype=F64)
    turns = torch.linalg.qr(torch.randn(2, 4, 2, 2, generator=draw, dtype=F64)).Q
    turned = aligned(turns @ L_S, L_S, torch.arange(2), torch.tensor([1, 3]))
    expected = turns.clone()
    expected[[0, 1], [1, 3]] = torch.eye(2, dtype=F64)  # z is weighed by the twin's own factor already
    torch.testing.assert_close(turned, expected)


def test_the_columns_are_those_of_train_twins():
    model, x, a, zs, held_out = small_problem(seed=1, n=5, twins=4)
    given = {"held_out": held_out, "steps": 15, "mass": 0.1}
    result = train_twins(model, x, a, zs, **given)
    found = predict_twins(model, x, a, zs, method="cg", **given)
    assert [pair["candidate"] for pair in found.pairs] == [0, 1, 2, 3]
    for pair, true in zip(found.pairs, result.pairs, strict=True):
        assert pair["replaced"] == true["replaced"]
        for name in ("sup", "l2", "replaced", "others", "heldout"):
            assert pair[f"predicted_{name}"] == pytest.approx(true[f"measured_{name}"], rel=1e-8)
        for name in ("sup", "replaced", "others", "heldout"):
            assert pair[f"final_{name}"] == pytest.approx(true[f"final_{name}"], rel=1e-8)
    assert found.column("predicted_sup").tolist() == [pair["predicted_sup"] for pair in found.pairs]
    last = found.outputs - found.run_outputs
    np.testing.assert_allclose(last.norm(dim=-1).amax(-1), found.column("final_sup"), rtol=1e-12)
    torch.testing.assert_close(found.run_own_outputs[2], run_at(model, x, a, zs[2].x, 0.1, 15), rtol=1e-9, atol=1e-9)


def run_at(model, x, a, point, mass, steps):
    run = DenseRun(model, x, a, mass=mass, c=1 / len(x))
    for _ in range(steps):
        run.step(0.1)
    return run.outputs(point[None])[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_candidate_equal_to_the_original_does_not_diverge(method):
    model, x, a, zs, held_out = small_problem(n=4)
    same = Replacement(2, x[2], a[2])
    pair = predict_twins(model, x, a, [zs[0], same], held_out=held_out, steps=20, mass=0.05, method=method).pairs[1]
    assert max(pair["predicted_sup"], pair["predicted_heldout"]) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_groups_order_and_shared_replacements_do_not_matter(method):
    model, x, a, zs, held_out = small_problem(seed=4, n=4, twins=3)
    many = [Replacement(k, z.x, z.target) for k in range(4) for z in zs]
    given = {"held_out": held_out, "steps": 5, "mass": 0.1, "method": method}
    whole = predict_twins(model, x, a, many, **given)
    least = least_limit(lambda limit: predict_twins(model, x, a, many, memory_limit=limit, **given))
    grouped = predict_twins(model, x, a, many, memory_limit=least, **given)
    backwards = predict_twins(model, x, a, many[::-1], **given)
    for name in ("outputs", "own_outputs", "held_out_outputs"):
        torch.testing.assert_close(getattr(grouped, name), getattr(whole, name), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(getattr(backwards, name).flip(0), getattr(whole, name), rtol=1e-9, atol=1e-10)
    for one, other, last in zip(whole.pairs, grouped.pairs, backwards.pairs[::-1], strict=True):
        assert one["replaced"] == other["replaced"] == last["replaced"]
        assert one["predicted_sup"] == pytest.approx(other["predicted_sup"], rel=1e-8)
        assert one["predicted_sup"] == pytest.approx(last["predicted_sup"], rel=1e-8)


def least_limit(predict):
    with pytest.raises(ValueError, match=r"memory_limit is 1 bytes, and these 12 candidates on 4 samples") as caught:
        predict(1)
    return int(str(caught.value).split(" need ")[1].split(";")[0])


@pytest.mark.parametrize(
    ("method", "n", "width", "Q"),
    thinned(((m, *size) for m in METHODS[:3] for size in [(12, 24, 5), (5, 96, 1), (8, 12, 40)]), 8),
)
def test_memory_stays_within_the_limit(method, n, width, Q):
    model, x, a, zs, _ = small_problem(seed=1, n=n, p=4, width=width, twins=12)
    held_out = torch.randn(Q, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    given = {"held_out": held_out, "steps": 2, "method": method, "cg_steps": 2}
    with pytest.raises(ValueError, match="memory_limit") as caught:
        predict_twins(model, x, a, zs, memory_limit=1, **given)
    least = int(str(caught.value).split(" need ")[1].split(";")[0])
    for limit in (least, 2 * least):
        with LiveBytes() as seen:
            predict_twins(model, x, a, zs, memory_limit=limit, **given)
        assert seen.peak <= limit
    assert seen.peak > least / 4  # the estimate is no fantasy


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_loop_of_ones_own(method):
    model, x, a, zs, held_out = small_problem(seed=6)
    whole = predict_twins(model, x, a, zs, held_out=held_out, steps=8, lr=0.2, mass=0.3, method=method)
    predictor = TwinPredictor(model, x, a, zs, held_out=held_out, mass=0.3, method=method)
    opt = Woodbury(model, lr=0.2, mass=0.3)
    for _ in range(8):
        predictor.advance(0.2)
        opt.zero_grad()
        (0.5 * (model(x) - a).square().sum(1).mean()).backward()
        opt.step()
    torch.testing.assert_close(predictor.result().outputs, whole.outputs, rtol=1e-9, atol=1e-10)


def test_a_run_that_goes_elsewhere_is_refused():
    model, x, a, zs, _ = small_problem()
    predictor = TwinPredictor(model, x, a, zs)
    predictor.advance(0.1)
    with torch.no_grad():
        model[0].bias.add_(0.01)
    with pytest.raises(ValueError, match=r"the step after advance\(\) number 1 was not −lr·G⁻¹∇h"):
        predictor.advance(0.1)
    with pytest.raises(ValueError, match=r"was not −lr·G⁻¹∇h"):
        predictor.result()


def test_the_model_and_the_global_state_are_left_alone():
    model, x, a, zs, _ = small_problem()
    before, rng = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    for method in METHODS:
        predict_twins(model, x, a, zs, steps=3, method=method)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_masses_of_every_kind_auto_rates_and_one_sample():
    model, x, a, zs, held_out = small_problem(seed=8, n=3)
    draw = torch.Generator().manual_seed(0)
    rows = RowColumnMass(torch.full((5,), 2.0), torch.full((3,), 0.5))
    entries = {n: torch.rand(p.shape, generator=draw, dtype=F64) + 0.2 for n, p in model.named_parameters()}
    for mass in ({"0.weight": rows, "0.bias": 1.0, "2": 0.3, "4": 1.0}, entries):
        given = {"held_out": held_out, "steps": 5, "lr": "auto", "mass": mass}
        true = train_twins(model, x, a, zs, **given).pairs[0]["measured_heldout"]
        assert predict_twins(model, x, a, zs, method="cg", **given).pairs[0]["predicted_heldout"] == pytest.approx(true)
    model, x, a, zs, _ = small_problem(n=1, twins=1)
    assert predict_twins(model, x, a, zs, steps=3).pairs[0]["predicted_others"] == 0.0


def test_a_prediction_that_diverges_is_an_error():
    _, x, a, zs, _ = small_problem(seed=2)
    far = [Replacement(0, 1e3 * zs[0].x, zs[0].target)]  # the run on S bears the step, this twin does not
    with pytest.raises(NumericalError, match=r"step \d+: the predicted divergence is not finite"):
        predict_twins(nn.Linear(3, 2).double(), x, a, far, steps=300, lr=0.1, scale="none")


def bad(**changes):
    model, x, a, zs, held_out = small_problem()
    return {"model": model, "x": x, "targets": a, "candidates": zs, "held_out": held_out, "steps": 2} | changes


_, X, A, ZS, HELD = small_problem()
BAD = [
    ({"candidates": []}, ValueError, r"replacements is empty"),
    ({"candidates": [Replacement(9, X[0], A[0])]}, ValueError, r"index must be an int in 0..3"),
    ({"targets": A[:, :1], "candidates": [Replacement(0, X[0], A[0, :1])]}, ValueError, r"gives 2 outputs, targets have 1"),
    ({"method": "kernel_path"}, ValueError, r"unknown method 'kernel_path'; .*did you mean 'kernel-path'"),
    ({"loss": "squard"}, ValueError, r"unknown loss 'squard'; .*did you mean 'squared'"),
    ({"loss": 3}, TypeError, r"loss must be a name or a function .*got int"),
    ({"cg_steps": -1}, ValueError, r"cg_steps must be an int >= 0, got -1"),
    ({"steps": 0}, ValueError, r"steps must be an int >= 1"),
    ({"lr": 0.0}, ValueError, r"lr must be positive"),
    ({"lr": 5.0}, ValueError, r"lr = 5 is too large: the step needs lr < 2/λ_max"),
    ({"lr": "auto", "loss": lambda y, a: (y - a).square().sum(-1)}, ValueError, r"needs M = I under a loss of bounded"),
    ({"lr": "auto", "output_metric": "cross_entropy"}, ValueError, r"with loss='squared' and output_metric='cross_entropy'"),
    ({"lr": 5.0, "loss": "huber"}, ValueError, r"lr = 5 is too large: the step needs lr < 2/λ_max\(ΛHΛᵀ\) = "),
    ({"loss": lambda y, a: y - a}, ValueError, r"must return one number per sample"),
    ({"loss": "cross_entropy"}, ValueError, r"must be distributions"),
    ({"output_metric": huber(A)}, ValueError, r"belongs to the samples it was made for"),
    ({"scale": "mean-jacobian"}, ValueError, r"has no factor c"),
    ({"x": X.float()}, TypeError, r"targets is torch.float64 on cpu, x is torch.float32"),
    ({"model": nn.Linear(3, 2)}, TypeError, r"the model is torch.float32 on cpu, x is torch.float64"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input_is_one_clear_line(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        predict_twins(**bad(**changes))
    assert "\n" not in str(caught.value)
