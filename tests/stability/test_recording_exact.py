"""A_t where it is claimed exact: for models linear in θ it is the closed loop, w_t = 0; its first block is autograd's."""

import pytest
import torch

from stability import ClosedLoop, certify
from stability.recording.certify import _states
from tests.stability.recorded import EXACT, F64, data, linear, moved, trained


def injections(run, other):
    """w_t = x_{t+1} − A_t x_t [T, states], and the sizes of what they are made of."""
    grid = run.times
    loop = ClosedLoop(run, grid)
    errors = torch.stack([other.outputs(t, run.reader.x) - run.outputs(t) for t in grid])
    states = _states(run, other, grid, errors) if loop.memory else errors.flatten(1)
    w = torch.stack([states[j + 1] - A @ states[j] for j, A in enumerate(loop)])
    return w, states


BATCHES = [torch.tensor([0, 2, 3]), torch.tensor([1, 4, 4]), None, torch.tensor([5, 0]), torch.tensor([0, 2, 3]), None]
SCHEDULE = [1.0, 0.5, 2.0, 0.0, 1.5, 1.0]


@pytest.mark.parametrize("batches", [None, BATCHES], ids=["full", "mini-batch"])
@pytest.mark.parametrize("name", EXACT)
def test_nothing_is_injected_between_two_runs_on_the_same_data(name, batches):
    x, a = data(6, 3, 2)
    model = linear(3, 2)
    run = trained(model, EXACT[name], x, a, batches=batches)
    other = trained(moved(model), EXACT[name], x, a, batches=batches)
    w, states = injections(run, other)
    assert ClosedLoop(run).exact
    assert states.norm(dim=1).min() > 1e-3
    assert w.abs().max() < 1e-10
