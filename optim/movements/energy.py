"""Convex energies E(u) of network outputs u [N, C]: value, gradient, curvature, minimum, in the inner product of the space.

Quadratic ones have their proximal points in closed form; a user's callable is differentiated by torch.func and its convexity
probed (:mod:`optim.movements.convexity`).
"""

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from nt_kernel.metric.triangular import solve_factored
from optim.movements.space import Curvature, definite, inner_product


class Energy:
    """E and its λ (``convexity``): E(v) ≥ E(u) + ⟨∇E(u), v − u⟩ + (λ/2)‖v − u‖² for all u, v.

    ``floor``: a lower bound of E, E* where the minimum is known, −∞ where nothing is.
    """

    name: str
    convexity: float
    floor: float = -math.inf

    def value(self, u: Tensor) -> Tensor:
        """E(u), a scalar that autograd can follow."""
        raise NotImplementedError

    def gradient(self, u: Tensor) -> Tensor:
        """∇E(u) [N, C], ⟨∇E(u), v⟩ = dE(u)v."""
        raise NotImplementedError

    def curvature(self, u: Tensor) -> Curvature:
        """∇²E(u), with shift 0."""
        raise NotImplementedError

    def check(self, u: Tensor) -> None:
        """Raise ValueError unless E can be asked about outputs of this shape."""


class QuadraticEnergy(Energy):
    """E(u) = ½⟨u, A u⟩ − ⟨b, u⟩ + constant, A [N, N] symmetric, positive semidefinite, on the samples of every output.

    λ = λ_min(A), computed; the minimum is at A⁻¹b where λ > 0. Raises ValueError for an A that is not symmetric, not finite or
    not positive semidefinite (by more than rounding), and for shapes that do not fit.

    >>> E = QuadraticEnergy(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0], [3.0]]))
    >>> E.convexity, E.minimizer.flatten().tolist(), E.floor  # ½(2·1 + 9)/2 − (2 + 9)/2
    (1.0, [1.0, 3.0], -2.75)
    """

    def __init__(self, A: Tensor, b: Tensor, constant: float = 0.0, *, name: str = "quadratic"):
        check_tensor("A", A)
        check_tensor("b", b)
        if isinstance(constant, bool) or not isinstance(constant, Real):
            raise TypeError(f"constant must be a number, got {constant!r}")
        self.A, self.b = A.detach().double(), b.detach().double()
        if (
            self.A.dim() != 2
            or self.A.shape[0] != self.A.shape[1]
            or self.b.shape[:1] != self.A.shape[:1]
            or b.dim() != 2
            or not b.numel()
        ):
            raise ValueError(f"A must be [N, N] and b [N, C], got {tuple(A.shape)} and {tuple(b.shape)}")
        if not bool(self.A.isfinite().all() & self.b.isfinite().all()) or not math.isfinite(constant):
            raise ValueError("the energy is not finite: A, b and the constant must be finite")
        size = self.A.abs().max().item()
        if (self.A - self.A.mT).abs().max().item() > 1e-12 * size:
            raise ValueError("A must be symmetric; write (A + A.mT) / 2")
        smallest, rounding = torch.linalg.eigvalsh(self.A)[0].item(), 1e-12 * size * len(self.A)
        if smallest < -rounding:
            raise ValueError(f"the energy is not convex: λ_min(A) = {smallest:.3g}, expected ≥ 0")
        self.convexity, self.constant, self.name = (smallest if smallest > rounding else 0.0), float(constant), name
        if self.convexity:
            self.minimizer: Tensor | None = solve_factored(definite(self.A, "A"), self.b)
            self.floor = self.value(self.minimizer).item()
        else:
            self.minimizer = None

    def value(self, u: Tensor) -> Tensor:
        return inner_product(u, self.A @ u) / 2 - inner_product(self.b, u) + self.constant

    def gradient(self, u: Tensor) -> Tensor:
        return self.A @ u - self.b

    def curvature(self, u: Tensor) -> Curvature:
        return Curvature("samples", self.A)

    def proximal(self, centre: Tensor, tau: float) -> Tensor:
        """(I + τA)⁻¹(u + τb)."""
        system = tau * self.A + torch.eye(len(self.A), dtype=self.A.dtype, device=self.A.device)
        return solve_factored(definite(system, "I + τA"), centre + tau * self.b)

    def check(self, u: Tensor) -> None:
        if u.shape != self.b.shape:
            raise ValueError(
                f"the energy {self.name!r} is about outputs {tuple(self.b.shape)}, the model's are {tuple(u.shape)}"
            )


class SquaredEnergy(Energy):
    """E(u) = (σ/2)‖u − a‖² = (1/N)Σ (σ/2)‖u_i − a_i‖², λ = σ. For torch's ``MSELoss(mean)`` σ = 2/C.

    >>> E = SquaredEnergy(torch.tensor([[1.0], [3.0]]))
    >>> E.value(torch.zeros(2, 1)).item(), E.proximal(torch.zeros(2, 1), tau=1.0).flatten().tolist()
    (2.5, [0.5, 1.5])
    """

    name, floor = "squared", 0.0

    def __init__(self, targets: Tensor, curvature: float = 1.0):
        check_targets(targets)
        if not bool(targets.isfinite().all()):
            raise ValueError(
                f"targets must be finite, {int((~targets.isfinite()).sum())} of {targets.numel()} entries are not"
            )
        if isinstance(curvature, bool) or not isinstance(curvature, Real) or not 0 < curvature < math.inf:
            raise ValueError(f"curvature must be positive and finite, got {curvature!r}")
        self.targets = targets.detach().double().reshape(len(targets), -1)
        self.convexity, self.minimizer = float(curvature), self.targets

    def value(self, u: Tensor) -> Tensor:
        gap = u - self.targets
        return self.convexity / 2 * inner_product(gap, gap)

    def gradient(self, u: Tensor) -> Tensor:
        return self.convexity * (u - self.targets)

    def curvature(self, u: Tensor) -> Curvature:
        return Curvature("number", u.new_tensor(self.convexity))

    def proximal(self, centre: Tensor, tau: float) -> Tensor:
        """(u + τσa)/(1 + τσ)."""
        return (centre + tau * self.convexity * self.targets) / (1 + tau * self.convexity)

    def check(self, u: Tensor) -> None:
        if u.shape != self.targets.shape:
            raise ValueError(f"targets are {tuple(self.targets.shape)}, the model's outputs {tuple(u.shape)}")


def check_tensor(name: str, value) -> None:
    """Raise TypeError for what is no real tensor."""
    if not isinstance(value, Tensor) or value.is_complex():
        got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a real tensor, got {got}")


def check_targets(targets: Tensor) -> None:
    """Raise TypeError/ValueError unless ``targets`` is a tensor [N, C] or [N] that is not empty."""
    check_tensor("targets", targets)
    if targets.dim() not in (1, 2) or not targets.numel():
        raise ValueError(f"targets must be [N, C] or [N] with N, C ≥ 1, got shape {tuple(targets.shape)}")


def dirichlet_energy(weights: Tensor, targets: Tensor, fidelity: float | Tensor = 1.0) -> QuadraticEnergy:
    """E(u) = (1/N)[½ Σ_{i<j} w_ij‖u_i − u_j‖² + ½ Σ_i f_i‖u_i − a_i‖²]: smoothness along a graph, and fidelity to the data.

    ``weights`` [N, N] symmetric, ≥ 0 (:func:`chain_weights` for ½∫|u'|²), ``targets`` a [N, C], ``fidelity`` f ≥ 0, a number
    or [N] (0: no datum there). A = graph Laplacian + diag(f). Raises TypeError for what is no tensor (number), ValueError for
    shapes that do not fit and for weights or fidelities that are negative.

    >>> E = dirichlet_energy(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0], [3.0]]))
    >>> E.A.tolist(), E.minimizer.flatten().tolist()
    ([[2.0, -1.0], [-1.0, 2.0]], [1.0, 2.0])
    """
    check_tensor("weights", weights)
    check_targets(targets)
    w, a = weights.detach().double(), targets.detach().double().reshape(len(targets), -1)
    if not isinstance(fidelity, Tensor) and (isinstance(fidelity, bool) or not isinstance(fidelity, Real)):
        raise TypeError(f"fidelity must be a number or a tensor [N], got {fidelity!r}")
    f = torch.as_tensor(fidelity, dtype=torch.float64, device=w.device).detach()
    if f.shape not in ((), (1,), (len(a),)):
        raise ValueError(f"fidelity must be a number or [N] with N = {len(a)}, got shape {tuple(f.shape)}")
    f = f.expand(len(a))
    if w.shape != (len(a), len(a)):
        raise ValueError(f"weights must be [N, N] with N = {len(a)} as the targets, got shape {tuple(w.shape)}")
    if not bool((w >= 0).all() & (f >= 0).all()):
        raise ValueError(
            f"weights and fidelity must not be negative; least weight {w.min().item():.3g}, least fidelity "
            f"{f.min().item():.3g}"
        )
    w = w - torch.diag(w.diagonal())
    A = torch.diag(w.sum(1) + f) - w
    constant = (f[:, None] * a.square()).sum().item() / (2 * len(a))
    return QuadraticEnergy(A, f[:, None] * a, constant, name="dirichlet")


def chain_weights(points: Tensor) -> Tensor:
    """Weights of a chain through ascending points t [N]: w_{i,i+1} = N/(t_{i+1} − t_i), which makes
    (1/N)·½Σw‖u_i − u_{i+1}‖² the integral ½∫|u'|² of the interpolating polygon.

    >>> chain_weights(torch.tensor([0.0, 0.5]))
    tensor([[0., 4.],
            [4., 0.]], dtype=torch.float64)
    """
    check_tensor("points", points)
    if points.dim() != 1 or not points.numel():
        raise ValueError(f"points must be one ascending sequence [N], got shape {tuple(points.shape)}")
    gaps = points.detach().double().diff()
    if not bool((gaps > 0).all()):
        raise ValueError("points must be one ascending sequence [N], and these do not ascend")
    upper = torch.diag(len(points) / gaps, 1)
    return upper + upper.mT


class ConvexEnergy(Energy):
    """A user's convex energy: ``function(u)`` with u [N, C] gives E itself, or the losses of the samples [N], whose mean is E.

    Gradient and Hessian come from torch.func; losses [N] that each depend on their own sample only (probed) have a Hessian
    of blocks [N, C, C], anything else a matrix [NC, NC]. ``convexity`` λ ≥ 0 is the caller's claim, probed where the energy is
    used: at every proximal point of a run λ_min(∇²E) must be at least λ. ``floor``: a lower bound of E, if one is known.

    Raises TypeError for what is no function, ValueError for a λ that is negative or not finite and for a floor that is no
    number (a run raises it for a floor above an energy that it met).

    >>> E = ConvexEnergy(lambda u: torch.nn.functional.softplus(u).sum(1), name="softplus")
    >>> E.curvature(torch.zeros(3, 2, dtype=torch.float64)).kind, E.gradient(torch.zeros(1, 2)).tolist()
    ('blocks', [[0.5, 0.5]])
    """

    minimizer = None

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        convexity: float = 0.0,
        *,
        floor: float = -math.inf,
        name: str = "callable",
    ):
        if not callable(function):
            raise TypeError(f"function must be callable, u [N, C] → E or the losses [N]; got {function!r}")
        if isinstance(convexity, bool) or not isinstance(convexity, Real) or not 0 <= convexity < math.inf:
            raise ValueError(f"convexity must be a number λ ≥ 0 (0: convex, no more is known), got {convexity!r}")
        if isinstance(floor, bool) or not isinstance(floor, Real) or not floor < math.inf:
            raise ValueError(
                f"floor must be a number that E never falls below, or −inf where none is known, got {floor!r}"
            )
        self.function, self.convexity, self.floor, self.name = function, float(convexity), float(floor), name
        self._separable: bool | None = None

    def value(self, u: Tensor) -> Tensor:
        return self._losses(u).mean()

    def _losses(self, u: Tensor) -> Tensor:
        found = self.function(u)
        if not isinstance(found, Tensor) or found.dim() > 1 or (found.dim() == 1 and len(found) != len(u)):
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the energy {self.name!r} must return a scalar or the losses [{len(u)}], got {got}")
        return found

    def gradient(self, u: Tensor) -> Tensor:
        return torch.func.grad(self.value)(u) * len(u)

    def curvature(self, u: Tensor) -> Curvature:
        if self._separable is None:
            self._separable = self._is_separable(u)
        if self._separable:
            # One sample at a time in the place of all: the others' losses do not depend on it.
            def own(row: Tensor, i: Tensor) -> Tensor:
                return self._losses(torch.where(torch.arange(len(u), device=u.device)[:, None] == i, row, u)).sum()

            where = torch.arange(len(u), device=u.device)
            return Curvature("blocks", torch.func.vmap(torch.func.hessian(own), chunk_size=64)(u, where))
        hessian = torch.func.hessian(self.value)(u).reshape(u.numel(), u.numel())
        return Curvature("dense", hessian * len(u))

    def _is_separable(self, u: Tensor) -> bool:
        """True where the function gives [N] losses whose gradients, under random weights, stay each in its own row."""
        found = self._losses(u)
        if found.dim() == 0:
            return False
        draw = torch.Generator().manual_seed(0)
        s = torch.rand(len(u), generator=draw, dtype=u.dtype).to(u.device) + 0.5
        plain = torch.func.grad(lambda u: self._losses(u).sum())(u)
        weighted = torch.func.grad(lambda u: (s * self._losses(u)).sum())(u)
        return bool(torch.allclose(weighted, s[:, None] * plain, rtol=1e-9, atol=1e-12))
