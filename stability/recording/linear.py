"""A matrix, an operator, or a number that stands for its multiple of the identity."""

import torch  # noqa: F401 (the examples use it)
from torch import Tensor


def times(A, X: Tensor) -> Tensor:
    """A X for a matrix, a number, or whatever knows ``A @ X``.

    >>> times(2.0, torch.ones(2)), times(torch.eye(2), torch.ones(2))
    (tensor([2., 2.]), tensor([1., 1.]))
    """
    return A * X if isinstance(A, float | int) else A @ X


def plus(omega: Tensor | float, B: Tensor) -> Tensor:
    """Ω + B for a matrix B [D, D].

    >>> plus(0.5, torch.zeros(2, 2))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    if isinstance(omega, Tensor):
        return omega + B
    B = B.clone()
    B.diagonal().add_(omega)
    return B
