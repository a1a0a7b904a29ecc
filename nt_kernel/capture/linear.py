"""The Jacobian of a weight that multiplies: linear layers and ungrouped convolutions, no Jacobian formed.

For z_{is} = W a_{is} + b at the positions s of sample i (one, or tokens, patches, repeated calls) and the sensitivities
δ_{ics} = ∂y_{ic}/∂z_{is}, the Jacobian is a sum of outer products, ∂y_{ic}/∂W = Σ_s δ_{ics} a_{is}ᵀ, ∂y_{ic}/∂b = Σ_s δ_{ics}.
Masses fold into a and δ, the bias becomes one more input of value 1/√μ_b: then

    (J D⁻¹Jᵀ)_{(i,c),(j,d)} = Σ_{s,t} (a_{is}·a_{jt}/μ_W + 1/μ_b)(δ_{ics}·δ_{jdt}).

All arrays may carry leading batch dimensions (stacked twins), written ``...``.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nt_kernel.mass import Masses, ParameterMass, RowColumnMass
from nt_kernel.products.dense import product
from nt_kernel.products.forms import Flat, Outer, Weighted, outer_sums
from nt_kernel.products.positions import Positions


def bordered_inputs(inputs: Tensor, weight: str | None, bias: str | None, mass: Masses) -> Tensor:
    """[a/√μ_W, 1/√μ_b]: the inputs [..., d] with scalar masses folded in; a tensor that is not trained adds nothing.

    >>> bordered_inputs(torch.tensor([[3.0]]), "W", "b", {"W": 9.0, "b": 4.0})
    tensor([[1.0000, 0.5000]])
    """
    columns = []
    if weight:
        columns.append(inputs if mass[weight] == 1 else inputs * mass[weight] ** -0.5)
    if bias:
        columns.append(inputs.new_full((*inputs.shape[:-1], 1), mass[bias] ** -0.5))
    return torch.cat(columns, -1) if len(columns) > 1 else columns[0]


def inverse_root(mass: ParameterMass, like: Tensor) -> Tensor | float:
    """D^(−1/2) of a number or tensor, in the type of ``like``."""
    return mass.to(like).rsqrt() if isinstance(mass, Tensor) else mass**-0.5


@dataclass(frozen=True)
class LinearPart:
    """Jacobian of a ``weight`` [o, …] (d entries a row) and/or ``bias`` [o]; a name is None where it is not trained.

    ``inputs`` [..., N, T, d], ``deltas`` [..., N, C, T, o] with T positions; ``shape`` is the weight's, [d, o] with
    ``transposed`` (z = aW).
    """

    inputs: Tensor
    deltas: Tensor
    weight: str | None
    bias: str | None
    shape: tuple[int, ...]
    kind: str = "linear"
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name)

    def to(self, dtype: torch.dtype) -> "LinearPart":
        return replace(self, inputs=self.inputs.to(dtype), deltas=self.deltas.to(dtype))

    def runs(self, which: slice) -> "LinearPart":
        return replace(self, inputs=self.inputs[which], deltas=self.deltas[which])

    def rows(self, n: int) -> "LinearPart":
        return replace(self, inputs=self.inputs[..., :n, :, :], deltas=self.deltas[..., :n, :, :, :])

    def forms(self, mass: Masses) -> list:
        """J D^(−1/2) as forms (``nt_kernel.products.forms``): one where the masses are numbers."""
        if not any(isinstance(mass[name], Tensor | RowColumnMass) for name in self.names):
            if not self.weight:
                return [Flat(self.deltas.sum(-2) * mass[self.bias] ** -0.5)]
            return [self._form(bordered_inputs(self.inputs, self.weight, self.bias, mass), self.deltas)]
        forms = []
        if self.weight:
            forms.append(self._weight_form(mass[self.weight]))
        if self.bias:
            forms.append(Flat(self.deltas.sum(-2) * inverse_root(mass[self.bias], self.deltas)))
        return forms

    def _form(self, inputs: Tensor, deltas: Tensor) -> Outer | Positions:
        if self.inputs.shape[-2] == 1:
            return Outer(inputs[..., 0, :], deltas[..., 0, :])
        return Positions(inputs, deltas)

    def _weight_form(self, mass: ParameterMass) -> "Outer | Positions | Weighted":
        if isinstance(mass, RowColumnMass):
            o, d = (inverse_root(side.flatten(), self.deltas) for side in (mass.row, mass.column))
            o, d = (d, o) if self.transposed else (o, d)
            return self._form(self.inputs * d, self.deltas * o)
        if isinstance(mass, Tensor):
            full = inverse_root(mass, self.deltas).reshape(mass.shape[0], -1)
            return Weighted(self.inputs, self.deltas, full.mT if self.transposed else full)
        return self._form(self.inputs * mass**-0.5, self.deltas)

    def jvp(self, tangent: dict[str, Tensor]) -> Tensor:
        """J u, [..., N, C]: the change of z under the tangent, contracted with δ."""
        T = self.inputs.shape[-2]
        dz: Tensor | None = None  # [..., N·T, o]
        if self.weight in tangent:
            u = tangent[self.weight]
            if len(self.shape) > 2:
                u = u.flatten(-len(self.shape) + 1)
            dz = product(self.inputs.flatten(-3, -2), u if self.transposed else u.mT)
        if self.bias in tangent:
            b = tangent[self.bias][..., None, :]
            dz = b.expand(*b.shape[:-2], self.inputs.shape[-3] * T, b.shape[-1]) if dz is None else dz + b
        if dz is None:
            return self.deltas.new_zeros(self.deltas.shape[:-2])
        dz = dz.unflatten(-2, (-1, T)).flatten(-2)  # [..., N, T·o]
        return (dz[..., None, :] @ self.deltas.flatten(-2).mT)[..., 0, :]

    def vjp(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀ v for v [..., N, C], by parameter name."""
        weighted = (v[..., None, :] @ self.deltas.flatten(-2))[..., 0, :]  # [..., N, T·o]
        weighted = weighted.unflatten(-1, self.deltas.shape[-2:]).flatten(-3, -2)  # [..., N·T, o]
        out = {}
        if self.weight:
            inputs = self.inputs.flatten(-3, -2)
            g = product(inputs.mT, weighted) if self.transposed else product(weighted.mT, inputs)
            out[self.weight] = g.unflatten(-1, self.shape[1:]) if len(self.shape) > 2 else g
        if self.bias:
            out[self.bias] = weighted.sum(-2)
        return out

    def dense(self) -> dict[str, Tensor]:
        """{name: J [..., N, C, P]}; for tests and for small layers only."""
        out = {}
        if self.weight:
            J = outer_sums(self.deltas, self.inputs)
            out[self.weight] = (J.mT if self.transposed else J).flatten(-2)
        if self.bias:
            out[self.bias] = self.deltas.sum(-2)
        return out
