"""certify against ``train_twins`` on the same pair, the shape of its results, and when T0 to T3 say nothing."""

import math
from itertools import pairwise

import pytest
import torch

from optim import Woodbury
from stability import Replacement, certify, contraction_metric, record, train_twins
from stability.recording.rung import APPLIES, KINDS, NOT_APPLICABLE
from tests.stability.recorded import EXACT, F64, OPTIMIZERS, data, half_squares, linear, mlp, trained

WOODBURY = lambda m, lr: Woodbury(m, lr, mass=0.1)  # noqa: E731


def pair(model, make, *, n=5, d=2, p=2, k=3, **options):
    """Runs on S and on S^(k→z'), and z'."""
    x, a = data(n, d, p)
    z = Replacement(k, torch.full((d,), 0.7, dtype=F64), torch.full((p,), -0.4, dtype=F64))
    x2, a2 = x.clone(), a.clone()
    x2[k], a2[k] = z.x, z.target
    return trained(model, make, x, a, **options), trained(model, make, x2, a2, **options), z


@pytest.mark.parametrize(("loss", "p", "sigma"), [("squared", 2, 1.0), ("mse", 1, 2.0)])
def test_the_ladder_is_that_of_a_twin_study(loss, p, sigma):
    model, (x, a), held_out = mlp(2, p), data(5, 2, p), torch.randn(3, 2, dtype=F64)
    run, twin, z = pair(model, WOODBURY, p=p, steps=8, record_loss=loss, loss=lambda y, b: sigma * half_squares(y, b))
    found = certify(run, twin, held_out=held_out)
    study = train_twins(model, x, a, [z], held_out=held_out, steps=8, lr=0.1, mass=0.1, null_twin=False, loss=loss)
    expected = study.pairs[0]
    assert found.replaced == (3,)
    for name in ("T0", "T1", "T1c", "T2", "T3", "T4", "T5", "T5_others", "path_l2", "path_sup"):
        assert found[name].value == pytest.approx(expected[name], rel=1e-6), name
    for name in ("sup", "l2", "replaced", "others", "heldout"):
        assert found.measured[name] == pytest.approx(expected[f"measured_{name}"], rel=1e-6), name
    assert found.measured["final_others"] == pytest.approx(expected["final_others"], rel=1e-6)
    verdicts = {v["assumption"]: v for v in found.verdicts}
    for v in study.assumptions:
        assert verdicts[v["assumption"]]["verdict"] == v["verdict"]
        rel = 0.02 if v["assumption"] == "gradient flow" else 1e-5  # the study looks at λ_max(H_T) too: no step is left
        assert verdicts[v["assumption"]]["value"] == pytest.approx(v["value"], rel=rel, abs=1e-12)
    assert found["T0"].status == NOT_APPLICABLE  # tanh: the kernel drifts
    assert "no kernel drift" in found["T0"].reason


def test_where_every_assumption_holds_the_ladder_applies():
    """Linear in θ, G = D, a tiny step: no drift, and the flow is followed to 1e-6."""
    run, twin, _ = pair(linear(3, 1), EXACT["sgd"], n=2, d=3, p=1, k=1, lr=1e-7, steps=5)
    found = certify(run, twin)
    values = [found[name].value for name in ("T0", "T1", "T1c", "T2", "T3")]
    assert all(found[name].status == APPLIES for name in ("T0", "T1", "T1c", "T2", "T3")), found["T0"].reason
    assert all(high * (1 + 1e-9) >= low for high, low in pairwise(values))
    assert values[-1] * (1 + 1e-6) >= found.measured["l2"] > 0


REASONS = {
    "momentum": ({"make": EXACT["heavy-ball"]}, "momentum or weight decay"),
    "decay": ({"make": EXACT["sgd-decay"]}, "momentum or weight decay"),
    "adam": ({"make": OPTIMIZERS["radam"]}, "momentum"),
    "rmsprop": ({"make": OPTIMIZERS["centered"]}, "not descent"),
    "muon": ({"make": OPTIMIZERS["muon"]}, "not known to be metric descent"),
    "ascent": ({"make": EXACT["sgd-ascent"]}, "not descent"),
    "mini-batch": ({"batches": [torch.tensor([0, 1])] * 6}, "mini-batches"),
    "loss": ({"record_loss": half_squares}, "the loss is 'half_squares'"),
    "targets": ({"targets": None}, "targets are not known"),
    "mean-jacobian": ({"make": EXACT["woodbury-jacobian"]}, "mean-jacobian"),
    "masses": ({"make": EXACT["woodbury-network"]}, "masses change"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_the_theorem_does_not_speak_of_is_not_applicable(name):
    options, reason = REASONS[name]
    options = {"make": WOODBURY, **options}
    runs = pair(mlp(2, 2), **options)
    found = certify(*runs[:2], replaced=[3] if name == "targets" else None)
    for rung in ("T0", "T1", "T1c", "T2", "T3"):
        assert found[rung].status == NOT_APPLICABLE
        assert reason in found[rung].reason
        assert math.isnan(found[rung].value)
    assert found["T5"].applies
    assert "n/a" in str(found)


def test_two_replaced_samples_and_different_starts_are_not_the_theorems():
    x, a = data(4, 2, 2)
    a2 = a.clone()
    a2[[0, 2]] += 1
    found = certify(trained(mlp(2, 2), WOODBURY, x, a), trained(mlp(2, 2), WOODBURY, x, a2))
    assert found.replaced == (0, 2)
    assert "in one sample, it does in 2" in found["T0"].reason
    a2 = a.clone()
    a2[1] += 1
    found = certify(trained(mlp(2, 2), WOODBURY, x, a), trained(mlp(2, 2, seed=1), WOODBURY, x, a2))
    assert "same parameters" in found["T0"].reason
    assert found["T5"].value >= found.measured["sup"]


def test_every_rung_states_its_kind_assumptions_and_cost():
    run, twin, _ = pair(mlp(2, 2), WOODBURY, steps=4)
    found = certify(run, twin)
    frame = found.to_frame()
    assert set(frame["kind"]) <= set(KINDS)
    assert frame["assumptions"].str.len().min() > 0
    assert frame["formula"].str.len().min() > 0
    assert (frame.loc[["T4", "T5", "T0"], "seconds"] > 0).all()
    assert (frame.loc[["T4", "T5", "T0"], "nbytes"] > 0).all()
    assert found.cost.seconds > 0
    assert found.cost.nbytes > run.nbytes
    assert frame.loc["T4", "ratio"] == pytest.approx(found["T4"].value / found.measured["l2"])


def test_a_metric_tames_momentum_where_the_norm_explodes():
    run, twin, _ = pair(linear(2, 1), EXACT["heavy-ball"], n=3, d=2, p=1, k=1, steps=40, lr=0.3)
    plain = certify(run, twin)
    metric = contraction_metric(plain.closed_loop.matrices(), kind="discrete")
    found = certify(run, twin, metric=metric)
    assert found["T4"].value > 1e3 * found.measured["l2"]
    assert found.measured["l2"] <= found["T4_metric"].value < 0.01 * found["T4"].value


def test_runs_that_cannot_be_compared_are_refused():
    run, twin, _ = pair(mlp(2, 2), WOODBURY, steps=3)
    short = pair(mlp(2, 2), WOODBURY, steps=2)[1]
    with pytest.raises(ValueError, match="3 and 2 steps"):
        certify(run, short)
    with pytest.raises(ValueError, match="different parameters"):
        certify(run, pair(mlp(2, 2, width=4), WOODBURY, steps=3)[1])
    with pytest.raises(TypeError, match="recorded run"):
        certify(run, mlp(2, 2))
    with pytest.raises(TypeError, match="ContractionMetric"):
        certify(run, twin, metric=torch.eye(2))
    empty = record(mlp(2, 2), data(5, 2, 2)[0])
    with pytest.raises(ValueError, match="holds no step"):
        certify(run, empty)
    with pytest.raises(ValueError, match="of one size"):
        certify(run, pair(mlp(2, 2), WOODBURY, n=6, steps=3)[1])
