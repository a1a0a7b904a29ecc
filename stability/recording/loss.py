"""What a recorded run has to know of its loss: ∇_y ℓ and ∇²_y ℓ of every sample of S as functions of the outputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name

SampleLosses = Callable[[Tensor], Tensor]  # outputs [N, C] → losses [N]
QUADRATIC = {"squared": 1.0}  # ∇²ℓ = σI


@dataclass(frozen=True)
class OutputLoss:
    """The losses of the samples of S. ``sigma``: ∇²ℓ = σI for all outputs, None where it is not so simple.

    ``losses`` [N, C] → [N]; None where targets were not given, and only ∇²ℓ is known.
    """

    name: str
    sigma: float | None
    losses: SampleLosses | None

    def gradient(self, y: Tensor) -> Tensor:
        """r = ∇_y ℓ, [N, C]."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            return torch.autograd.grad(self.values(y).sum(), y)[0]

    def values(self, y: Tensor) -> Tensor:
        """ℓ_i, [N]; ValueError for a ``losses`` that gives anything else, or where there are no targets."""
        if self.losses is None:
            raise ValueError(f"loss {self.name!r} was recorded without targets; write record(…, targets=a)")
        found = self.losses(y)
        if not isinstance(found, Tensor) or found.shape != y.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"loss must give one loss per sample, [{len(y)}], got {got}; write reduction='none'")
        return found

    def curvature(self, y: Tensor) -> Tensor | None:
        """∇²_y ℓ of every sample, [N, C, C]; None stands for σI."""
        if self.sigma is not None:
            return None
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            r = torch.autograd.grad(self.values(y).sum(), y, create_graph=True)[0]
            if not r.requires_grad:  # ℓ is linear
                return y.new_zeros(*y.shape, y.shape[1])
            rows = [torch.autograd.grad(r[:, c].sum(), y, retain_graph=True)[0] for c in range(y.shape[1])]
        return torch.stack(rows, 1)


def output_loss(loss, targets: Tensor | None) -> OutputLoss:
    """The loss of a recorder: "squared" (½‖y − a‖²; without targets its ∇²ℓ = I is known all the same), or a function.

    A function takes the outputs on all of x [N, C] to the losses of the samples [N]; where ``targets`` are given it takes
    outputs and targets, as ``stability.losses`` do. Raises ValueError/TypeError for anything else.

    >>> loss = output_loss(lambda y: 0.25 * y.pow(4).sum(1), None)
    >>> loss.curvature(torch.tensor([[1.0, 2.0]]))
    tensor([[[ 3.,  0.],
             [ 0., 12.]]])
    """
    if isinstance(loss, str):
        if loss not in QUADRATIC:
            raise ValueError(unknown_name("loss", loss, QUADRATIC))
        return OutputLoss(loss, 1.0, None if targets is None else lambda y: _half_squares(y, targets.to(y)))
    if not callable(loss):
        raise TypeError(f"loss must be a name or a function of the outputs, got {type(loss).__name__}")
    name = getattr(loss, "__name__", type(loss).__name__)
    if targets is None:
        return OutputLoss(name, None, loss)
    return OutputLoss(name, None, lambda y: loss(y, targets.to(y) if targets.is_floating_point() else targets))


def _half_squares(y: Tensor, a: Tensor) -> Tensor:
    if y.shape != a.shape:
        raise ValueError(f"targets have shape {tuple(a.shape)}, the outputs {tuple(y.shape)}")
    return 0.5 * (y - a).square().sum(1)
