"""Small training runs of the RLO tests: a network, data that depend on the step alone, points of a manifold."""

import torch
from torch import nn

from optim.lyapunov.retraction import embedded_manifold
from tests.reference import F64

CURVED = ["sphere", "stiefel"]


def net(dtype=F64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def train(model, opt, steps, start=0, scheduler=None):
    """Mini-batches that depend on the step alone; returns the losses."""
    losses, p = [], next(model.parameters())
    for t in range(start, start + steps):
        x, y = draw(8, 3, seed=t, dtype=p.dtype), draw(8, 2, seed=1000 + t, dtype=p.dtype)
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def gap(a, b):
    return max((p - q).detach().abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def points(manifold, seed=0):
    onto = embedded_manifold(manifold).onto
    return [onto(draw(*shape, seed=seed + i)) for i, shape in enumerate([(5, 3), (2, 4), (2, 3, 3)])]
