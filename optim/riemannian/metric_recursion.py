"""One step of the recursion for the layerwise metric: rows of cotangents through a map, sample by sample.

𝒦 = L·∂f/∂θ and L ← L·∂f/∂z (Pehle & Slotine, arXiv 2603.03610, P2–P3). :mod:`optim.riemannian.riemannian_module`
strings the steps together.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from optim.riemannian.manifold import Manifold

Rows = dict[str, Tensor]  # {parameter: [N, q, m]}


def pull_back_rows(
    map: Callable, z: Tensor, point: Mapping[str, Tensor], L: Tensor
) -> tuple[Tensor, Rows, Tensor | None]:
    """Outputs [N, d] sample by sample, {name: L·∂f/∂θ [N, q, m]} and L·∂f/∂z [N, q, dim z] of a map, L [N, q, d].

    q vector–Jacobian products per sample, batched. The last is None where z is not floating-point.

    >>> z, point = torch.tensor([[3.0]]), {"w": torch.tensor(2.0)}
    >>> y, rows, L = pull_back_rows(lambda z, p: p["w"] * z, z, point, torch.ones(1, 1, 1))
    >>> y.item(), rows["w"].item(), L.item()
    (6.0, 3.0, 2.0)
    """
    smooth = z.is_floating_point()

    def one(zi: Tensor, Li: Tensor):
        def f(at: dict) -> Tensor:
            return map(at.get("z", zi)[None], at["point"])[0].reshape(-1)

        at = {"point": dict(point)} | ({"z": zi} if smooth else {})
        y, pull = torch.func.vjp(f, at)
        return y, torch.func.vmap(lambda row: pull(row)[0])(Li)

    y, rows = torch.func.vmap(one)(z.detach(), L)
    flat = {name: row.reshape(*L.shape[:2], -1) for name, row in rows["point"].items()}
    return y, flat, rows["z"].reshape(*L.shape[:2], -1) if smooth else None


def output_rows(outputs: Manifold, y: Tensor) -> Tensor:
    """L_y [N, q, d] of outputs y [N, …], written out where it is the identity."""
    L = outputs.factor(y)
    if L is None:
        L = torch.eye(outputs.size, dtype=y.dtype, device=y.device).expand(len(y), -1, -1)
    return L
