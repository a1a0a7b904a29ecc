"""The action principle of Riemannian gradient descent, at an instant and summed along a run of any optimizer.

S[θ] = ∫ (T + V) ds, T = ½θ̇ᵀGθ̇, V = ½∇hᵀG⁻¹∇h, is at least |h(end) − h(start)|, with equality exactly on θ̇ = ∓G⁻¹∇h
(Pehle & Slotine, arXiv 2603.03610, P1, theorems 1 and 2): T + V ± ∇hᵀθ̇ = ½‖θ̇ ± G⁻¹∇h‖²_G. Time in units of 1/η gives the
principle with η: S_η of a step of length lr is η·S_1 of one of length η·lr.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.metric.model_metric import ModelMetric


@dataclass(frozen=True)
class ActionTerms:
    """What the action is made of at one instant (0-dim float64 tensors), for a velocity θ̇ and the risk h."""

    kinetic: Tensor  # T = ½θ̇ᵀGθ̇ = ½πᵀG⁻¹π, π = Gθ̇
    potential: Tensor  # V = ½∇hᵀG⁻¹∇h, which the action adds (as a mechanical potential it is −V)
    power: Tensor  # ∇hᵀθ̇ = dh/ds
    mismatch: Tensor  # ½‖θ̇ + G⁻¹∇h‖²_G = T + V + ∇hᵀθ̇
    misdirection: Tensor  # 2√(TV) + ∇hᵀθ̇, its part that a change of speed cannot remove

    @property
    def hamiltonian(self) -> Tensor:
        """½πᵀG⁻¹π − ½∇hᵀG⁻¹∇h = T − V: zero along the flow. It tests the speed alone, not the direction."""
        return self.kinetic - self.potential


def action_terms(metric: ModelMetric, velocity: Mapping[str, Tensor], r: Tensor) -> ActionTerms:
    """T, V, ∇hᵀθ̇ and the two defects of θ̇ = ``velocity`` {name: tensor}, r = ∂h/∂y [N, C] with ∇h = Jᵀr; float64.

    With R of :meth:`nt_kernel.metric.model_metric.ModelMetric.root` (RᵀR = G), a = Rθ̇ and b = R G⁻¹∇h, the defects are
    ½‖a + b‖² and ½‖√(|b|/|a|)·a + √(|a|/|b|)·b‖²: sums of squares, which vanish without cancellation. V is ½∇hᵀ(G⁻¹∇h), so
    T + V + ∇hᵀθ̇ = ½‖a + b‖² holds as far as the solve is a solve. Cost: one solve, two products with J, two with Jᵀ.

    >>> metric = ModelMetric(torch.nn.Linear(1, 1, bias=False), torch.tensor([[2.0]]))  # G = 1 + 2² = 5
    >>> r = torch.tensor([[5.0]], dtype=torch.float64)  # ∇h = 2·5, V = ½·10²/5
    >>> terms = action_terms(metric, {"weight": torch.tensor([[-2.0]], dtype=torch.float64)}, r)
    >>> terms.kinetic.item(), terms.potential.item(), terms.power.item(), terms.mismatch.item()
    (10.0, 10.0, -20.0, 0.0)
    """
    velocity = {name: u.double() for name, u in velocity.items()}
    gradient, natural = metric.gradient(r), metric.direction(r)
    a, b = metric.root(velocity), metric.root(natural)
    length = (a.norm() * b.norm()).sqrt()
    bend = (b.norm() * a + a.norm() * b) / torch.where(length > 0, length, 1)  # both vanish where |a||b| does
    return ActionTerms(
        kinetic=a.square().sum() / 2,
        potential=inner_product(gradient, natural) / 2,
        power=inner_product(gradient, velocity),
        mismatch=(a + b).square().sum() / 2,
        misdirection=bend.square().sum() / 2,
    )


def inner_product(u: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensor:
    """uᵀv over all names of u.

    >>> inner_product({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(1)}).item()
    3.0
    """
    return torch.stack([(u[name] * v[name]).sum() for name in u]).sum()


def action_balance(
    lr: Tensor, kinetic: Tensor, potential: Tensor, power: Tensor, misdirection: Tensor, h: Tensor
) -> dict[str, Tensor]:
    """Where the action of every step of a run went: {term: [T]}, h [T + 1], the rest [T] at the start of the steps.

    With θ̇ = Δθ/lr over a step of duration lr, **derived**, exact for every step of every optimizer:

    - action lr(T + V) = length + speed;
    - length ‖Δθ‖_G‖∇h‖_{G⁻¹} = 2lr√(TV): no lr in it; speed lr(√T − √V)² ≥ 0, zero where the Hamiltonian is;
    - direction = length + ∇hᵀΔθ ≥ 0 (Cauchy–Schwarz), zero where Δθ is along −G⁻¹∇h;
    - curvature h(θ + Δθ) − h(θ) − ∇hᵀΔθ, of either sign, ≥ 0 where h is convex on the step, O(lr²);
    - defect ½lr‖θ̇ + G⁻¹∇h‖²_G = speed + direction.

    So action = (h − h⁺) + speed + direction + curvature, and length = (h − h⁺) + direction + curvature.

    >>> one = torch.ones(1)
    >>> found = action_balance(0.5 * one, 4 * one, one, -3 * one, one, torch.tensor([2.0, 1.0]))
    >>> {name: value.item() for name, value in found.items()}
    {'action': 2.5, 'length': 2.0, 'speed': 0.5, 'direction': 0.5, 'curvature': 0.5, 'defect': 1.0}
    """
    length = 2 * lr * (kinetic * potential.clamp_min(0)).sqrt()
    speed = lr * (kinetic.sqrt() - potential.clamp_min(0).sqrt()).square()
    direction = lr * misdirection
    return {
        "action": lr * (kinetic + potential),
        "length": length,
        "speed": speed,
        "direction": direction,
        "curvature": h.diff() - lr * power,
        "defect": speed + direction,
    }
