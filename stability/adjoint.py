"""Backpropagation as the critical point of the Lagrangian h − Σ λ_αᵀ(z_α − f_α(z_{α−1}, θ_α)) of a chain of layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optim.steps.risk import mean_loss

LayerParams = tuple[dict[str, Tensor], ...]


@dataclass(frozen=True)
class AdjointStates:
    """States, costates and gradients of a chain of N layers; the parameters of layer α by their names in that layer."""

    h: Tensor
    states: tuple[Tensor, ...]  # z_0 = x, z_1, …, z_N, all samples each
    costates: tuple[Tensor | None, ...]  # λ_0, …, λ_N; λ_0 = ∂h/∂x, None where x is not floating-point
    gradients: LayerParams  # ∇_{θ_α}h of layers 1, …, N


def layer_params(layers: Sequence[nn.Module]) -> LayerParams:
    """The trainable parameters of every layer by name, detached.

    >>> [list(found) for found in layer_params([nn.Linear(2, 1), nn.Tanh()])]
    [['weight', 'bias'], []]
    """
    return tuple({n: p.detach() for n, p in layer.named_parameters() if p.requires_grad} for layer in layers)


def adjoint_states(
    layers: Sequence[nn.Module],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    params: LayerParams | None = None,
) -> AdjointStates:
    """z_α = f_α(z_{α−1}, θ_α) forward, then λ_N = ∂h/∂z_N (= (1/n)∇_zℓ), λ_{α−1} = (∂f_α/∂z_{α−1})ᵀλ_α backward; pure.

    ∇_{θ_α}h = (∂f_α/∂θ_α)ᵀλ_α, what autograd calls the gradient. These are the equations that make :func:`lagrangian`
    stationary in z and λ (Pehle & Slotine, arXiv 2603.03610; docs/action.md).

    Parameters
    ----------
    layers: modules f_α, each a function of the one before (an ``nn.Sequential`` will do); a module that comes twice is two
        layers, whose gradients add up. x: [n, …]. loss: z_N → the losses of the samples [n], or their mean.
    params: θ_α by name (:func:`layer_params`), instead of the modules' own.

    >>> half_square = lambda z: 0.5 * z.square().sum(1)
    >>> layers = [nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)]
    >>> theta = ({"weight": torch.tensor([[2.0]])}, {"weight": torch.tensor([[3.0]])})
    >>> found = adjoint_states(layers, torch.tensor([[1.0]]), half_square, theta)
    >>> [z.item() for z in found.states], [costate.item() for costate in found.costates]
    ([1.0, 2.0, 6.0], [36.0, 18.0, 6.0])
    >>> [g["weight"].item() for g in found.gradients]
    [18.0, 12.0]
    """
    params = layer_params(layers) if params is None else params
    if len(params) != len(layers):
        raise ValueError(f"params must hold one dict for each of the {len(layers)} layers, got {len(params)}")
    states, pullbacks = [x.detach()], []
    for layer, theta in zip(layers, params, strict=True):
        z = states[-1]
        differentiable = z.is_floating_point()
        f = layer_map(layer)
        if differentiable:
            out, pullback = torch.func.vjp(f, z, theta)
        else:  # indices: an embedding
            out, pullback = torch.func.vjp(lambda theta, f=f, z=z: f(z, theta), theta)
        states.append(out)
        pullbacks.append((pullback, differentiable))
    end = states[-1].detach().requires_grad_()
    with torch.enable_grad():
        h = mean_loss(loss(end), len(x))
        (costate,) = torch.autograd.grad(h, end)
    costates: list[Tensor | None] = [costate]
    gradients: list[dict[str, Tensor]] = []
    for pullback, differentiable in reversed(pullbacks):
        found = pullback(costates[0])
        costates.insert(0, found[0] if differentiable else None)
        gradients.insert(0, found[-1])
    return AdjointStates(h.detach(), tuple(z.detach() for z in states), tuple(costates), tuple(gradients))


def layer_map(layer: nn.Module) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """f_α(z, θ) of a module; a copy of z is what an in-place layer writes on."""
    fixed = {n: t.detach() for n, t in layer.named_parameters() if not t.requires_grad}
    fixed |= {n: b.detach().clone() for n, b in layer.named_buffers()}
    return lambda z, theta: torch.func.functional_call(layer, {**fixed, **theta}, (z.clone(),))


def lagrangian(
    layers: Sequence[nn.Module],
    params: LayerParams,
    states: Sequence[Tensor],
    costates: Sequence[Tensor | None],
    loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """h(z_N) − Σ_{α=1…N} λ_αᵀ(z_α − f_α(z_{α−1}, θ_α)), differentiable in every z, λ and θ; λ_0 is not used.

    At the states and costates of :func:`adjoint_states` it is h, ∂/∂λ_α and ∂/∂z_α (α ≥ 1) vanish, and ∂/∂θ_α = ∇_{θ_α}h.
    """
    value = mean_loss(loss(states[-1]), len(states[0]))
    for layer, theta, before, after, costate in zip(layers, params, states, states[1:], costates[1:], strict=False):
        value = value - (costate * (after - layer_map(layer)(before, theta))).sum()
    return value
