"""``check_assumptions``: every negative control is caught and its neighbour passes; places, failures on the way, refusals."""

import json
import math

import pytest
import torch
from torch import nn

from examples import mutation_table
from optim import Woodbury
from stability import AssumptionReport, Replacement, check_assumptions, train_twins
from stability.assumptions import CATALOGUE, CONTROLS, AssumptionViolated
from stability.assumptions.along import bounded
from stability.assumptions.controls import linear, network, samples
from stability.assumptions.optimizer import Steps, steps_of
from stability.assumptions.verdict import Assumption
from tests.stability.dense import F64, DenseRun, small_problem, twin_data

PAGE = mutation_table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.key)
def test_what_violates_is_caught_and_what_is_just_inside_passes(control):
    caught, passed = control.verdict(control.violating), control.verdict(control.inside)
    assert mutation_table.row(control, caught, passed) in PAGE or control.key in (
        "resolved_by_floats",
        "determinism",
    )  # noise
    assert (caught.verdict, passed.verdict) == ("violated", "holds")
    assert caught.margin < 0 or control.key in ("full_row_rank",)
    assert passed.margin >= 0


def test_every_assumption_of_the_catalogue_has_a_control_and_no_other_is_checked():
    assert [control.key for control in CONTROLS] == list(CATALOGUE)
    report = check_assumptions(network(nn.Tanh()), samples(), {"lr": 0.1}, steps=3)
    assert report.keys == tuple(CATALOGUE)


@pytest.fixture(scope="module")
def studied():
    """A network with two twins: the report and, from the definitions, what it should say."""
    model, x, a, zs, _ = small_problem(seed=2, width=6)
    options = {"lr": 0.2, "mass": 0.5}
    report = check_assumptions(model, (x, a), options, replacements=zs, steps=12)
    runs = [DenseRun(model, x, a, mass=0.5, c=1 / len(x))]
    runs += [DenseRun(model, *twin_data(x, a, z), mass=0.5, c=1 / len(x)) for z in zs]
    series = {"kappa": [], "xi": [], "L": [], "layers": []}
    union = torch.cat([x, *(z.x[None] for z in zs)])
    targets = torch.cat([a, *(z.target[None] for z in zs)])
    for t in range(13):
        sees = [[*range(len(x)), *range(len(x), len(union))]] + [[*range(len(x)), len(x) + j] for j in range(len(zs))]
        series["kappa"].append([run.norms(union[rows]) for run, rows in zip(runs, sees, strict=True)])
        jacobians = [run.jacobian(union[rows]) for run, rows in zip(runs, sees, strict=True)]
        series["layers"].append(
            [
                {n: torch.linalg.matrix_norm(J.unflatten(0, (-1, 2)), 2) for n, J in blocks.items()}
                for blocks in jacobians
            ]
        )
        series["L"].append(
            [(run.outputs(union[rows]) - targets[rows]).norm(dim=1) for run, rows in zip(runs, sees, strict=True)]
        )
        H = runs[0].kernel(x, x) / len(x)
        series["xi"].append(torch.linalg.eigh((H + H.T) / 2))
        if t < 12:
            for run in runs:
                run.step(0.2)
    return model, (x, a), options, zs, report, series


@pytest.mark.parametrize(("key", "name"), [("bounded_jacobian", "kappa"), ("bounded_gradients", "L")])
def test_suprema_and_their_places_are_those_of_the_definitions(studied, key, name):
    *_, zs, report, series = studied
    found, n = report[key], 4
    peak, step, run, row = max(
        (v.item(), t, r, i)
        for t, runs in enumerate(series[name])
        for r, vs in enumerate(runs)
        for i, v in enumerate(vs)
    )
    assert found.value == pytest.approx(peak, rel=1e-9)
    replaced = zs[run - 1 if run else row - n].index if run or row >= n else -1
    assert (found.step, found.sample) == (step, row if row < n else replaced)
    assert found.threshold == pytest.approx(4 * max(v.max().item() for v in series[name][0]), rel=1e-9)


def test_the_layer_of_kappa_has_the_largest_jacobian_there(studied):
    *_, report, series = studied
    _, step, run, row = max(
        (v.item(), t, r, i)
        for t, runs in enumerate(series["kappa"])
        for r, vs in enumerate(runs)
        for i, v in enumerate(vs)
    )
    norms = {layer: values[row].item() for layer, values in series["layers"][step][run].items()}
    assert report["bounded_jacobian"].layer == max(norms, key=norms.get)
    assert len(norms) == 3


def test_xi_its_step_and_the_sample_of_its_weakest_direction(studied):
    *_, report, series = studied
    step = min(range(13), key=lambda t: series["xi"][t][0][0].item())
    values, vectors = series["xi"][step]
    found = report["positive_rate"]
    assert (found.value, found.step) == (pytest.approx(values[0].item(), rel=1e-8), step)
    assert found.sample == vectors[:, 0].reshape(4, 2).square().sum(1).argmax().item()


def test_numbers_of_the_pairs_are_those_of_the_twin_study(studied):
    model, (x, a), options, zs, report, _ = studied
    result = train_twins(model, x, a, zs, steps=12, **options)
    for key, share in (
        ("no_kernel_drift", lambda p: p["drift"] / p["disturbance"]),
        ("one_metric", lambda p: p["metric_gap"]),
        ("resolved_by_floats", lambda p: p["null_sup"] / p["measured_sup"]),
    ):
        verdicts = [v for v in report if v.assumption == CATALOGUE[key].name]
        assert [v.value for v in verdicts] == pytest.approx([share(p) for p in result.pairs])
        assert [v.replaced for v in verdicts] == [z.index for z in zs]
        assert report[key].value == max(v.value for v in verdicts)
    assert report["no_kernel_drift"].step in [int(row.argmax()) for row in result.trajectories["drift"]]


def test_halving_the_step_estimates_the_distance_to_the_flow():
    data = {"steps": 15, "replacements": None}
    by = {
        how: check_assumptions(network(nn.Tanh()), samples(), {"lr": 0.1}, flow=how, **data)
        for how in ("halving", "ode")
    }
    estimated, exact = (by[how]["gradient_flow"].value for how in ("halving", "ode"))
    assert estimated == pytest.approx(exact, rel=0.05)
    finer = check_assumptions(network(nn.Tanh()), samples(), {"lr": 0.05}, steps=30)["gradient_flow"].value
    assert finer == pytest.approx(exact / 2, rel=0.1)


def test_a_step_that_grows_too_large_on_the_way_is_a_verdict_and_what_was_seen_before_it_counts():
    model = nn.Sequential(linear(1), linear(1))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.5)
    x, a = torch.ones(1, 1, dtype=F64), torch.full((1, 1), 4.0, dtype=F64)
    options = {"replacements": [Replacement(0, x[0], a[0] / 2)], "steps": 60}
    report = check_assumptions(model, (x, a), {"lr": 0.3, "scale": "none"}, **options)  # λ_max grows from ½ to 8
    limit = report["step_limit"]
    assert limit.verdict == "violated"
    assert limit.value >= 2
    assert 0 < limit.step < 60
    assert report["bounded_jacobian"].value > 1  # κ of the steps before
    assert report["gradient_flow"].verdict == "undecided"
    assert f"step {limit.step}" in report["gradient_flow"].reason


def test_a_loss_of_constant_curvature_is_trained_as_its_multiple():
    x, a = torch.eye(4, dtype=F64)[:, :3], torch.ones(4, 3, dtype=F64)
    x[3] = 0.5
    model = nn.Linear(3, 3, bias=False).double()
    half = check_assumptions(model, (x, a), {"lr": 0.3, "scale": "none"}, steps=5, loss=nn.MSELoss())
    same = check_assumptions(model, (x, a), {"lr": 0.2, "scale": "none"}, steps=5)
    assert "σ = 0.666667" in half["squared_loss"].reason
    assert half["step_limit"].value == pytest.approx(same["step_limit"].value)
    assert half["bounded_gradients"].value == pytest.approx(2 / 3 * same["bounded_gradients"].value)
    assert half.context["lr"] == 0.3  # as it was given; the limit of it is 3/2 of that under ½‖y − a‖²
    limits = [float(report["step_limit"].reason.rpartition(" ")[2]) for report in (half, same)]
    assert limits[0] == pytest.approx(1.5 * limits[1], rel=1e-3)
    auto = check_assumptions(model, (x, a), steps=2, loss=lambda y, b: 3 * (y - b).square().sum())  # σ = 6
    assert (auto.context["lr"], auto["step_limit"].verdict) == (pytest.approx(1 / 6), "holds")


def test_another_loss_leaves_undecided_what_needs_a_run():
    report = check_assumptions(network(nn.Tanh()), samples(), {"lr": 0.1}, steps=2, loss="logistic")
    assert report["squared_loss"].verdict == "violated"
    assert report["no_kernel_drift"].verdict == "undecided"
    assert report["full_row_rank"].verdict == "holds"
    assert report.status == 1


def test_what_cannot_be_decided_says_why():
    x = torch.eye(3, dtype=F64)[:, :3].clone()
    x[2] = x[1] + 1e-9 * x[2]
    zs = [Replacement(0, 2 * x[0], -torch.ones(1, dtype=F64))]
    a = torch.ones(3, 1, dtype=F64)
    report = check_assumptions(linear(3), (x, a), {"lr": 0.1, "scale": "none"}, replacements=zs, steps=2)
    for key in ("positive_rate", "full_row_rank"):
        assert report[key].verdict == "undecided"
        assert "cannot be told from 0" in report[key].reason
    assert report["float_sufficiency"].verdict == "violated"
    same = check_assumptions(linear(3), (x, a), replacements=[Replacement(0, x[0], a[0])], steps=2)
    assert same["resolved_by_floats"].verdict == "undecided"


def test_an_output_that_nothing_moves_is_named():
    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear(3)

        def forward(self, x):
            return self.layer(x * (x[:, :1] >= 0))  # no parameter sees a sample with a negative first coordinate

    x = torch.eye(3, dtype=F64)
    x[1, 0] = -1
    zs = [Replacement(0, 2 * x[0], -torch.ones(1, dtype=F64))]
    found = check_assumptions(
        Row(), (x, torch.ones(3, 1, dtype=F64)), {"lr": 0.1, "scale": "none"}, replacements=zs, steps=1
    )
    assert (found["full_row_rank"].verdict, found["full_row_rank"].sample) == ("violated", 1)
    assert "sample 1" in found["full_row_rank"].reason


@pytest.mark.parametrize(
    ("series", "verdict"),
    [
        ([1.0] * 20, "holds"),
        ([1.0, 1.9] + [1.9] * 20, "holds"),
        ([1.0, 2.1] + [1.0] * 20, "violated"),
        (torch.linspace(1, 1.6, 21).tolist(), "undecided"),  # 0.03 a step: past 2 within the next 20
        (torch.linspace(1, 1.4, 21).tolist(), "holds"),
        (torch.linspace(1, 1.9, 18).tolist() + [1.9] * 3, "holds"),  # the last tenth of 20 steps stands still
        ([*torch.linspace(1, 1.9, 20).tolist(), 1.9], "undecided"),  # half of it does
        ([1.0, math.nan, 1.0], "violated"),
        ([0.0, 0.0], "holds"),
        ([0.0, 1e-9], "violated"),
    ],
)
def test_bounded_is_a_claim_that_can_fail(series, verdict):
    assert bounded("bounded_jacobian", series, 2.0, {"step": 0}).verdict == verdict


def test_metric_floor_knows_every_mass_and_the_mu_that_was_declared():
    model, data = network(nn.Tanh()), samples()
    mass = {"0.bias": torch.linspace(0.3, 0.8, 6, dtype=F64), "2": 0.5}
    found = check_assumptions(model, data, {"lr": 0.05, "mass": mass}, steps=2)["metric_floor"]
    assert (found.value, found.layer) == (pytest.approx(0.3), "0")
    declared = {"limits": {"metric_floor": 0.4}, "steps": 2}
    found = check_assumptions(model, data, {"lr": 0.05, "mass": mass}, **declared)["metric_floor"]
    assert (found.verdict, found.margin) == ("violated", pytest.approx(-0.1))


@pytest.mark.parametrize("weight", [-0.3, 0.3])
def test_metric_floor_is_the_smallest_eigenvalue_of_the_dense_metric(weight):
    M = torch.tensor([[1.0, 0.0], [0.0, weight]], dtype=F64)
    model, x, a, zs, _ = small_problem(seed=1)
    steps = {"lr": 0.01, "mass": 2.0, "output_metric": lambda y: M.expand(len(y), 2, 2)}
    found = check_assumptions(model, (x, a), steps, replacements=zs, steps=1)["metric_floor"]
    G = DenseRun(model, x, a, mass=2.0, c=1 / len(x), M=lambda y: M.expand(len(y), 2, 2)).metric()
    least = {name: torch.linalg.eigvalsh(block)[0].item() for name, block in G.items()}
    assert found.value == pytest.approx(min(least.values()), rel=1e-9)
    if weight < 0:  # otherwise it is the mass, the same in every layer
        assert found.layer == min(least, key=least.get)


def test_optimizers_say_what_steps_they_make():
    model = network(nn.Tanh())
    assert steps_of(Woodbury(model, lr=0.2, mass={"0": 0.5}, scale="sum")) == Steps(
        0.2, {"0": 0.5}, steps_of(Woodbury(model)).output_metric, "sum"
    )
    assert steps_of(torch.optim.SGD(model.parameters(), lr=0.3)) == Steps(0.3, scale="none")
    for optimizer, said in (
        (torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), "momentum = 0.9"),
        (Woodbury(model, weight_decay=0.1), "weight_decay = 0.1"),
        (Woodbury(model, damping=2.0), "damping"),
        (Woodbury(model, groups=[{"layers": ["0"], "lr": 0.01}]), "2 parameter groups"),
        ({"lrr": 0.1}, "did you mean 'lr'"),
    ):
        with pytest.raises(ValueError, match=said):
            steps_of(optimizer)
    with pytest.raises(TypeError, match="Adam"):
        steps_of(torch.optim.Adam(model.parameters()))


def test_input_that_cannot_be_used_is_refused_with_what_to_write():
    model, data = network(nn.Tanh()), samples()
    refused = [
        ({"limits": {"no_kernel_drif": 1.0}}, "did you mean 'no_kernel_drift'"),
        ({"limits": {"step_limit": 3.0}}, "at most 2"),
        ({"limits": {"bounded_jacobian": 0.5}}, "at least 1"),
        ({"limits": {"one_metric": math.inf}}, "finite number"),
        ({"skip": ["nothing"]}, "unknown assumption"),
        ({"steps": 0}, "steps must be an int >= 1"),
        ({"flow": "odd"}, "did you mean 'ode'"),
        ({"loss": "hinge"}, "unknown loss"),
    ]
    for options, said in refused:
        with pytest.raises(ValueError, match=said):
            check_assumptions(model, data, {"lr": 0.1}, **options)
    with pytest.raises(TypeError, match=r"data must be \(x, targets\)"):
        check_assumptions(model, data[0], {"lr": 0.1})
    with pytest.raises(TypeError, match=r"write \['one_metric'\]"):
        check_assumptions(model, data, {"lr": 0.1}, skip="one_metric")
    with pytest.raises(ValueError, match="three or more"):
        check_assumptions(model, (data[0][:2], data[1][:2]), {"lr": 0.1})


def test_nothing_of_the_users_is_changed():
    model, (x, a) = nn.Sequential(nn.Dropout(0.5), network(nn.Tanh())), samples()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state, kept = torch.get_rng_state(), x.clone()
    check_assumptions(model, (x, a), {"lr": 0.1}, steps=1)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, kept)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_report_as_table_frame_json_and_exception():
    rows = (
        Assumption("positive rate", "ξ", 0.0, 0.0, 0.0, "undecided", "who knows", "P5"),
        Assumption("no kernel drift", "share", 0.5, 1e-6, -0.5, "violated", "dropped", "P8", replaced=1, step=3),
        Assumption("no kernel drift", "share", 0.7, 1e-6, -0.7, "violated", "dropped", "P8", replaced=2, step=4),
        Assumption("float sufficiency", "share", math.inf, 0.1, -math.inf, "holds", "–", "P5"),
    )
    report = AssumptionReport(rows, {"n": 3})
    assert (report.verdict, report.status, report["no_kernel_drift"].replaced) == ("violated", 1, 2)
    assert (report.without(["no kernel drift"]).status, AssumptionReport(rows[3:]).status) == (3, 0)
    assert list(report.to_frame()["key"]) == [
        "positive_rate",
        "no_kernel_drift",
        "no_kernel_drift",
        "float_sufficiency",
    ]
    read = json.loads(report.to_json())
    assert (read["assumptions"][3]["value"], read["context"]) == ("inf", {"n": 3})
    text = str(report)
    assert text.startswith("3 assumptions, 4 verdicts: 1 hold, 1 undecided, 2 violated (n 3)")
    assert "no kernel drift is violated: dropped" in text
    with pytest.raises(AssumptionViolated, match=r"= 0.7.*step 4, twin of sample 2"):
        report.raise_if_violated()
    assert report.raise_if_violated(allow=["no_kernel_drift"]) is report
    with pytest.raises(AssumptionViolated, match="who knows"):
        report.raise_if_violated(allow=["no_kernel_drift"], undecided=True)
    with pytest.raises(KeyError, match="not checked"):
        report["one_metric"]


def test_noise_in_backward_passes_and_in_hidden_state_is_found_and_named():
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(context, z):
            return z.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * (1 + 1e-9 * torch.rand((), dtype=F64))

    class Layer(nn.Linear):
        def forward(self, x):
            return Noisy.apply(super().forward(x))

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    x, a = samples()
    for kind, said in ((Layer, "backward passes differ"), (Counting, "forward passes differ")):
        report = check_assumptions(nn.Sequential(kind(3, 1).double()), (x, a), {"lr": 0.1}, steps=1)
        assert said in report["determinism"].reason
        assert report["positive_rate"].reason == "not measured: the model is not deterministic"
    assert (
        check_assumptions(nn.Sequential(Layer(3, 1).double()), (x, a), {"lr": 0.1}, steps=1)["determinism"].layer == "0"
    )
