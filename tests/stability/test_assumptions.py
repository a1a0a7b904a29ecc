"""Each assumption is caught when it fails and passes when it holds; the metric gap equals its dense definition."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from stability import Replacement, train_twins
from stability.assumptions import (
    CATALOGUE,
    SYSTEMS,
    no_kernel_drift,
    positive_rate,
    resolved_by_floats,
    smooth_activations,
)
from stability.assumptions.alone import Alone, determinism, same_bits
from stability.assumptions.catalogue import FLOW_DEFECT, limits_of
from stability.assumptions.verdicts import float_sufficiency, gradient_flow_followed, one_metric, step_limit
from tests.stability.dense import F64, DenseRun, small_problem, twin_data
from tests.stability.test_twins import CASES, matrix_metric, softmax_metric


def verdicts(result):
    return {v["assumption"]: v["verdict"] for v in result.assumptions}


def test_a_network_trained_by_euler_steps_violates_what_it_must():
    model, x, a, zs, _ = small_problem(width=12)
    found = verdicts(train_twins(model, x, a, zs, steps=30, lr=0.3))
    assert found == {
        "positive rate": "holds",
        "step below its limit": "holds",
        "gradient flow": "violated",
        "squared loss": "holds",
        "C¹ activations": "holds",
        "no kernel drift": "violated",
        "one metric": "violated",
        "resolved by floats": "holds",
    }


def test_flow_verdict_opens_and_closes_with_the_step():
    model, x, a, zs, _ = small_problem()
    by_step = {
        lr: verdicts(train_twins(model, x, a, zs, steps=2, lr=lr, null_twin=False))["gradient flow"]
        for lr in (0.3, 1e-3, 1e-8)
    }
    assert by_step == {0.3: "violated", 1e-3: "undecided", 1e-8: "holds"}


def test_equal_twins_leave_the_question_of_float_resolution_open():
    model, x, a, _, _ = small_problem()
    result = train_twins(model, x, a, [Replacement(0, x[0], a[0])], steps=3)
    assert verdicts(result)["resolved by floats"] == "undecided"
    tiny = Replacement(0, x[0] + 1e-15, a[0])
    assert verdicts(train_twins(model, x, a, [tiny], steps=3))["resolved by floats"] == "violated"


@pytest.mark.parametrize("case", CASES)
def test_metric_gap_is_the_relative_difference_of_the_dense_metrics(case):
    options = CASES[case]
    model, x, a, zs, _ = small_problem(seed=3)
    result = train_twins(model, x, a, zs, steps=1, lr=1e-3, **options)
    c = {"mean": 1 / len(x), "sum": 1.0, "none": 0.0}[options.get("scale", "mean")]
    M = {"cross_entropy": softmax_metric, matrix_metric: matrix_metric}.get(options.get("output_metric"))
    for z, pair in zip(zs, result.pairs, strict=True):
        G = DenseRun(model, x, a, mass=options.get("mass", 1.0), c=c, M=M).metric()
        G2 = DenseRun(model, *twin_data(x, a, z), mass=options.get("mass", 1.0), c=c, M=M).metric()
        gap = max(torch.linalg.eigvals(torch.linalg.solve(G2[n], G[n] - G2[n])).abs().max().item() for n in G)
        assert pair["metric_gap"] == pytest.approx(gap, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("model", "verdict", "reason"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "holds", "C¹"),
        (nn.Sequential(nn.Linear(2, 2), nn.Softplus()), "holds", "C¹"),
        (nn.Sequential(nn.Linear(2, 2), nn.ELU()), "holds", "C¹"),
        (nn.Sequential(nn.Linear(2, 2), nn.ELU(alpha=0.5)), "violated", "layer '1' (ELU)"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "violated", "layer '1' (ReLU)"),
        (nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LeakyReLU())), "violated", "layer '1.0' (LeakyReLU)"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "undecided", "'1' (LayerNorm)"),
    ],
)
def test_kinks_are_found_by_module(model, verdict, reason):
    found = smooth_activations(model)
    assert found.verdict == verdict
    assert reason in found.reason


def test_margins_point_to_the_good_side():
    assert positive_rate(0.2, "").margin > 0
    assert no_kernel_drift(0.5, 1.0, 0).margin < 0 < no_kernel_drift(0.0, 1.0, 0).margin
    assert resolved_by_floats(1e-15, 0.5, 0).margin > 0 > resolved_by_floats(0.4, 0.5, 0).margin
    assert gradient_flow_followed(0.0, "euler").margin > 0 > gradient_flow_followed(0.4, "euler").margin


def test_a_share_at_its_limit_holds_and_a_rate_or_a_step_at_its_limit_does_not():
    at, above = 0.25, math.nextafter(0.25, 1)
    for found in (
        lambda share: no_kernel_drift(share, 1.0, 0, at),
        lambda gap: one_metric(gap, 0, at),
        lambda share: resolved_by_floats(share, 1.0, 0, at),
        lambda share: float_sufficiency(share, at),
    ):
        assert (found(at).verdict, found(above).verdict) == ("holds", "violated")
    assert gradient_flow_followed(FLOW_DEFECT, "euler").verdict == "undecided"
    assert positive_rate(at, "", at).verdict == "violated"
    assert positive_rate(above, "", at).verdict == "holds"
    assert step_limit(1.0, 2.0).verdict == "violated"
    assert step_limit(1.0, math.nextafter(2.0, 0)).verdict == "holds"
    assert step_limit(0.5, 5.0, 2.0, 4.0).verdict == "violated"
    assert no_kernel_drift(1.0, 0.0, 0).verdict == "violated"  # a drift where nothing else disturbs


def test_limits_are_those_of_the_page_and_end_where_they_have_to():
    page = (Path(__file__).parents[2] / "docs" / "assumptions.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| `(\w+)` \|.*limit \(([-0-9.e]+)\)", page, re.MULTILINE)
    known = CATALOGUE | SYSTEMS
    assert len(said) == 10
    assert {key: float(limit) for key, limit in said} == {key: known[key].limit for key, _ in said}
    assert limits_of({"step_limit": 2})["step_limit"] == 2
    assert limits_of({"bounded_jacobian": 1})["bounded_jacobian"] == 1
    for key, limit in (("step_limit", math.nextafter(2, 3)), ("bounded_gradients", math.nextafter(1, 0))):
        with pytest.raises(ValueError, match=f"limit of {key}"):
            limits_of({key: limit})


def test_the_last_bit_counts_for_determinism():
    class Late(nn.Linear):
        """Another last bit from the third pass on."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            y = super().forward(x)
            return y if self.calls < 3 else torch.nextafter(y, y + 1)

    x = torch.eye(3, dtype=F64)
    found = determinism(Late(3, 1).double(), x)
    assert (found.verdict, 0 < found.value < 1e-15) == ("violated", True)
    outputs = torch.ones(4, 3, 1, dtype=F64)
    other = outputs.clone()
    other[2, 1] += 2**-52
    found = same_bits(Alone(outputs, {}), Alone(other, {}))
    assert (found.verdict, found.value, found.step, found.sample) == ("violated", 2**-52, 2, 1)
    assert same_bits(Alone(outputs, {}), Alone(outputs.clone(), {})).verdict == "holds"


def test_singular_kernels_are_undecided_only_when_nothing_forces_them():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=draw, dtype=F64)
    x[2] = x[1] + 1e-9 * x[0]  # nearly equal: not a repeated row, yet below what float64 tells from one
    model = nn.Linear(8, 1).double()
    z = Replacement(0, x[0] + 1, torch.ones(1, dtype=F64))
    rate = train_twins(model, x, torch.zeros(3, 1, dtype=F64), [z], steps=2).assumptions[0]
    assert (rate["value"], rate["verdict"]) == (0.0, "undecided")


def test_a_loss_without_curvature_bears_every_step():
    found = step_limit(5.0, 0.0)
    assert found.verdict == "holds"
    assert found.reason.endswith("inf")
