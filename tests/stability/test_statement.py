"""Every result states its kind, its assumptions and its cost, and says where it is not applicable."""

import numpy as np
import pytest
import torch
from torch import nn

from optim import Woodbury
from stability import (
    Replacement,
    certify,
    conformal_factor,
    contraction_metric,
    influence,
    on_average_gap,
    parameter_routes,
    predict_twins,
    record_action,
    statements,
    train_twins,
    uniform_estimate,
)
from stability.recording.rung import APPLIES, BOUND, ENCLOSURE, ESTIMATE, NOT_APPLICABLE, STATEMENT
from stability.risk_constants import ParameterConstants
from stability.statement import CERTIFICATE, GUARANTEE, TABLE
from tests.stability.recorded import EXACT, F64, data, half_squares, mlp, trained


@pytest.fixture(scope="module")
def study():
    x, a = data(4, 2, 1)
    z = Replacement(1, torch.ones(2, dtype=F64), torch.zeros(1, dtype=F64))
    return mlp(2, 1), x, a, z


def named(result):
    found = {s.name: s for s in statements(result)}
    for s in found.values():
        assert s.kind
        assert s.assumptions
        assert s.cost
        assert (s.status == APPLIES) == (s.reason == "")
    return found


def test_twins_and_certificates(study):
    model, x, a, z = study
    found = named(train_twins(model, x, a, [z], steps=3, null_twin=False))
    assert found["T0"].kind == STATEMENT
    assert found["T3"].kind == BOUND
    assert found["T5"].kind == ENCLOSURE
    assert found["T0"].status == found["T2"].status == NOT_APPLICABLE
    assert "no kernel drift" in found["T0"].reason
    assert found["T4"].status == found["path_sup"].status == APPLIES
    x2 = x.clone()
    x2[1] += 1
    runs = [trained(model, EXACT["sgd"], inputs, a, steps=2) for inputs in (x, x2)]
    certificate = certify(*runs)
    assert named(certificate).keys() == certificate.rungs.keys()


def test_estimates_and_guarantees(study):
    model, x, a, z = study
    for method in ("kernel-path", "parameter-path", "cg"):
        found = named(predict_twins(model, x, a, [z], steps=2, method=method))["predicted"]
        assert found.kind == ESTIMATE
        assert "no twin" in found.cost
    assert named(uniform_estimate(model, x, a, [z], steps=2))["radii"].kind == ESTIMATE
    assert named(conformal_factor([1.0] * 19, [1.0] * 19))["factor"].kind == GUARANTEE
    few = named(conformal_factor([1.0], [1.0]))["factor"]
    assert few.status == NOT_APPLICABLE
    assert "too few" in few.reason


def test_metrics(study):
    assert named(contraction_metric([0.5 * torch.eye(2, dtype=F64)], kind="discrete"))["rate"].kind == CERTIFICATE
    refused = named(contraction_metric([2 * torch.eye(2, dtype=F64)], kind="discrete"))["rate"]
    assert refused.status == NOT_APPLICABLE
    assert "spectral radius" in refused.reason


def test_actions_and_effects(study):
    model, x, a, z = study
    opt = Woodbury(model, 0.1)
    with record_action(model, x, lambda y: half_squares(y, a), optimizer=opt) as action:
        opt.zero_grad()
        half_squares(model(x), a).mean().backward()
        opt.step()
    assert named(action).keys() == {"action"}
    effects = influence(model, x, a, z.x[None], z.target[None], damping=0.1)
    assert named(effects)["per_sample"].kind == ESTIMATE
    one, two = np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])
    gap = named(on_average_gap(one, two, two, one, [0.0, 0.0], [2.0, 2.0]))["gap"]
    assert "2 draws of S" in gap.cost


def test_routes():
    c = ParameterConstants(
        20, (0.1,) * 30, lipschitz=3.0, smoothness=2.0, curvature=0.5, everywhere=True, both_runs=True
    )
    routes = {route.route: route for route in parameter_routes(c, loss_bound=100.0)}
    for name, route in routes.items():
        found = named(route)[name]
        assert found.status == (
            NOT_APPLICABLE if not route.applicable else "undecided" if route.conditional else APPLIES
        )
    assert {named(route)[name].status for name, route in routes.items()} >= {APPLIES}


def test_what_is_no_result_is_refused():
    with pytest.raises(TypeError, match="Certificate, TwinResult"):
        statements(nn.Linear(1, 1))
    assert len(TABLE) == 10
