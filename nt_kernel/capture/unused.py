"""The Jacobian of a parameter that the forward pass does not touch: zero, without the zeros."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nt_kernel.mass import Masses
from nt_kernel.products.forms import Flat


@dataclass(frozen=True)
class UnusedPart:
    """Jacobian 0 of one parameter of shape ``shape``; ``like`` [..., N, C] gives dimensions, type and device."""

    like: Tensor
    name: str
    shape: tuple[int, ...]
    kind = "unused"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def to(self, dtype: torch.dtype) -> "UnusedPart":
        return replace(self, like=self.like.to(dtype))

    def runs(self, which: slice) -> "UnusedPart":
        return replace(self, like=self.like[which])

    def rows(self, n: int) -> "UnusedPart":
        return replace(self, like=self.like[..., :n, :])

    def forms(self, mass: Masses) -> list:
        """One column of zeros (``nt_kernel.products.forms``)."""
        return [Flat(torch.zeros_like(self.like)[..., None])]

    def jvp(self, tangent: dict[str, Tensor]) -> Tensor:
        """J u = 0, [..., N, C]."""
        u = tangent.get(self.name)
        lead = () if u is None else u.shape[: u.dim() - len(self.shape)]
        return self.like.new_zeros(*torch.broadcast_shapes(lead, self.like.shape[:-2]), *self.like.shape[-2:])

    def vjp(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀ v = 0 by parameter name, for v [..., N, C]."""
        return {self.name: v.new_zeros(*v.shape[:-2], *self.shape)}

    def dense(self) -> dict[str, Tensor]:
        """{name: 0 [..., N, C, P]}."""
        return {self.name: self.like.new_zeros(*self.like.shape, torch.Size(self.shape).numel())}
