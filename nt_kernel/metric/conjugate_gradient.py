"""Preconditioned conjugate gradients for torch functions: many right-hand sides, each stopped by its own residual.

Why our own: scipy's ``cg`` takes one numpy vector; ``linear_operator``'s stops on the mean residual of all columns, and
none of them says how large b − Ax came out in the end, which is what a caller can be held to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError

# How often a run may start again from b − Ax, where the recursive residual had drifted away from it.
RESTARTS = 3


@dataclass(frozen=True)
class Solution:
    """``x``; per right-hand side ‖b − Ax‖/‖b‖, recomputed at the end, [...]; ``iterations`` taken, of all together.

    ``stagnated``: starting again from b − Ax did not halve the residual, so this is what rounding allows.
    """

    x: Tensor
    residuals: Tensor
    iterations: int
    tolerance: float
    stagnated: bool = False

    @property
    def residual(self) -> float:
        """The largest of the residuals (0.0 where there is none)."""
        return self.residuals.max().item() if self.residuals.numel() else 0.0

    @property
    def converged(self) -> bool:
        """True where every residual is within the tolerance."""
        return self.residual <= self.tolerance


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
    dims: int = 1,
    hopeless: Callable[[int, float], bool] | None = None,
    where: str = "",
) -> Solution:
    """x with Ax = b for a symmetric positive definite A, by conjugate gradients from x = 0 (Hestenes & Stiefel 1952).

    Parameters
    ----------
    matvec: v ↦ Av, of b's shape; linear, and without effect of one right-hand side on another.
    b: right-hand sides; the last ``dims`` dimensions form one vector, all dimensions before them are separate problems
        (rows of a matrix, networks of a stack).
    precondition: v ↦ P⁻¹v, P symmetric positive definite and close to A; None is P = I.
    tolerance: ‖b − Ax‖ ≤ tolerance·‖b‖ for each right-hand side, held against the residual recomputed from x. Where
        rounding let the recursion's own residual drift, the run starts again from b − Ax (up to 3 times).
    max_iterations: products with A, at most (the checks of the true residual not counted).
    hopeless: called after each iteration with (iterations, largest residual so far, relative); True ends the run.

    The result may not have converged: look at ``converged`` and ``residual``. Raises NumericalError for a
    direction of negative curvature pᵀAp ≤ 0 or a preconditioner with rᵀP⁻¹r ≤ 0 (with the Rayleigh quotient, which bounds
    the smallest eigenvalue), and for values that are not finite.

    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> found = conjugate_gradient(lambda v: v @ A, torch.eye(2, dtype=torch.float64), tolerance=1e-14)
    >>> found.x @ A
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    >>> found.iterations, found.converged
    (2, True)
    """
    if b.dim() < dims:
        raise ValueError(f"b has shape {tuple(b.shape)}; expected at least the {dims} dimensions of one vector")
    precondition = precondition or (lambda v: v)
    over = tuple(range(-dims, 0))

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(over, keepdim=True)

    largest = b.abs().amax(over, keepdim=True) if b.numel() else b.new_zeros(())
    if not bool(largest.isfinite().all()):
        raise NumericalError("the right-hand side is not finite (did training diverge?)", where=where)
    # Squares of what is tiny would vanish; a power of 2 scales exactly.
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    b = b / unit
    size = dot(b, b).sqrt()
    x, r, taken = torch.zeros_like(b), b.clone(), 0
    relative, stagnated = (size > 0).to(b), False
    for _ in range(1 + RESTARTS):
        before = relative
        taken = _run(matvec, precondition, dot, x, r, tolerance * size, size, taken, max_iterations, hopeless, where)
        r = b - matvec(x)
        relative = torch.where(size > 0, dot(r, r).sqrt() / torch.where(size > 0, size, 1), 0)
        if not bool(relative.isfinite().all()):
            raise _breakdown(relative, relative, where)
        worst = relative.max().item() if relative.numel() else 0.0
        if worst <= tolerance or taken >= max_iterations or (hopeless is not None and hopeless(taken, worst)):
            break
        stagnated = worst > 0.5 * before.max().item()
        if stagnated:
            break
    return Solution(x * unit, relative.flatten(-dims)[..., 0], taken, tolerance, stagnated)


def _run(matvec, precondition, dot, x, r, target, size, taken, most, hopeless, where) -> int:
    """Iterate on x and r = b − Ax in place until every ‖r‖ ≤ target; the number of products so far."""
    norm = dot(r, r).sqrt()
    active = norm > target
    if not bool(active.any()):
        return taken
    size = torch.where(size > 0, size, 1)
    z = precondition(r)
    weight, p = dot(r, z), z.clone()  # without a preconditioner z is r, which changes in place
    while taken < most:
        Ap = matvec(p)
        curvature, taken = dot(p, Ap), taken + 1
        alpha = torch.where(active, weight / curvature, 0)
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, Ap, value=-1)
        before, norm = norm, dot(r, r).sqrt()
        # What decides is read at once: each look at a value waits for the device. NaN passes through both.
        least = torch.where(active, torch.minimum(curvature, weight), torch.inf).amin()
        left = torch.where(norm <= target, 0, norm / size).amax()
        least, worst = torch.stack((least, left)).tolist()
        if not least > 0:
            raise _breakdown((curvature / dot(p, p))[active], (weight / before.square())[active], where)
        if worst == 0 or (hopeless is not None and hopeless(taken, worst)):
            break
        active = norm > target
        z, last = precondition(r), weight
        weight = dot(r, z)
        p = torch.addcmul(z, torch.where(active, weight / last, 0), p)
    return taken


def _breakdown(curvature: Tensor, weight: Tensor, where: str) -> NumericalError:
    if not bool(curvature.isfinite().all() & weight.isfinite().all()):
        return NumericalError("conjugate gradients met values that are not finite (did training diverge?)", where=where)
    what, name, value = "matrix", "pᵀAp/pᵀp", curvature
    if bool((weight <= 0).any()):
        what, name, value = "preconditioner", "rᵀP⁻¹r/rᵀr", weight
    return NumericalError(f"the {what} is not positive definite: {name}", where=where, value=value.min().item())
