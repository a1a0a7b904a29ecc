"""Our peers' ways to the empirical NTK [N, C, N, C]: each takes a model and its inputs and gives what is timed.

A peer that is not installed raises ImportError; one that cannot run a model raises whatever it raises. The caller turns
both into a row that says why.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn

from nt_kernel import empirical_ntk

Run = Callable[[], Tensor]


def layer_factors_gram(model: nn.Module, x: Tensor) -> Run:
    """Ours: one pass, then the small Gram matrices of all layers, tile by tile."""
    return lambda: empirical_ntk(model, x, dtype="model")


def jacrev_gram(model: nn.Module, x: Tensor) -> Run:
    """torch.func: per-sample Jacobians by ``vmap(jacrev)``, contracted by parameter (torch's NTK tutorial)."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, Tensor], xi: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (xi[None],))[0]

    jacobian = torch.func.vmap(torch.func.jacrev(one), (None, 0))

    def run() -> Tensor:
        flat = [J.flatten(2) for J in jacobian(params, x).values()]  # [N, C, P]
        return reduce(torch.add, (torch.einsum("ncp,mdp->ncmd", J, J) for J in flat))

    return run


def autograd_gram(model: nn.Module, x: Tensor) -> Run:
    """torch.autograd: the full Jacobian [N·C, P] in one batched backward (``is_grads_batched``)."""
    params = list(model.parameters())

    def run() -> Tensor:
        y = model(x)
        unit = torch.eye(y.numel(), dtype=y.dtype, device=y.device).view(-1, *y.shape)
        J = torch.autograd.grad(y, params, unit, is_grads_batched=True)
        return reduce(torch.add, (j.flatten(1) @ j.flatten(1).mT for j in J)).view(*y.shape, *y.shape)

    return run


def backpack_gram(model: nn.Module, x: Tensor) -> Run:
    """BackPACK: individual gradients (``BatchGrad``) of every output, one backward each."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(model)
    params = list(model.parameters())

    def run() -> Tensor:
        y = model(x)
        rows = []
        for c in range(y.shape[1]):
            with backpack(BatchGrad(), retain_graph=True):
                torch.autograd.backward(y[:, c].sum(), inputs=params, retain_graph=True)
            rows.append([p.grad_batch.flatten(1) for p in params])
            for p in params:
                del p.grad_batch
                p.grad = None
        per_parameter = (torch.stack(J, 1).flatten(0, 1) for J in zip(*rows, strict=True))  # [N·C, P]
        return reduce(torch.add, (J @ J.mT for J in per_parameter)).view(*y.shape, *y.shape)

    return run


def nngeometry_gram(model: nn.Module, x: Tensor) -> Run:
    """nngeometry: its Gram matrix of one full batch."""
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection

    layers = LayerCollection.from_model(model)
    # Its axes are [C, N, C, N]. A detached view each time: nngeometry sets requires_grad on what it is given.
    return lambda: GramMatrix(model, (x.detach(),), layer_collection=layers).to_torch().permute(1, 0, 3, 2)


def curvlinops_gram(model: nn.Module, x: Tensor) -> Run:
    """curvlinops: the transposed Jacobian operator on the identity, [P, N·C], by vector-Jacobian products."""
    from curvlinops import TransposedJacobianLinearOperator

    params, y = list(model.parameters()), model(x).detach()
    data = [(x, y)]
    operator = TransposedJacobianLinearOperator(model, params, data, check_deterministic=False)

    def run() -> Tensor:
        J = operator @ torch.eye(y.numel(), dtype=y.dtype, device=y.device)
        return (J.mT @ J).view(*y.shape, *y.shape).detach()

    return run


OURS, REFERENCE = "layer factors", "torch.func jacrev"
RIVALS: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    OURS: layer_factors_gram,
    REFERENCE: jacrev_gram,
    "torch.autograd, full J": autograd_gram,
    "backpack": backpack_gram,
    "nngeometry": nngeometry_gram,
    "curvlinops": curvlinops_gram,
}
