"""R predicted twins as one stack of networks, each at its own parameters: outputs, Jᵀv and J D⁻¹Jᵀv of a metric block.

The Jacobians are never formed, not even as layer factors (which take p backward passes): one backward pass gives
J_αᵀv, and the derivative of that pass in v, in the direction D⁻¹J_αᵀv, gives K_αv.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import run_model
from nt_kernel.mass import Masses, divide_by_mass

Image = dict[str, Tensor]
Product = Callable[[Tensor], tuple[Tensor, Image]]


class CandidateStack:
    """Networks at ``params`` {name: [R, …]}, each on its own inputs x [R, N, …]; ``fixed``: what is not trained."""

    def __init__(self, model: nn.Module, params: Image, fixed: Image, x: Tensor, mass: Masses):
        self.mass, self.params = mass, {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            self._graph = stacked_outputs(model, self.params, fixed, x)
        self.outputs = self._graph.detach()  # [R, N, p]

    def pull(self, names: Sequence[str], v: Tensor) -> Image:
        """D⁻¹J_αᵀv of the parameters ``names``, v [R, N, p]."""
        found = torch.autograd.grad(
            self._graph, [self.params[name] for name in names], v, retain_graph=True, materialize_grads=True
        )
        return {name: self._divided(g, name) for name, g in zip(names, found, strict=True)}

    def kernel(self, names: Sequence[str]) -> Product:
        """v ↦ (K_αv, D⁻¹J_αᵀv), K_α = J_αD⁻¹J_αᵀ of each network on its own inputs."""
        params, first = [self.params[name] for name in names], []

        def product(v: Tensor) -> tuple[Tensor, Image]:
            if first:
                image = self.pull(names, v)
            else:  # Jᵀv is linear in v: its derivative at this v serves all later ones
                with torch.enable_grad():
                    at = v.detach().requires_grad_()
                    pulled = torch.autograd.grad(self._graph, params, at, create_graph=True, materialize_grads=True)
                first.extend((at, pulled))
                image = {name: self._divided(g.detach().clone(), name) for name, g in zip(names, pulled, strict=True)}
            at, pulled = first
            (Kv,) = torch.autograd.grad(pulled, at, [image[name] for name in names], retain_graph=True)
            return Kv, image

        return product

    def _divided(self, g: Tensor, name: str) -> Tensor:
        """D⁻¹g, in place where D is one number: a fresh stack of parameters costs more than the division."""
        mass = self.mass[name]
        return g.div_(mass) if isinstance(mass, int | float) else divide_by_mass(g, mass)


def stacked_outputs(model: nn.Module, params: Image, fixed: Image, x: Tensor, *, shared: bool = False) -> Tensor:
    """Outputs [R, N, p] of networks at ``params`` {name: [R, …]} on x [R, N, …], or all on one x [N, …] (``shared``)."""

    def one(values: Image, points: Tensor) -> Tensor:
        return run_model(model, {**values, **fixed}, points)

    return torch.func.vmap(one, in_dims=(0, None if shared else 0))(params, x)


def cg_steps(
    product: Product, b: Tensor, precondition: Callable[[Tensor], Tensor], steps: int, tolerance: float = 0.0
) -> tuple[Tensor, Image]:
    """x ≈ A⁻¹b by at most ``steps`` preconditioned conjugate gradient steps from 0, and the image of x.

    ``product`` v ↦ (Av, image of v), both linear, the image ours to change; b [R, …], each row its own problem, which rests
    once ‖b − Ax‖ ≤ tolerance·‖b‖. Every step lowers the error in the norm of A (Hestenes & Stiefel 1952), so a few steps
    with a good P are safe where the iteration x ← x + P⁻¹(b − Ax) diverges (as it does at mass 0.01).

    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> x, image = cg_steps(lambda v: (v @ A, {"twice": 2 * v}), torch.eye(2), lambda v: v, 2)
    >>> torch.allclose(x @ A, torch.eye(2), atol=1e-6), torch.equal(image["twice"], 2 * x)
    (True, True)
    """
    over = tuple(range(1, b.dim()))

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(over, keepdim=True)

    x, r, image, target = torch.zeros_like(b), b, {}, tolerance * dot(b, b).sqrt()
    p = z = precondition(r)
    weight = dot(r, z)
    for step in range(steps):
        Ap, of_p = product(p)
        active = (dot(r, r).sqrt() > target) & (weight > 0)
        alpha = torch.where(active, weight / torch.where(active, dot(p, Ap), 1), 0)
        x, r = x + alpha * p, r - alpha * Ap
        for name, g in of_p.items():
            share = alpha.view(-1, *[1] * (g.dim() - 1))
            image[name] = image[name].addcmul_(share, g) if name in image else g.mul_(share)
        if step + 1 == steps or not bool((dot(r, r).sqrt() > target).any()):
            break
        z, last = precondition(r), weight
        weight = dot(r, z)
        p = torch.where(active, z + weight / torch.where(active, last, 1) * p, p)
    return x, image
