"""The model under test: two residual blocks with a forward of their own, and noisy circles to tell apart."""

import math

import torch
from torch import Tensor, nn

LR, MASS = 0.05, 0.1  # of optim.Woodbury, as the training script uses them


class Block(nn.Module):
    """z + W₂ tanh(W₁z)."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.outer(torch.tanh(self.inner(z)))


def make_model(width: int = 12, seed: int = 0) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), Block(width), Block(width), nn.Linear(width, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def circles(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Points on two circles [n, 2], and which one they are on, ±1 [n, 1]."""
    draw = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(n, generator=draw, dtype=torch.float64)
    inside = (torch.arange(n) % 2).double()
    radius = 1 + inside + 0.1 * torch.randn(n, generator=draw, dtype=torch.float64)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), (2 * inside - 1)[:, None]
