"""How large a step may be: lr·λ_max < 2, with λ_max bounded for free where theory does it, computed where it does not.

For a loss of curvature ∇²_y ℓ = ΛᵀΛ the linearised step e ← (I − lr·H ΛᵀΛ)e contracts only while
lr·λ_max(ΛHΛᵀ) < 2.
"""

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError


class StepTooLargeError(ValueError):
    """lr·λ_max ≥ 2: the linearised step does not contract. ``limit`` is 2/λ_max."""

    def __init__(self, lr: float, limit: float, where: str = ""):
        self.lr, self.limit, self.where = lr, limit, where
        super().__init__(
            f"{where + ': ' if where else ''}lr = {lr:g} is too large: the step needs lr < 2/λ_max = {limit:.4g}; "
            f"write lr = {round_down(0.9 * limit):g} or less"
        )

    def __reduce__(self):  # the message is not the argument: a copy from another process is made from its parts
        return type(self), (self.lr, self.limit, self.where)


def round_down(value: float) -> float:
    """The first digit of a positive number, for advice that must not round up past a limit.

    >>> round_down(0.0567), round_down(1.99)
    (0.05, 1.0)
    """
    digit, exponent = f"{value:.15e}".split("e")
    return float(f"{digit[0]}e{exponent}")


def auto_lr(blocks: int, scale: str) -> float:
    """lr = 1/N for N metric blocks: half of the limit 2/N that λ_max(ΛHΛᵀ) ≤ N/(c·n) = N guarantees at scale "mean".

    It needs a loss of curvature ΛᵀΛ ⪯ M: squared loss with M = I, cross-entropy with its own Gauss-Newton matrix.

    >>> auto_lr(4, "mean")
    0.25
    """
    if scale != "mean":
        raise ValueError(f'lr="auto" rests on λ_max ≤ N, which needs scale="mean"; with scale={scale!r} write a number')
    return 1 / blocks


def check_lr(lr: float | str) -> None:
    """Raises ValueError or TypeError unless lr is positive and finite, or "auto"."""
    if lr == "auto":
        return
    if isinstance(lr, bool) or not isinstance(lr, int | float | Tensor):
        raise TypeError(f'lr must be a positive number or "auto", got {lr!r}')
    if not 0 < float(lr) < float("inf"):
        raise ValueError(f'lr must be positive and finite, or "auto"; got {float(lr)!r}')


def checked_rate(lr: float, bound: float, matrix, where: str = "") -> float:
    """A bound on λ_max that allows ``lr``: ``bound`` where it does, else the Frobenius norm of ``matrix()``, else λ_max.

    ``matrix`` is a function, called only when the bound does not suffice; it returns symmetric matrices [..., P, P].
    Raises :class:`StepTooLargeError`, naming 2/λ_max, where none allows it; NumericalError for kernels that are not finite.

    >>> checked_rate(0.1, 3.0, None)
    3.0
    >>> checked_rate(0.1, float("inf"), lambda: torch.eye(2) * 30)
    Traceback (most recent call last):
    optim.step_limit.StepTooLargeError: lr = 0.1 is too large: the step needs lr < 2/λ_max = 0.06667; ...
    """
    if lr * bound < 2:
        return bound
    matrices = matrix()
    if not bool(torch.isfinite(matrices).all()):
        raise NumericalError("the kernel is not finite (did training diverge?)", where=where)
    largest = matrices.flatten(-2).norm(dim=-1).max().item()  # ‖·‖_F ≥ λ_max
    if lr * largest >= 2:
        largest = torch.linalg.eigvalsh(matrices)[..., -1].max().item()
    if not lr * largest < 2:
        raise StepTooLargeError(lr, 2 / largest, where)
    return largest
