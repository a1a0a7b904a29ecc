"""The matching rule of sequential composition: the upstream output metric is the pullback of the downstream one.

Pehle & Slotine, arXiv 2603.03610, definition 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optim.riemannian.manifold import Manifold, PulledBack

if TYPE_CHECKING:
    from optim.riemannian.riemannian_module import RiemannianModule

DRAWN = 8  # points at which a stated metric is compared, where none are given


def check_matching(
    first: RiemannianModule, second: RiemannianModule, at: tuple[Tensor, Mapping[str, Tensor]] | None = None
) -> None:
    """Raise ValueError unless the output metric of ``first`` is the pullback of that of ``second`` (or is not stated)."""
    stated = first.outputs.field
    if stated is None:
        return
    if isinstance(stated, PulledBack):
        behind = [second] if len(stated.modules) == 1 else getattr(second, "branches", [second])
        if len(behind) == len(stated.modules) and all(a is b for a, b in zip(stated.modules, behind, strict=True)):
            return
        raise ValueError(
            f"the output metric of {first.name!r} is the pullback by another module than {second.name!r}: "
            "write first.pull_back(second)"
        )
    if second.outputs.field is None or isinstance(second.outputs.field, PulledBack):
        raise ValueError(
            f"module {first.name!r} states an output metric and module {second.name!r}, downstream, none that it could be "
            "the pullback of: state the one downstream, or leave this one out"
        )
    z, point = at if at is not None else _drawn(second)
    gap = matching_gap(first.outputs, second, z, point)
    if not gap <= torch.finfo(z.dtype).eps ** 0.5:
        raise ValueError(
            f"the stated output metric is not the pullback of the metric downstream: relative gap {gap:.3g} at "
            f"{len(z)} points; leave it out, or write first.pull_back(second)"
        )


def matching_gap(manifold: Manifold, second: RiemannianModule, z: Tensor, point: Mapping[str, Tensor]) -> float:
    """max_i ‖M(z_i) − JᵀM'J‖_F/‖JᵀM'J‖_F between the metric of ``manifold`` and the pullback by ``second`` at z [N, …]."""
    L = second.pulled_back(point).factor(z)
    pulled = L.mT @ L
    gap = (manifold.matrix(z) - pulled).flatten(1).norm(dim=1)
    size = pulled.flatten(1).norm(dim=1)
    return torch.where(gap == 0, 0, gap / size).max().item()


def _drawn(module: RiemannianModule) -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    normal = lambda shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    parts = module.inputs.parts or (module.inputs,)
    points = [torch.stack([part.point(normal(part.shape)) for _ in range(DRAWN)]).flatten(1) for part in parts]
    z = torch.cat(points, 1).reshape(DRAWN, *module.inputs.shape)
    return z, {name: manifold.point(normal(manifold.shape)) for name, manifold in module.parameters.items()}
