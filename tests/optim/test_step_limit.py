"""lr < 2/λ_max: the check against dense eigenvalues, its error, lr="auto"."""

import math

import pytest
import torch
import torch.nn.functional as F

from optim import StepTooLargeError, Woodbury
from optim.steps.step_limit import auto_lr, check_lr, checked_rate
from tests.nt_kernel.cases import CASES, F64, mlp
from tests.reference import Dense, definite_metric, singular_metric

CHECKED = {
    "gradient descent": {"scale": "none"},
    "gradient descent, light": {"scale": "none", "mass": 1e-2},
    "sum": {"scale": "sum", "mass": 0.1},
    "mean": {"mass": 1e-4},
    "mean, one block": {"mass": 1e-4, "blocks": "network"},
    "softmax": {"scale": "none", "output_metric": "cross_entropy"},
    "softmax, mean": {"mass": 1e-4, "output_metric": "cross_entropy"},
    "definite": {"mass": 1e-2, "output_metric": definite_metric},
    "singular": {"scale": "none", "output_metric": singular_metric},
}


def one_step(model, x, lr, **options):
    opt = Woodbury(model, lr, **options)
    opt.zero_grad()
    model(x).square().mean().backward()
    try:
        opt.step()
    finally:
        opt.close()
    return opt


@pytest.mark.parametrize("case", CHECKED)
def test_the_error_names_the_limit(case):
    options = CHECKED[case]
    model, x, _ = CASES["mlp"].make()
    largest = Dense(model, x, **options).lambda_max()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(StepTooLargeError, match=r"lr = .* is too large: the step needs lr < 2/λ_max = ") as error:
        one_step(model, x, 2.001 / largest, **options)
    assert error.value.limit == pytest.approx(2 / largest, rel=1e-9)
    assert f"{2 / largest:.4g}" in str(error.value)
    assert error.value.lr == pytest.approx(2.001 / largest)
    assert isinstance(error.value, ValueError)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())  # refused before anything moved
    opt = one_step(model, x, 1.999 / largest, **options)
    assert largest * (1 - 1e-9) <= opt.lambda_max < 2 / 1.999 * largest * (1 + 1e-9)


def test_at_scale_mean_the_number_of_blocks_is_enough():
    model, x, _ = CASES["mlp"].make()
    assert one_step(model, x, 0.66, mass=1e-3).lambda_max == 3
    assert one_step(model, x, 1.99, mass=1e-3, blocks="network").lambda_max == 1


def test_a_frozen_layer_is_no_block():
    model, x, _ = CASES["frozen layer"].make()
    assert one_step(model, x, 0.99, mass=1e-3).lambda_max == 2
    assert Woodbury(model, "auto").param_groups[0]["lr"] == 0.5


def test_the_largest_rate_of_all_groups_counts():
    model, x, _ = CASES["mlp"].make()
    opt = Woodbury(model, 0.1, mass=1e-5, groups=[{"layers": ["2"], "lr": 50.0}])
    opt.param_groups[0]["lr"] = 1e-3
    model(x).square().mean().backward()
    with pytest.raises(StepTooLargeError, match="lr = 50 is too large"):
        opt.step()


def test_the_check_can_be_left_out():
    model, x, _ = CASES["mlp"].make()
    assert one_step(model, x, 1e6, scale="none", check_step=False).lambda_max is None


def test_auto_is_one_over_the_number_of_blocks_and_recorded():
    model, _, _ = CASES["mlp"].make()
    opt = Woodbury(model, "auto")
    assert opt.lr_is_auto
    assert opt.param_groups[0]["lr"] == 1 / 3
    assert not Woodbury(model, 1 / 3).lr_is_auto
    assert Woodbury(model, "auto", blocks="network").param_groups[0]["lr"] == 1.0


def test_the_linearised_step_contracts_below_the_limit_and_not_above():
    """A linear model at scale "none": the error after a step is exactly (I − lr·H)e."""
    torch.manual_seed(0)
    x, a = torch.randn(3, 5, dtype=F64), torch.randn(3, 1, dtype=F64)
    for factor, contracts in ((0.999, True), (1.001, False)):
        model = mlp(5, 1, bias=False).to(F64)
        limit = 2 / Dense(model, x, scale="none").lambda_max()
        H = Dense(model, x, scale="none").H()
        top = torch.linalg.eigh(H).eigenvectors[:, -1:]
        norms = []
        for _ in range(2):
            opt = Woodbury(model, factor * limit, scale="none", check_step=False)
            norms.append((top.T @ (model(x) - a)).abs().item())
            (0.5 * (model(x) - a).square().sum() / 3).backward()
            opt.step()
            opt.close()
        assert (norms[1] < norms[0]) == contracts


def test_cross_entropy_curvature_is_at_most_the_softmax_metric():
    """At scale "mean" with M = ∇²ℓ, lr < 2/N is safe whatever the logits: the loss falls."""
    torch.manual_seed(0)
    model, x, labels = mlp(4, 10, 10, 3).to(F64), torch.randn(8, 4, dtype=F64), torch.arange(8) % 3
    opt, losses = Woodbury(model, "auto", mass=1e-2, output_metric="cross_entropy"), []
    for _ in range(15):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert opt.lambda_max == 3
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_rates_out_of_range(lr):
    with pytest.raises(ValueError, match="lr must be positive and finite"):
        check_lr(lr)
    with pytest.raises(ValueError, match="lr must be positive and finite"):
        check_lr(torch.tensor(lr))


def test_good_rates():
    for lr in (1, 0.5, torch.tensor(0.5), "auto"):
        check_lr(lr)


def test_auto_for_other_scales_says_what_to_do():
    for scale in ("sum", "none"):
        with pytest.raises(ValueError, match=f'needs scale="mean"; with scale={scale!r} write a number'):
            auto_lr(3, scale)


def test_the_largest_of_a_stack_decides():
    stack = torch.stack([torch.eye(2), 5 * torch.eye(2)])
    assert checked_rate(0.1, math.inf, lambda: stack) == pytest.approx(5 * 2**0.5)  # the Frobenius norm was enough
    assert checked_rate(0.39, math.inf, lambda: stack) == pytest.approx(5)
    with pytest.raises(StepTooLargeError, match=r"^twin 3: lr = 0\.4 is too large: .* = 0\.4;"):
        checked_rate(0.4, math.inf, lambda: stack, "twin 3")


def test_a_kernel_that_is_not_finite_is_never_allowed():
    with pytest.raises((ValueError, RuntimeError)):
        checked_rate(0.1, math.inf, lambda: torch.full((2, 2), math.nan))
