"""One inequality for everything that contracts and is disturbed: E⁺ = ρE + w. Twins, inexact movements, enclosures use it."""

from collections.abc import Iterable

import torch
from torch import Tensor


def scalar_step(E: Tensor, A_norm: float | Tensor, w_norm: Tensor) -> Tensor:
    """One step of **T4**: E⁺ = ‖A‖₂E + ‖w‖."""
    return A_norm * E + w_norm


def scalar_recursion(start: float | Tensor, rates: Iterable[float | Tensor], injections: Iterable[Tensor]) -> Tensor:
    """E_0 = ``start``, E_{t+1} = ρ_t E_t + w_t, [T + 1].

    With e_{t+1} = A_t(e_t) + w_t, ‖A_t(e)‖ ≤ ρ_t‖e‖ and ‖e_0‖ ≤ E_0, E_t bounds ‖e_t‖ by induction (triangle inequality).

    >>> scalar_recursion(1.0, [0.5, 0.5], torch.tensor([0.0, 1.0], dtype=torch.float64))
    tensor([1.0000, 0.5000, 1.2500], dtype=torch.float64)
    """
    E = [start if isinstance(start, Tensor) else torch.tensor(start, dtype=torch.float64)]
    for rate, injected in zip(rates, injections, strict=True):
        E.append(scalar_step(E[-1], rate, injected))
    return torch.stack(E)
