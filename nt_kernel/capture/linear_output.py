"""The linear layer whose output is the model's output: δ is the identity, and its Gram matrix a Kronecker product.

    (J D⁻¹Jᵀ)_{(i,c),(j,d)} = (a_i·a_j/μ_W + 1/μ_b)·1[c = d]

so that its inner system is one n × n problem with C right-hand sides instead of one of size n·C (theory: K = A ⊗ I_C).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nt_kernel.capture.linear import LinearPart, bordered_inputs
from nt_kernel.mass import Masses, RowColumnMass
from nt_kernel.products.forms import Decoupled


@dataclass(frozen=True)
class LinearOutputPart:
    """Jacobian of an output ``nn.Linear`` with inputs [..., N, d] and C = ``outputs`` units."""

    inputs: Tensor
    outputs: int
    weight: str | None
    bias: str | None
    kind = "linear"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name)

    def to(self, dtype: torch.dtype) -> "LinearOutputPart":
        return replace(self, inputs=self.inputs.to(dtype))

    def runs(self, which: slice) -> "LinearOutputPart":
        return replace(self, inputs=self.inputs[which])

    def rows(self, n: int) -> "LinearOutputPart":
        return replace(self, inputs=self.inputs[..., :n, :])

    def decouples(self, mass: Masses) -> bool:
        """True where the masses treat all outputs alike, as numbers do."""
        return not any(isinstance(mass[name], Tensor | RowColumnMass) for name in self.names)

    def forms(self, mass: Masses) -> list:
        """J D^(−1/2) as forms (``nt_kernel.products.forms``)."""
        if self.decouples(mass):
            return [Decoupled(bordered_inputs(self.inputs, self.weight, self.bias, mass), self.outputs)]
        return self._spelled_out().forms(mass)

    def _spelled_out(self) -> LinearPart:
        eye = torch.eye(self.outputs, dtype=self.inputs.dtype, device=self.inputs.device)[:, None, :]
        deltas = eye.expand(*self.inputs.shape[:-1], *eye.shape)  # [..., N, C, 1, C]
        shape = (self.outputs, self.inputs.shape[-1])
        return LinearPart(self.inputs[..., None, :], deltas, self.weight, self.bias, shape)

    def jvp(self, tangent: dict[str, Tensor]) -> Tensor:
        """J u, [..., N, C]."""
        out = self.inputs.new_zeros(*self.inputs.shape[:-1], self.outputs)
        if self.weight in tangent:
            out = out + self.inputs @ tangent[self.weight].mT
        if self.bias in tangent:
            out = out + tangent[self.bias][..., None, :]
        return out

    def vjp(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀ v for v [..., N, C], by parameter name."""
        out = {}
        if self.weight:
            out[self.weight] = v.mT @ self.inputs
        if self.bias:
            out[self.bias] = v.sum(-2)
        return out

    def dense(self) -> dict[str, Tensor]:
        """{name: J [..., N, C, P]}; for tests."""
        return self._spelled_out().dense()
