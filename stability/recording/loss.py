"""What a recorded run has to know of its loss: ∇²_y ℓ, and where it can be had ℓ itself, at the outputs on all of x."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stability.losses import Loss, resolve_loss

SampleLosses = Callable[[Tensor], Tensor]  # outputs [N, C] → losses [N]


@dataclass(frozen=True)
class OutputLoss:
    """The losses of the samples of S as functions of the outputs: a named ``loss`` at its targets, or a function alone.

    ``losses`` [N, C] → [N]; None where targets were not given, and only ∇²ℓ is known.
    """

    name: str
    loss: Loss | None
    losses: SampleLosses | None
    targets: Tensor | None = None

    @property
    def quadratic(self) -> bool:
        """True where ∇²ℓ = σI whatever the outputs."""
        return self.loss is not None and self.loss.quadratic

    def values(self, y: Tensor) -> Tensor:
        """ℓ_i, [N]; ValueError for a function that gives anything else, or where there are no targets."""
        if self.losses is None:
            raise ValueError(f"loss {self.name!r} was recorded without targets; write record(…, targets=a)")
        found = self.losses(y)
        if not isinstance(found, Tensor) or found.shape != y.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"loss must give one loss per sample, [{len(y)}], got {got}; write reduction='none'")
        return found

    def curvature(self, y: Tensor) -> Tensor | float:
        """∇²_y ℓ of every sample, [N, C, C]; a number σ stands for σI.

        Raises ValueError for a named loss whose ∇²ℓ depends on targets that were not given.
        """
        if self.quadratic:
            return self.loss.curvature(y.shape[1])
        if self.loss is not None:
            if self.targets is None and not self.loss.metrics:
                raise ValueError(f"∇²ℓ of {self.name!r} depends on the targets; write record(…, targets=a)")
            a = torch.zeros_like(y) if self.targets is None else _encoded(self.loss, self.targets, y)
            return self.loss.hessian(y, a)
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            r = torch.autograd.grad(self.values(y).sum(), y, create_graph=True)[0]
            if not r.requires_grad:  # ℓ is linear
                return y.new_zeros(*y.shape, y.shape[1])
            rows = [torch.autograd.grad(r[:, c].sum(), y, retain_graph=True)[0] for c in range(y.shape[1])]
        return torch.stack(rows, 1)


def output_loss(loss, targets: Tensor | None) -> OutputLoss:
    """The loss of a recorder: one of ``stability.losses``, by name or itself, or a function.

    A function takes the outputs on all of x [N, C] to the losses of the samples [N]; where ``targets`` are given it takes
    outputs and targets. Raises ValueError/TypeError for anything else.

    >>> loss = output_loss(lambda y: 0.25 * y.pow(4).sum(1), None)
    >>> loss.curvature(torch.tensor([[1.0, 2.0]]))
    tensor([[[ 3.,  0.],
             [ 0., 12.]]])
    >>> output_loss("mse", None).curvature(torch.zeros(1, 4))
    0.5
    """
    if isinstance(loss, str | Loss):
        named = resolve_loss(loss)
        losses = None if targets is None else lambda y: named.value(y, _encoded(named, targets, y))
        return OutputLoss(named.name, named, losses, targets)
    if not callable(loss):
        raise TypeError(f"loss must be a name or a function of the outputs, got {type(loss).__name__}")
    name = getattr(loss, "__name__", type(loss).__name__)
    if targets is None:
        return OutputLoss(name, None, loss)
    return OutputLoss(
        name, None, lambda y: loss(y, targets.to(y) if targets.is_floating_point() else targets.to(y.device)), targets
    )


def _encoded(loss: Loss, targets: Tensor, y: Tensor) -> Tensor:
    a = loss.encoded(targets.to(y) if targets.is_floating_point() else targets.to(y.device), y.shape[1], y.dtype)
    if a.shape != y.shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, the outputs {tuple(y.shape)}")
    return a
