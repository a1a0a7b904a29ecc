"""The linear layer whose output is the model's output: δ is the identity, and its Gram matrix a Kronecker product.

    (J D⁻¹Jᵀ)_{(i,c),(j,d)} = (a_i·a_j/μ_W + 1/μ_b)·1[c = d]

so that its inner system is one n × n problem with C right-hand sides instead of one of size n·C (theory: K = A ⊗ I_C).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def kron_identity(samples: Tensor, C: int) -> Tensor:
    """A ⊗ I_C as [..., N, C, N', C] from A [..., N, N'].

    >>> kron_identity(torch.tensor([[2.0]]), 2).reshape(2, 2)
    tensor([[2., 0.],
            [0., 2.]])
    """
    out = samples.new_zeros(*samples.shape[:-1], C, samples.shape[-1], C)
    out.diagonal(dim1=-3, dim2=-1).copy_(samples[..., None])
    return out


def input_gram(a: Tensor, b: Tensor, weight: str | None, bias: str | None, mass: dict[str, float]) -> Tensor:
    """a_i·b_j/μ_W + 1/μ_b [..., N, N'] of inputs a, b [..., N, d]; a tensor that is not trained (None) adds nothing.

    >>> input_gram(torch.tensor([[2.0]]), torch.tensor([[3.0]]), "W", "b", {"W": 2.0, "b": 1.0})
    tensor([[4.]])
    """
    gram = (a @ b.mT) / mass[weight] if weight else a.new_zeros(*a.shape[:-1], b.shape[-2])
    return gram + 1 / mass[bias] if bias else gram


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

    def sample_gram(self, other: "LinearOutputPart", mass: dict[str, float]) -> Tensor:
        """A [..., N, N'], the Gram matrix without its factor I_C."""
        return input_gram(self.inputs, other.inputs, self.weight, self.bias, mass)

    def gram(self, other: "LinearOutputPart", mass: dict[str, float]) -> Tensor:
        """J D⁻¹J'ᵀ, [..., N, C, N', C]."""
        return kron_identity(self.sample_gram(other, mass), self.outputs)

    def block_gram(self, mass: dict[str, float]) -> Tensor:
        """The diagonal blocks J_i D⁻¹J_iᵀ, [..., N, C, C]."""
        scale = self.inputs.square().sum(-1) / mass[self.weight] if self.weight else self.inputs.new_zeros(())
        scale = scale + 1 / mass[self.bias] if self.bias else scale
        scale = scale.expand(self.inputs.shape[:-1])
        return torch.diag_embed(scale[..., None].expand(*scale.shape, self.outputs))

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
        eye = torch.eye(self.outputs, dtype=self.inputs.dtype, device=self.inputs.device)
        weight = (eye[:, :, None] * self.inputs[..., None, None, :]).flatten(-2)
        bias = eye.expand(*self.inputs.shape[:-1], self.outputs, self.outputs)
        return {n: J for n, J in ((self.weight, weight), (self.bias, bias)) if n}
