"""Riemannian modules drawn at random, and dense references of what they know to first order."""

import torch

from optim.riemannian.manifold import Manifold, positive
from optim.riemannian.riemannian_module import RiemannianModule
from tests.reference import F64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=draw, dtype=F64)


def smooth(name: str, inside: int, outside: int, metric=None, mass=1.0) -> RiemannianModule:
    """z ↦ sin(W z) + b·|z|², nothing in common with a layer of a network; b a point of the positive reals."""
    return RiemannianModule(
        Manifold((inside,)),
        {"W": Manifold((outside, inside), mass), "b": positive((outside,), 2.0)},
        Manifold((outside,), metric),
        lambda z, p: (z @ p["W"].T).sin() + p["b"] * z.square().sum(1, keepdim=True),
        name,
    )


def fixed(inside: int, outside: int) -> RiemannianModule:
    """A map without parameters."""
    A = normal(generator(7), outside, inside)
    return RiemannianModule(Manifold((inside,)), {}, Manifold((outside,)), lambda z, p: (z @ A.T).tanh())


def drawn_point(module: RiemannianModule, draw: torch.Generator) -> dict[str, torch.Tensor]:
    return {n: manifold.point(0.5 * normal(draw, *manifold.shape)) for n, manifold in module.parameters.items()}


def dense_jacobian(module: RiemannianModule, x, point) -> dict[str, torch.Tensor]:
    """{parameter: ∂y/∂θ [N, C, m]}, the batch differentiated as a whole."""
    J = torch.func.jacrev(lambda at: module(x, at).flatten(1))(dict(point))
    return {n: j.reshape(*j.shape[:2], -1) for n, j in J.items()}


def dense_direction(module, x, point, r, M, c) -> dict[str, torch.Tensor]:
    """G⁻¹Jᵀr with every G_α = D_α + c Σ_i J_iᵀM_iJ_i as a matrix; D from the definition of the metric."""
    J, found = dense_jacobian(module, x, point), {}
    for names in module.blocks.values():
        block = torch.cat([J[n] for n in names], -1)
        D = torch.block_diag(*(module.parameters[n].matrix(point[n][None])[0] for n in names))
        G = D + c * torch.einsum("ncp,ncd,ndq->pq", block, M, block)
        v = torch.linalg.solve(G, torch.einsum("ncp,nc->p", block, r.flatten(1)))
        sizes = [point[n].numel() for n in names]
        found |= {n: piece.reshape(point[n].shape) for n, piece in zip(names, v.split(sizes), strict=True)}
    return found


def stiffness(module, x, point, M, c) -> float:
    """max(1, ‖c·M^½KM^½‖): by how much the condition of G multiplies rounding."""
    J, largest = dense_jacobian(module, x, point), 1.0
    for names in module.blocks.values():
        block = torch.cat([J[n] for n in names], -1).flatten(0, 1)
        D = torch.block_diag(*(module.parameters[n].matrix(point[n][None])[0] for n in names))
        K = block @ torch.linalg.solve(D, block.T)
        largest = max(largest, (c * torch.block_diag(*M) @ K).norm().item())
    return largest
