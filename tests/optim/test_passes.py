"""Which forward passes count as samples of the metric, and what the optimizer leaves alone."""

import copy
import gc
import pickle
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from optim import Woodbury
from tests.nt_kernel.cases import F64, mlp
from tests.optim.problems import LR, OPTIONS, check_step_is_dense, gradients, optimizer, problem
from tests.reference import Dense, distance, trainable


def test_evaluation_passes_do_not_count():
    model, x, loss = problem()
    opt = optimizer(model)
    with torch.no_grad():
        model(x[:1])
    y = model(x)
    model(10 * x)  # recorded by autograd, but its output never receives a gradient
    loss(y).backward()
    with torch.no_grad():
        model(x[:2])
    with torch.inference_mode():
        model(x[:3])
    check_step_is_dense(model, x, opt)


@pytest.mark.parametrize("option", ["small mass", "sum", "softmax"])
def test_micro_batches_count_together(option):
    model, x, loss = problem()
    opt = optimizer(model, **OPTIONS[option])
    for rows in (slice(0, 3), slice(3, 4)):
        loss(model(x[rows]), rows).backward()
    check_step_is_dense(model, x, opt, **OPTIONS[option])


def test_two_passes_in_one_loss_count_together():
    model, x, loss = problem()
    opt = optimizer(model)
    loss(torch.cat([model(x[:2]), model(x[2:])])).backward()
    check_step_is_dense(model, x[[2, 3, 0, 1]], opt)


def test_two_backwards_through_one_pass_count_once():
    model, x, loss = problem()
    opt = optimizer(model, scale="sum")
    y = model(x)
    loss(y).backward(retain_graph=True)
    y.square().mean().backward()
    check_step_is_dense(model, x, opt, scale="sum")


def test_zero_grad_drops_the_passes():
    model, x, loss = problem()
    for set_to_none in (True, False):
        opt = optimizer(model)
        loss(5 * model(3 * x)).backward()
        opt.zero_grad(set_to_none=set_to_none)
        loss(model(x)).backward()
        check_step_is_dense(model, x, opt)
        opt.close()


def test_step_drops_the_passes_and_leaves_the_gradients():
    """Without zero_grad the old gradient is still there, and is preconditioned by the new samples."""
    model, x, loss = problem()
    opt = optimizer(model)
    loss(model(x[:3]), slice(0, 3)).backward()
    opt.step()
    first = gradients(model)
    loss(model(x[3:]), slice(3, 4)).backward()
    assert distance(gradients(model), first) > 0.01
    check_step_is_dense(model, x[3:], opt)


def test_output_changed_in_place_after_the_pass():
    model, x, loss = problem()
    opt = optimizer(model)
    y = model(x)
    y *= 3.0
    loss(y.sin()).backward()
    check_step_is_dense(model, x, opt)


def test_a_copy_of_the_model_is_not_the_model():
    model, x, loss = problem()
    opt = optimizer(model)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, thawed):
        loss(other(7 * x)).backward()
    loss(model(x)).backward()
    check_step_is_dense(model, x, opt)


def test_passes_inside_torch_func_do_not_count():
    """Diagnostics between backward and step: input sensitivities, Jacobians in the parameters, other weights."""
    model, x, loss = problem()
    opt = optimizer(model)
    loss(model(x)).backward()
    params = trainable(model)
    torch.func.vmap(torch.func.jacrev(model))(x)
    torch.func.hessian(lambda z: model(z).sum())(x[0])
    torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(dict(model.named_parameters()))
    other = {n: (2 * p).requires_grad_() for n, p in params.items()}
    torch.func.functional_call(model, other, (x,)).sum().backward()
    check_step_is_dense(model, x, opt)


def test_a_functional_call_on_the_parameters_themselves_counts():
    model, x, loss = problem()
    opt = optimizer(model)
    loss(torch.func.functional_call(model, dict(model.named_parameters()), (x,))).backward()
    check_step_is_dense(model, x, opt)


def test_two_models_two_optimizers():
    model, x, loss = problem()
    other = copy.deepcopy(model)
    opt, second = optimizer(model), optimizer(other, mass=0.1)
    loss(model(x) + other(2 * x)).backward()
    check_step_is_dense(model, x, opt)
    check_step_is_dense(other, 2 * x, second, mass=0.1)


def test_a_part_of_a_larger_model():
    model, x, loss = problem()
    head = model[2:]
    opt = optimizer(head)
    loss(head(model[:2](x))).backward()
    check_step_is_dense(head, model[:2](x).detach(), opt)


def test_gradients_random_state_and_default_dtype_are_untouched():
    model, x, loss = problem()
    opt = optimizer(model)
    x.requires_grad_()
    loss(model(x)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    grads, seen, rng, dtype = gradients(model), x.grad.clone(), torch.get_rng_state(), torch.get_default_dtype()
    opt.step()
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())
    assert torch.equal(x.grad, seen)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()


def test_close_stops_recording():
    model, x, loss = problem()
    opt = optimizer(model)
    opt.close()
    assert not model._forward_hooks
    loss(model(x)).backward()
    with pytest.raises(ValueError, match="no forward pass of the model"):
        opt.step()


def test_a_dead_optimizer_leaves_no_hook_and_is_not_kept_alive():
    model, x, loss = problem()
    opt = optimizer(model)
    loss(model(x)).backward()
    opt.step()
    alive = weakref.ref(opt)
    del opt
    gc.collect()
    assert alive() is None
    assert not model._forward_hooks
    loss(model(x)).backward()


def test_float32():
    model, x, loss = problem()
    expected = Dense(model, x, mass=0.1)
    loss(model(x)).backward()
    expected = expected.solve(gradients(model))
    single = copy.deepcopy(model).float()
    opt = optimizer(single, mass=0.1)
    opt.zero_grad()
    loss(single(x.float()).double()).backward()
    opt.step()
    assert all(p.dtype == torch.float32 for p in single.parameters())
    moved = {n: (trainable(model)[n] - p.double()) / LR for n, p in trainable(single).items()}
    assert distance(moved, expected) < 1e-5  # float32 carries 1e-7, times the condition of G and 1/lr


def test_it_descends_where_gradient_descent_creeps():
    torch.manual_seed(0)
    model, x = mlp(4, 30, 30, 2).to(F64), torch.randn(12, 4, dtype=F64)
    a, losses = torch.randn(12, 2, dtype=F64), []
    opt = Woodbury(model, "auto", mass=1e-2)
    for _ in range(20):
        opt.zero_grad()
        h = 0.5 * (model(x) - a).square().sum(1).mean()
        h.backward()
        opt.step()
        losses.append(h.item())
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 1e-6 * losses[0]


def test_in_place_activations_over_a_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 2), nn.ReLU(inplace=True)).to(F64)
    x = torch.randn(5, 3, dtype=F64)
    opt = optimizer(model, mass=0.1)
    for _ in range(3):
        opt.zero_grad()
        (model(x) - 1).square().mean().backward()
        check_step_is_dense(model, x, opt, mass=0.1)
