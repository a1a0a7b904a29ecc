"""The product v ↦ K v with K = J D⁻¹Jᵀ, K never formed: what conjugate gradients and matrix-free operators run on.

From the forms of J D^(−1/2) (``nt_kernel.products.forms``) it takes N·C·o + N·o·min(N, d) multiplications for a weight [o, d],
less than a pull through Jᵀ and a push through J, which pass by the parameters. Small products run as a row times a
matrix: torch's matrix times column is up to six times slower for stacks of them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nt_kernel.products.dense import product
from nt_kernel.products.forms import Decoupled, Flat, Outer, Weighted
from nt_kernel.products.positions import Positions
from nt_kernel.products.tiles import Form

Product = Callable[[Tensor], Tensor]


def kernel_product(forms: Sequence[Form]) -> Product:
    """v ↦ Σ_k J_k J_kᵀv for v [..., N, C]; more leading dimensions than the forms have are more vectors.

    >>> form = Outer(torch.tensor([[2.0], [1.0]]), torch.tensor([[[3.0]], [[1.0]]]))  # J = [6, 1]
    >>> kernel_product([form])(torch.tensor([[1.0], [1.0]]))
    tensor([[42.],
            [ 7.]])
    """
    products, stack = [_PRODUCT[type(form)](form) for form in forms], _stack_of(forms[0])

    def times(v: Tensor) -> Tensor:
        more = v.shape[: v.dim() - 2 - stack]
        rows = v.reshape(-1, *v.shape[v.dim() - 2 - stack :]).movedim(0, -2)  # [..., N, R, C], R vectors
        total = products[0](rows)
        for one in products[1:]:
            total = total + one(rows)
        return total.movedim(-2, 0).reshape(*more, *v.shape[v.dim() - 2 - stack :])

    return times


def _stack_of(form: Form) -> int:
    """The number of leading dimensions: those of stacked networks."""
    if isinstance(form, Flat):
        return form.jacobian.dim() - 3
    if isinstance(form, Decoupled):
        return form.inputs.dim() - 2
    return form.deltas.dim() - (3 if isinstance(form, Outer) else 4)


# Every product takes and gives rows [..., N, R, C].


def _outer(form: Outer) -> Product:
    through = _input_product(form.inputs, lambda: form.input_gram)

    def times(v: Tensor) -> Tensor:
        pulled = v @ form.deltas  # [..., N, R, o]
        return through(pulled.flatten(-2)).unflatten(-1, pulled.shape[-2:]) @ form.deltas.mT

    return times


def _input_product(inputs: Tensor, gram_of_inputs: Callable[[], Tensor]) -> Product:
    """w ↦ a aᵀw for w [..., N, k], by the Gram matrix of the inputs where there are fewer samples than inputs."""
    if inputs.shape[-2] <= inputs.shape[-1]:
        gram = gram_of_inputs()
        return lambda w: product(gram, w)
    return lambda w: product(inputs, product(inputs.mT, w))


def _flat(form: Flat) -> Product:
    J = form.jacobian.flatten(-3, -2)  # [..., NC, P]

    def times(v: Tensor) -> Tensor:
        pulled = v.movedim(-2, -3).flatten(-2) @ J  # [..., R, P]
        return (pulled @ J.mT).unflatten(-1, (v.shape[-3], v.shape[-1])).movedim(-3, -2)

    return times


def _decoupled(form: Decoupled) -> Product:
    through = _input_product(form.inputs, lambda: form.sample_gram(form))
    return lambda v: through(v.flatten(-2)).unflatten(-1, v.shape[-2:])


def _positions(form: Positions) -> Product:
    if form.vocabulary:
        read = form.inputs.flatten(-2)[..., None]  # [..., NT, 1]

        def through(w: Tensor) -> Tensor:
            rows = read.expand_as(w)
            table = w.new_zeros(*w.shape[:-2], form.vocabulary, w.shape[-1]).scatter_add_(-2, rows, w)
            return table.gather(-2, rows)
    else:
        inputs = form.inputs.flatten(-3, -2)

        def through(w: Tensor) -> Tensor:
            return product(inputs, product(inputs.mT, w))

    return _through_positions(form.deltas, through)


def _weighted(form: Weighted) -> Product:
    inputs, mass, o = form.inputs.flatten(-3, -2), form.weights.square(), form.deltas.shape[-1]

    def through(w: Tensor) -> Tensor:
        weights = (w.mT @ inputs).unflatten(-2, (-1, o)) * mass  # D⁻¹Jᵀv, [..., R, o, d]
        return inputs @ weights.flatten(-3, -2).mT

    return _through_positions(form.deltas, through)


def _through_positions(deltas: Tensor, through: Product) -> Product:
    """δ before and after, ``through`` [..., NT, R·o] in between: from the positions of all samples to all positions."""
    T, o = deltas.shape[-2:]
    deltas = deltas.flatten(-2)  # [..., N, C, T·o]

    def times(v: Tensor) -> Tensor:
        pulled = (v @ deltas).unflatten(-1, (T, o)).movedim(-3, -2)  # [..., N, T, R, o]
        pushed = through(pulled.flatten(-2).flatten(-3, -2)).unflatten(-1, pulled.shape[-2:])  # [..., NT, R, o]
        return pushed.unflatten(-3, (-1, T)).movedim(-3, -2).flatten(-2) @ deltas.mT

    return times


def mean_product(forms: Sequence[Form]) -> Tensor:
    """J J̄ᵀ, [..., N, C, C], for J̄ = (1/N) Σ_i J_i: K on the C vectors (1/N) 1 ⊗ e_d, which need no pull through δ.

    >>> mean_product([Outer(torch.tensor([[2.0], [1.0]]), torch.tensor([[[3.0]], [[1.0]]]))]).flatten()  # J = [6, 1]
    tensor([21.0000,  3.5000])
    """
    total = _MEAN[type(forms[0])](forms[0])
    for form in forms[1:]:
        total = total + _MEAN[type(form)](form)
    return total / forms[0].shape[-2]


def _outer_mean(form: Outer) -> Tensor:
    carried = _input_product(form.inputs, lambda: form.input_gram)(form.deltas.flatten(-2))  # [..., N, C·o]
    return form.deltas @ carried.unflatten(-1, form.deltas.shape[-2:]).mT


def _flat_mean(form: Flat) -> Tensor:
    total = form.jacobian.sum(-3)  # [..., C, P]
    return (form.jacobian.flatten(-3, -2) @ total.mT).unflatten(-2, form.shape[-2:])


def _decoupled_mean(form: Decoupled) -> Tensor:
    sizes = (form.inputs @ form.inputs.sum(-2)[..., None])[..., 0]  # a_i · Σ_j a_j
    return torch.diag_embed(sizes[..., None].expand(form.shape))


def _any_mean(form: Positions | Weighted) -> Tensor:
    eye = torch.eye(form.shape[-1], dtype=form.deltas.dtype, device=form.deltas.device)
    return _PRODUCT[type(form)](form)(eye.expand(*form.shape[:-1], *eye.shape)).mT


_MEAN: dict[type, Callable[..., Tensor]] = {
    Outer: _outer_mean,
    Flat: _flat_mean,
    Decoupled: _decoupled_mean,
    Positions: _any_mean,
    Weighted: _any_mean,
}
_PRODUCT: dict[type, Callable[..., Product]] = {
    Outer: _outer,
    Flat: _flat,
    Decoupled: _decoupled,
    Positions: _positions,
    Weighted: _weighted,
}
