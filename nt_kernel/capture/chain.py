"""Sensitivities of a perceptron by the chain rule itself, all outputs at once.

Where every captured call z_l = W_l a_l + b_l feeds the next one through functions of single entries, a_{l+1} = φ_l(z_l), and
the last call is the model's output y = z_L, then

    δ_{L−1} = W_L ⊙ φ'_{L−1},   δ_{l−1} = (δ_l W_l) ⊙ φ'_{l−1}:

one matrix product a layer, for all samples and outputs, and φ' once for all outputs. A backward pass of autograd would do
the same for each output, or through its batching rules. That it is so is read off autograd's graph, not off the modules.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nt_kernel.capture.site import Site
from nt_kernel.capture.structures import structure_of
from nt_kernel.products.dense import product

# Autograd's nodes of functions that act on every entry by itself; sums and products with constants may repeat entries, which
# makes the result larger.
ENTRYWISE = {
    f"{name}Backward0"
    for name in (
        *(
            "Tanh",
            "Relu",
            "Sigmoid",
            "Gelu",
            "Silu",
            "Softplus",
            "Elu",
            "Selu",
            "Celu",
            "LeakyRelu",
            "Mish",
            "Threshold",
        ),
        *(
            "Hardtanh",
            "Hardswish",
            "Hardsigmoid",
            "LogSigmoid",
            "Softshrink",
            "Hardshrink",
            "Exp",
            "Sin",
            "Cos",
            "Erf",
            "Neg",
        ),
        *("Add", "Sub", "Mul", "Div"),
    )
}


def linear_chain(sites: Sequence[Site], features: Mapping[int, Tensor], edges: Mapping[int, GradientEdge]) -> bool:
    """True where ``sites``, the last of them the model's output, are a chain of linear layers on vectors.

    ``features`` are the inputs of the calls with the graph they came by, ``edges`` where autograd finds the results of all
    calls but the last.
    """
    inner = sites[:-1]
    if not inner or not sites[-1].is_output or [site.index for site in inner] != list(edges):
        return False
    linear = structure_of(F.linear)
    if not all(s.structure is linear and s.weight and len(s.shape) == 2 and not s.contracted for s in sites):
        return False
    links = [(s, features[after.index], edges[s.index]) for s, after in zip(inner, sites[1:], strict=True)]
    return all(tuple(a.shape) == s.shape and _entrywise(a, edge) for s, a, edge in links)


def _entrywise(a: Tensor, z: GradientEdge) -> bool:
    """True where a is made of the tensor at the edge z by functions of single entries, one after the other."""
    if not a.requires_grad:
        return False
    edge = get_gradient_edge(a)
    while edge.node is not z.node:
        before = [node for node in edge.node.next_functions if node[0] is not None]
        if edge.node.name() not in ENTRYWISE or len(before) != 1:
            return False
        edge = GradientEdge(*before[0])
    return edge.output_nr == z.output_nr


def slope(a: Tensor, z: GradientEdge) -> Tensor:
    """φ'(z) of a = φ(z), entry by entry."""
    return torch.autograd.grad(a, z, torch.ones_like(a), retain_graph=True)[0]


def chain_sensitivities(weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
    """δ_1, …, δ_{L−1}, [N, C, o_l] each, of weights W_2, …, W_L [o_l, o_{l−1}] and slopes φ'_1, …, φ'_{L−1} [N, o_l].

    >>> (delta,) = chain_sensitivities([torch.tensor([[2.0], [3.0]])], [torch.tensor([[0.5]])])
    >>> delta
    tensor([[[1.0000],
             [1.5000]]])
    """
    found = [weights[-1] * slopes[-1][:, None, :]]
    for weight, before in zip(reversed(weights[:-1]), reversed(slopes[:-1]), strict=True):
        after = found[-1]
        delta = product(after.flatten(0, 1), weight).unflatten(0, after.shape[:2])
        found.append(delta.mul_(before[:, None, :]))
    return found[::-1]
