"""The fallback: the per-sample Jacobian of one parameter, formed explicitly. Exact for whatever has no structure."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExplicitPart:
    """Jacobian [..., N, C, P] of one parameter of shape ``shape`` (P its number of entries)."""

    jacobian: Tensor
    name: str
    shape: tuple[int, ...]
    kind = "explicit"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def to(self, dtype: torch.dtype) -> "ExplicitPart":
        return replace(self, jacobian=self.jacobian.to(dtype))

    def runs(self, which: slice) -> "ExplicitPart":
        return replace(self, jacobian=self.jacobian[which])

    def rows(self, n: int) -> "ExplicitPart":
        return replace(self, jacobian=self.jacobian[..., :n, :, :])

    def gram(self, other: "ExplicitPart", mass: dict[str, float]) -> Tensor:
        """J D⁻¹J'ᵀ, [..., N, C, N', C]."""
        J, J2 = self.jacobian, other.jacobian
        flat = J.flatten(-3, -2) @ J2.flatten(-3, -2).mT
        return flat.unflatten(-1, J2.shape[-3:-1]).unflatten(-3, J.shape[-3:-1]) / mass[self.name]

    def block_gram(self, mass: dict[str, float]) -> Tensor:
        """The diagonal blocks J_i D⁻¹J_iᵀ, [..., N, C, C]."""
        return self.jacobian @ self.jacobian.mT / mass[self.name]

    def jvp(self, tangent: dict[str, Tensor]) -> Tensor:
        """J u, [..., N, C]."""
        if self.name not in tangent:
            return self.jacobian.new_zeros(self.jacobian.shape[:-1])
        u = tangent[self.name]
        u = u.reshape(*u.shape[: u.dim() - len(self.shape)], 1, prod(self.shape), 1)
        return (self.jacobian @ u)[..., 0]

    def vjp(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀ v for v [..., N, C], by parameter name."""
        flat = torch.einsum("...ncp,...nc->...p", self.jacobian, v)
        return {self.name: flat.unflatten(-1, self.shape) if self.shape else flat[..., 0]}

    def dense(self) -> dict[str, Tensor]:
        """{name: J [..., N, C, P]}."""
        return {self.name: self.jacobian}
