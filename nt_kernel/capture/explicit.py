"""The per-sample Jacobian of one parameter as an array: the fallback for whatever has no structure, and the form of small
parameters (gains and biases of normalisations, grouped convolutions), whose Jacobian is a sum over positions."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from nt_kernel.capture.linear import inverse_root
from nt_kernel.mass import Masses, RowColumnMass
from nt_kernel.products.forms import Flat


@dataclass(frozen=True)
class ExplicitPart:
    """Jacobian [..., N, C, P] of one parameter of shape ``shape`` (P its number of entries)."""

    jacobian: Tensor
    name: str
    shape: tuple[int, ...]
    kind: str = "explicit"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def to(self, dtype: torch.dtype) -> "ExplicitPart":
        return replace(self, jacobian=self.jacobian.to(dtype))

    def runs(self, which: slice) -> "ExplicitPart":
        return replace(self, jacobian=self.jacobian[which])

    def rows(self, n: int) -> "ExplicitPart":
        return replace(self, jacobian=self.jacobian[..., :n, :, :])

    def forms(self, mass: Masses) -> list:
        """J D^(−1/2) as forms (``nt_kernel.products.forms``)."""
        mu = mass[self.name]
        if isinstance(mu, RowColumnMass):
            mu = mu.full(self.shape)
        if isinstance(mu, Tensor):
            return [Flat(self.jacobian * inverse_root(mu.flatten(), self.jacobian))]
        return [Flat(self.jacobian if mu == 1 else self.jacobian * mu**-0.5)]

    def jvp(self, tangent: dict[str, Tensor]) -> Tensor:
        """J u, [..., N, C]."""
        if self.name not in tangent:
            return self.jacobian.new_zeros(self.jacobian.shape[:-1])
        u = tangent[self.name]
        u = u.reshape(*u.shape[: u.dim() - len(self.shape)], 1, prod(self.shape), 1)
        return (self.jacobian @ u)[..., 0]

    def vjp(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀ v for v [..., N, C], by parameter name."""
        flat = (v.flatten(-2)[..., None, :] @ self.jacobian.flatten(-3, -2))[..., 0, :]
        return {self.name: flat.unflatten(-1, self.shape) if self.shape else flat[..., 0]}

    def dense(self) -> dict[str, Tensor]:
        """{name: J [..., N, C, P]}."""
        return {self.name: self.jacobian}
