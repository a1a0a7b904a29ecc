"""What a step looked like from inside, block by block: norms, the inner matrix, how well it was solved, the block's kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.metric.cg_system import ConjugateGradientSystem
from nt_kernel.metric.inner import InnerSystem, apply_blocks
from nt_kernel.metric.layer_metric import KernelSystem, StepSystem
from nt_kernel.metric.mean_jacobian import MeanJacobianSystem
from nt_kernel.metric.output_metric import OutputMetric


@dataclass(frozen=True)
class StepDiagnostics:
    """One metric block at one step, Q = L_y K L_yᵀ and S = I + cQ (L̄J̄D⁻¹J̄ᵀL̄ᵀ and I + it at scale "mean-jacobian").

    gradient_norm: ‖g‖ of the block's ``p.grad``; update_norm: ‖Δθ‖, momentum and weight decay included.
    rank: eigenvalues of Q above P·ε·λ_max(Q), P its size; condition: λ_max(S)/λ_min(S), at least 1.
    residual: ‖r − (I + cMK)v‖/‖r‖ of the v that the step used, G⁻¹Jᵀr = D⁻¹Jᵀv: what the solve achieved, any solver
        (for M = I it is ‖r − Sv‖/‖r‖).
    lambda_max: λ_max(L_y R_α L_yᵀ)/N of the block's own kernel; the step limit is about the sum over the blocks.
    """

    gradient_norm: float
    update_norm: float
    rank: int
    condition: float
    residual: float
    lambda_max: float


def kernel_system(system: StepSystem) -> KernelSystem:
    """The system with a Gram matrix: of conjugate gradients its Cholesky twin, made here if need be."""
    return system.exact if isinstance(system, ConjugateGradientSystem) else system


def inner_figures(
    system: StepSystem, metric: OutputMetric, y: Tensor, r: Tensor, v: Tensor
) -> tuple[int, float, float, float]:
    """(rank, condition, residual, lambda_max) of one block for outputs y and their gradients r [N, C], v = ``system.dual(r)``.

    One symmetric eigenvalue problem of the size of S, float64; for "mean-jacobian" a second one of [NC, NC] for the kernel.

    >>> from nt_kernel import layer_factors
    >>> from nt_kernel.metric.inner import inner_system
    >>> from nt_kernel.metric.output_metric import resolve_output_metric
    >>> y, factors = layer_factors(torch.nn.Linear(1, 1, bias=False), torch.tensor([[2.0]]))
    >>> identity, r = resolve_output_metric("identity"), torch.ones(1, 1)
    >>> system = inner_system(factors["."], 1, {"weight": 1.0}, 1.0, identity, y)[0]
    >>> inner_figures(system, identity, y, r, system.dual(r))  # Q = 4, S = 5, R = 4/5
    (1, 1.0, 0.0, 0.8...)
    """
    inner, n = kernel_system(system), len(y)
    if isinstance(inner, MeanJacobianSystem):
        Q = inner.S.double() - torch.eye(len(inner.S), dtype=torch.float64, device=y.device)
        R, L = inner.expand(inner.self_kernel()).double(), metric.factor(y)
        R = R if L is None else apply_blocks(L.double(), apply_blocks(L.double(), R).mT)
        largest = torch.linalg.eigvalsh((R + R.mT) / 2)[-1].item() / n
        values, copies, c = torch.linalg.eigvalsh(Q).clamp_min(0), 1, 1.0
    else:
        values, c = _eigenvalues(inner, metric, y), inner.c
        copies = n * inner.C // len(values) if inner.decoupled and metric.factor(y) is None else 1
        largest = (values[-1] / (1 + c * values[-1])).item() / n
    rank = copies * int((values > len(values) * torch.finfo(y.dtype).eps * values[-1]).sum())
    condition = ((1 + c * values[-1]) / (1 + c * values[0])).item()
    return rank, condition, _residual(inner, metric, y, r, v), largest


def _eigenvalues(inner: InnerSystem, metric: OutputMetric, y: Tensor) -> Tensor:
    """Of Q = L_y K L_yᵀ, ascending; what rounding made negative is zero. ([N] of K = A ⊗ I_C, each C times.)"""
    Q, L = inner.gram.double(), metric.factor(y)  # at c = 0 the inner system does without L
    if L is not None:
        Q = Q if not inner.decoupled else inner.expand(Q)
        Q = apply_blocks(L.double(), apply_blocks(L.double(), Q).mT)
    return torch.linalg.eigvalsh((Q + Q.mT) / 2).clamp_min(0)


def _residual(inner: KernelSystem, metric: OutputMetric, y: Tensor, r: Tensor, v: Tensor) -> float:
    r, v = r.double(), v.double()
    if isinstance(inner, MeanJacobianSystem):  # (I + E M̄EᵀK)v = r
        Kv = (inner.gram.double() @ v.flatten()[:, None]).reshape(v.shape)
        mean = inner.mean.double()
        back = (mean.mT @ (mean @ Kv.mean(0)) / len(v)).expand_as(v)
    elif inner.c == 0:
        back = torch.zeros_like(v)
    else:
        Kv = inner.unrows(inner.gram.double() @ inner.rows(v))
        L = metric.factor(y)
        back = inner.c * (Kv if L is None else (L.mT.double() @ (L.double() @ Kv[..., None]))[..., 0])
    size = r.norm()
    return ((r - v - back).norm() / size).item() if bool(size > 0) else 0.0
