"""What a metric that moves with the data adds to the routes through the parameters: ‖G'⁻¹(G − G')G⁻¹∇h‖, measured.

The routes of ``stability.routes`` compare two runs in ONE constant metric. With G = D + c·JᵀMJ on S and G' on S', the twins'
velocities at one θ differ by more than the replaced gradient:

    G⁻¹∇h_S − G'⁻¹∇h_S' = G'⁻¹(∇h_S − ∇h_S') + (G⁻¹ − G'⁻¹)∇h_S,    (G⁻¹ − G'⁻¹)∇h_S = G'⁻¹(G' − G)G⁻¹∇h_S.

The second term is what :func:`metric_change` gives, beside the first. Where it is not small no constant-metric route is near.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.mass import Mass
from nt_kernel.metric.model_metric import ModelMetric
from nt_kernel.metric.output_metric import OutputMetric
from stability.losses import Loss, PerSample, resolve_loss
from stability.replacement import Replacement, data_for, stack_twins


@dataclass(frozen=True)
class MetricChange:
    """Euclidean norms over all parameters, per replacement, [R] float64."""

    metric: Tensor  # ‖(G⁻¹ − G'⁻¹)∇h_S‖
    gradient: Tensor  # ‖G'⁻¹(∇h_S − ∇h_S')‖, what the routes bound
    velocity: float  # ‖G⁻¹∇h_S‖

    @property
    def share(self) -> Tensor:
        """The metric's part over the gradient's, [R]."""
        return self.metric / self.gradient


@torch.no_grad()
def metric_change(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    replacements: list[Replacement],
    *,
    params: Mapping[str, Tensor] | None = None,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    loss: "str | Loss | PerSample" = "squared",
) -> MetricChange:
    """Both parts of the difference of two twins' velocities at one θ (``params``, default the model's own).

    Other arguments and errors as of :func:`stability.train_twins`. Cost: a first-order pass and an inner system per data set.

    >>> x, a = torch.tensor([[1.0], [1.0]]).double(), torch.ones(2, 1).double()
    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> _ = nn.init.zeros_(model.weight)
    >>> z = Replacement(0, 3 * x[0], a[0])  # G = 1 + 1, G' = 1 + (9 + 1)/2, ∇h = −1 and −2
    >>> found = metric_change(model, x, a, [z])
    >>> found.metric.item(), found.gradient.item(), found.velocity  # ½ − 1/6, 1/6, ½
    (0.333333333333, 0.166666666666, 0.5)
    """
    loss, n = resolve_loss(loss), len(x)
    targets, replacements = data_for(loss, model, x, targets, replacements, None)
    own = {"params": params, "mass": mass, "output_metric": output_metric, "scale": scale, "blocks": blocks}

    def on(points: Tensor, wanted: Tensor) -> tuple[ModelMetric, dict[str, Tensor]]:
        metric = ModelMetric(model, points, **own)
        return metric, metric.gradient(loss.gradient(metric.outputs, wanted.double()) / n)

    G, g = on(x, targets)
    velocity = G.solve(g)
    xs, ts = stack_twins(x, targets, replacements)
    parts = []
    for points, wanted in zip(xs[:, :n], ts[:, :n], strict=True):
        G_twin, g_twin = on(points, wanted)
        with_twin = G_twin.solve(g)
        replaced = G_twin.solve({name: g[name] - g_twin[name] for name in g})
        parts.append([_norm({name: velocity[name] - with_twin[name] for name in g}), _norm(replaced)])
    metric, replaced = torch.tensor(parts, dtype=torch.float64, device=x.device).T
    return MetricChange(metric, replaced, _norm(velocity))


def _norm(tree: Mapping[str, Tensor]) -> float:
    return sum(t.square().sum() for t in tree.values()).sqrt().item()
