"""The Jacobian of a linear layer as a structured operator: inputs and output sensitivities, no Jacobian formed.

For z_i = W a_i + b and δ_{ic} = ∂y_{ic}/∂z_i the Jacobian is an outer product, ∂y_{ic}/∂W = δ_{ic} a_iᵀ and
∂y_{ic}/∂b = δ_{ic}, so

    (J D⁻¹Jᵀ)_{(i,c),(j,d)} = (a_i·a_j/μ_W + 1/μ_b)(δ_{ic}·δ_{jd}),

two small Gram matrices multiplied entry by entry. Where a sample passes the layer at several positions s (tokens),
J_i = Σ_s δ_{is} ⊗ a_{is} and the product becomes the double sum over s and t. All arrays may carry leading batch
dimensions (stacked twins), written ``...``.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nt_kernel.linear_output import input_gram


@dataclass(frozen=True)
class LinearPart:
    """Jacobian of the ``weight`` and/or ``bias`` of one ``nn.Linear``; a name is None where that tensor is not trained.

    ``inputs`` [..., N, d], ``deltas`` [..., N, C, o]; with ``tokens`` [..., N, T, d] and [..., N, C, T, o].
    """

    inputs: Tensor
    deltas: Tensor
    weight: str | None
    bias: str | None
    tokens: bool = False
    kind = "linear"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name)

    def to(self, dtype: torch.dtype) -> "LinearPart":
        return replace(self, inputs=self.inputs.to(dtype), deltas=self.deltas.to(dtype))

    def runs(self, which: slice) -> "LinearPart":
        return replace(self, inputs=self.inputs[which], deltas=self.deltas[which])

    def rows(self, n: int) -> "LinearPart":
        skip = (slice(None),) * (2 if self.tokens else 1)
        return replace(
            self, inputs=self.inputs[(..., slice(n), *skip)], deltas=self.deltas[(..., slice(n), slice(None), *skip)]
        )

    def gram(self, other: "LinearPart", mass: dict[str, float]) -> Tensor:
        """J D⁻¹J'ᵀ, [..., N, C, N', C]."""
        if self.tokens:
            return self._token_gram(other, mass)
        deltas, other_deltas = self.deltas.flatten(-3, -2), other.deltas.flatten(-3, -2)  # [..., NC, o]
        N, C, M = self.deltas.shape[-3], self.deltas.shape[-2], other.deltas.shape[-3]
        gram = (deltas @ other_deltas.mT).unflatten(-1, (M, C)).unflatten(-3, (N, C))
        return gram.mul_(self._input_gram(self.inputs, other.inputs, mass)[..., :, None, :, None])

    def _input_gram(self, a: Tensor, b: Tensor, mass: dict[str, float]) -> Tensor:
        return input_gram(a, b, self.weight, self.bias, mass)

    def _token_gram(self, other: "LinearPart", mass: dict[str, float]) -> Tensor:
        T, d, o = self.inputs.shape[-2], self.inputs.shape[-1], self.deltas.shape[-1]
        N, C, M = self.inputs.shape[-3], self.deltas.shape[-3], other.inputs.shape[-3]
        # Multiplications of the two routes: all position pairs, or the small per-sample matrices Σ_s δ_s ⊗ a_s.
        pairs = N * M * T * T * (d + C * C * (o + 1))
        summed = (N + M) * C * T * o * d + N * M * C * C * o * d
        if summed <= pairs:
            total = 0
            for left, right, name in zip(self._summed(), other._summed(), (self.weight, self.bias), strict=True):
                if name:  # [..., N, C, P]
                    flat = left.flatten(-3, -2) @ right.flatten(-3, -2).mT
                    total = total + flat.unflatten(-1, (M, C)).unflatten(-3, (N, C)) / mass[name]
            return total
        rows = []
        for i in range(N):  # one sample against all: [..., C, T, M, C, T] at most
            a = self._input_gram(self.inputs[..., i, :, :], other.inputs.flatten(-3, -2), mass)  # [..., T, MT]
            delta = self.deltas[..., i, :, :, :].flatten(-3, -2) @ other.deltas.flatten(-4, -2).mT  # [..., CT, M C T]
            delta = delta.unflatten(-1, (M, C, T)).unflatten(-4, (C, T))
            rows.append(torch.einsum("...csmdt,...smt->...cmd", delta, a.unflatten(-1, (M, T))))
        return torch.stack(rows, -4)

    def _token_block_gram(self, mass: dict[str, float]) -> Tensor:
        C, T, o, d = self.deltas.shape[-3], *self.deltas.shape[-2:], self.inputs.shape[-1]
        if C * T * o * d + C * C * o * d <= T * T * (d + C * C * (o + 1)):  # the cheaper route, as in _token_gram
            parts = zip(self._summed(), (self.weight, self.bias), strict=True)
            return sum(J @ J.mT / mass[name] for J, name in parts if name)
        deltas = self.deltas.flatten(-3, -2)  # [..., N, CT, o]
        delta = (deltas @ deltas.mT).unflatten(-1, (C, T)).unflatten(-3, (C, T))
        return torch.einsum("...csdt,...st->...cd", delta, self._input_gram(self.inputs, self.inputs, mass))

    def _summed(self) -> tuple[Tensor | None, Tensor | None]:
        """Σ_s δ_s ⊗ a_s [..., N, C, o·d] and Σ_s δ_s [..., N, C, o]."""
        if not self.tokens:
            outer = (self.deltas[..., None] * self.inputs[..., None, None, :]).flatten(-2)
            return outer if self.weight else None, self.deltas if self.bias else None
        outer = (self.deltas.mT @ self.inputs[..., None, :, :]).flatten(-2)
        return outer if self.weight else None, self.deltas.sum(-2) if self.bias else None

    def block_gram(self, mass: dict[str, float]) -> Tensor:
        """The diagonal blocks J_i D⁻¹J_iᵀ, [..., N, C, C]."""
        if self.tokens:
            return self._token_block_gram(mass)
        squares = self.inputs.square().sum(-1)  # [..., N]
        scale = squares / mass[self.weight] if self.weight else torch.zeros_like(squares)
        scale = scale + 1 / mass[self.bias] if self.bias else scale
        return (self.deltas @ self.deltas.mT) * scale[..., None, None]

    def jvp(self, tangent: dict[str, Tensor]) -> Tensor:
        """J u, [..., N, C]: the change of z under the tangent, contracted with δ."""
        dz = 0  # [..., N, (T,) o]
        if self.weight in tangent:
            W = tangent[self.weight]
            dz = dz + self.inputs @ (W.mT[..., None, :, :] if self.tokens else W.mT)
        if self.bias in tangent:
            b = tangent[self.bias]
            dz = dz + (b[..., None, None, :] if self.tokens else b[..., None, :])
        if not torch.is_tensor(dz):
            return self.deltas.new_zeros(self.deltas.shape[: -2 if self.tokens else -1])
        if self.tokens:
            return torch.einsum("...ncto,...nto->...nc", self.deltas, dz)
        return (self.deltas @ dz[..., None])[..., 0]

    def vjp(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀ v for v [..., N, C], by parameter name."""
        out = {}
        if self.tokens:
            weighted = torch.einsum("...ncto,...nc->...nto", self.deltas, v).flatten(-3, -2)  # [..., NT, o]
            inputs = self.inputs.flatten(-3, -2)
        else:
            weighted, inputs = (v[..., None, :] @ self.deltas)[..., 0, :], self.inputs  # [..., N, o], [..., N, d]
        if self.weight:
            out[self.weight] = weighted.mT @ inputs
        if self.bias:
            out[self.bias] = weighted.sum(-2)
        return out

    def dense(self) -> dict[str, Tensor]:
        """{name: J [..., N, C, P]}; for tests and for small layers only."""
        return {n: J for n, J in zip((self.weight, self.bias), self._summed(), strict=True) if n}
