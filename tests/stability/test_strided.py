"""The strided path: exact where theory says so, the parameter path at stride 1, first order in the stride, in its limits."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nt_kernel import from_factor
from nt_kernel.kernels.live_bytes import LiveBytes
from optim import Woodbury
from stability import Replacement
from stability.prediction.predict import TwinPredictor, predict_twins
from stability.prediction.strided import stride_at
from tests.stability.dense import F64, small_problem
from tests.stability.test_prediction import LinearFeatures, assert_predicted, least_limit, trained

STEPS = 15  # strides of 1 (eight times), 2, 2, 3


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 5),
    q=st.integers(0, 4),
    scale=st.sampled_from(["mean", "sum", "none"]),
    loss=st.sampled_from(["squared", "logistic"]),
    cg_steps=st.sampled_from([0, 2]),
)
@settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_exact_for_models_linear_in_their_parameters(seed, n, q, scale, loss, cg_steps):
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64)  # noqa: E731
    model, x, a, held_out = LinearFeatures(2, 3, draw), randn(n, 2), randn(n, 3), randn(3, 2)
    if loss == "logistic":
        a = a.sigmoid()
    zs, L = [Replacement(j % n, randn(2), randn(3).sigmoid()) for j in range(3)], randn(q, 3)
    metric = from_factor(lambda y: L.expand(len(y), -1, -1)) if q else "identity"
    given = {"steps": STEPS, "lr": 0.002 if scale == "none" or q else 0.1, "mass": 0.3, "loss": loss}
    runs = trained(model, x, a, zs, held_out, metric=metric, c={"mean": 1 / n, "sum": 1.0, "none": 0.0}[scale], **given)
    options = {"held_out": held_out, "output_metric": metric, "scale": scale, "method": "strided-path"}
    predicted = predict_twins(model, x, a, zs, cg_steps=cg_steps, **options, **given)
    assert_predicted(predicted, runs, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "metric"), [("cross_entropy", "cross_entropy"), ("squared", "identity")])
def test_stride_one_is_the_parameter_path_and_the_error_is_of_first_order(loss, metric):
    model, x, a, zs, held_out = small_problem(seed=5, n=5, p=3, width=12, twins=4)
    if loss == "cross_entropy":
        a, zs = a.softmax(-1), [Replacement(z.index, z.x, z.target.softmax(-1)) for z in zs]
    given = {"steps": 28, "lr": 0.1, "mass": 0.3, "loss": loss, "output_metric": metric, "held_out": held_out}
    whole = predict_twins(model, x, a, zs, cg_steps=6, **given)
    found = [
        predict_twins(model, x, a, zs, method="strided-path", cg_steps=6, stride=stride, **given)
        for stride in (1, 4, 8)
    ]
    torch.testing.assert_close(found[0].outputs, whole.outputs, rtol=1e-9, atol=1e-11)
    size = (whole.outputs - whole.run_outputs).norm()
    errors = [((f.outputs - whole.outputs).norm() / size).item() for f in found[1:]]
    assert errors[0] < errors[1] < 0.05
    assert errors[1] / errors[0] < 5  # of first order: about 7/3
    assert found[2].column("predicted_heldout").tolist() == pytest.approx(
        whole.column("predicted_heldout").tolist(), rel=0.05
    )


def test_strides_grow_with_the_run_and_end_with_it():
    taken, ends = 0, []
    while taken < 200:
        taken += stride_at(taken)
        ends.append(taken)
    assert ends[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    assert len(ends) == 27
    assert stride_at(1000, 3) == 3
    model, x, a, zs, _ = small_problem()
    predictor = TwinPredictor(model, x, a, zs, method="strided-path", steps=11)
    seen = []
    for _ in range(11):
        for name, g in predictor.advance(0.1).items():
            model.get_parameter(name).data.sub_(g, alpha=0.1)
        seen.append(predictor.next_look)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 11]
    assert len(predictor.result().pairs) == 2


def test_beside_a_loop_of_ones_own():
    model, x, a, zs, held_out = small_problem(seed=6)
    given = {"held_out": held_out, "mass": 0.3, "method": "strided-path"}
    whole = predict_twins(model, x, a, zs, steps=STEPS, lr=0.2, **given)
    predictor, opt = TwinPredictor(model, x, a, zs, **given), Woodbury(model, lr=0.2, mass=0.3)
    for t in range(STEPS):
        predictor.advance(0.2)
        opt.zero_grad()
        (0.5 * (model(x) - a).square().sum(1).mean()).backward()
        opt.step()
        if predictor.next_look > t + 1:
            with pytest.raises(ValueError, match=r"lies within a stride, whose candidates are at step \d+ already"):
                predictor.result()
    torch.testing.assert_close(predictor.result().outputs, whole.outputs, rtol=1e-9, atol=1e-10)


def test_a_rate_that_changes_within_a_stride_is_refused():
    model, x, a, zs, _ = small_problem()
    predictor = TwinPredictor(model, x, a, zs, method="strided-path")
    for _ in range(9):
        for name, g in predictor.advance(0.1).items():
            model.get_parameter(name).data.sub_(g, alpha=0.1)
    with pytest.raises(ValueError, match=r"a stride up to step 10 was taken at lr = 0.1, got lr = 0.05 at step 9"):
        predictor.advance(0.05)


def test_a_candidate_equal_to_the_original_does_not_diverge():
    model, x, a, zs, held_out = small_problem(n=4)
    given = {"held_out": held_out, "steps": 40, "mass": 0.05, "method": "strided-path"}
    pair = predict_twins(model, x, a, [zs[0], Replacement(2, x[2], a[2])], **given).pairs[1]
    assert max(pair["predicted_sup"], pair["predicted_heldout"]) < 1e-12


@pytest.mark.slow
def test_groups_do_not_matter_and_memory_stays_within_the_limit():
    model, x, a, zs, _ = small_problem(seed=4, n=4, p=3, width=24, twins=3)
    many = [Replacement(k, z.x, z.target) for k in range(4) for z in zs]
    given = {"steps": 9, "mass": 0.1, "method": "strided-path"}
    whole = predict_twins(model, x, a, many, **given)
    least = least_limit(lambda limit: predict_twins(model, x, a, many, memory_limit=limit, **given))
    with LiveBytes() as seen:
        grouped = predict_twins(model, x, a, many, memory_limit=least, **given)
    assert least / 4 < seen.peak <= least
    torch.testing.assert_close(grouped.outputs, whole.outputs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"stride": 0}, "stride must be an int >= 1, got 0"), ({"stride": 2.0}, "stride must be an int >= 1, got 2.0")],
)
def test_bad_input(changes, message):
    model, x, a, zs, _ = small_problem()
    with pytest.raises(ValueError, match=message):
        predict_twins(model, x, a, zs, **changes)
    with pytest.raises(ValueError, match="steps must be an int >= 1, got 0"):
        TwinPredictor(model, x, a, zs, steps=0)
