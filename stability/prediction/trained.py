"""What predictions are held against: the same twins, trained."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nt_kernel.capture.probe import split_state
from nt_kernel.mass import Mass
from nt_kernel.metric.output_metric import OutputMetric
from optim.steps.direction import woodbury_step
from stability.losses import Loss, PerSample, resolve_loss
from stability.prediction.run import divergence_norms
from stability.prediction.stack import stacked_outputs
from stability.prediction.states import Divergence
from stability.replacement import Replacement, data_for, stack_twins


@torch.no_grad()
def trained_divergence(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    replacements: Sequence[Replacement],
    *,
    steps: int,
    lr: float,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    loss: "str | Loss | PerSample" = "squared",
    held_out: Tensor | None = None,
    group: int = 16,
) -> dict[str, Tensor]:
    """Train S and its twins, ``group`` of them as one stack; the suprema of their divergence along the run, each [R].

    "measured_sup", "measured_l2", "measured_replaced", "measured_others", "measured_heldout" as in ``TwinResult.pairs``, and
    nothing else of what :func:`stability.train_twins` looks at.

    >>> x, a = torch.eye(2), torch.ones(2, 1)
    >>> found = trained_divergence(nn.Linear(2, 1), x, a, [Replacement(0, x[0], a[0])], steps=5, lr=0.1)
    >>> found["measured_sup"]
    tensor([0.])
    """
    resolved = resolve_loss(loss)
    targets, replacements = data_for(resolved, model, x, targets, replacements, held_out)
    gradient, n = resolved.gradient, len(x)
    start, fixed = split_state(model)
    largest: dict[str, list[Tensor]] = {}
    for first in range(0, len(replacements), group):
        some = replacements[first : first + group]
        twin_x, twin_t = (
            torch.cat([own[None], twins[:, :n]])
            for own, twins in zip((x, targets), stack_twins(x, targets, some), strict=True)
        )
        k = torch.tensor([z.index for z in some], device=x.device)
        params = {name: p.expand(len(twin_x), *p.shape).clone() for name, p in start.items()}

        def output_gradients(y: Tensor, twin_t: Tensor = twin_t) -> Tensor:
            return gradient(y, twin_t) / n

        seen: dict[str, Tensor] = {}
        for t in range(steps + 1):
            y = stacked_outputs(model, params, fixed, x, shared=True)
            y_Q = None if held_out is None else stacked_outputs(model, params, fixed, held_out, shared=True)
            e = Divergence(y[1:] - y[0], y[1:, :1], None if y_Q is None else y_Q[1:] - y_Q[0])
            for name, value in divergence_norms(e, k).items():
                seen[name] = torch.maximum(seen[name], value) if name in seen else value
            if t < steps:
                params = woodbury_step(
                    model, params, twin_x, output_gradients, lr=lr, mass=mass, output_metric=output_metric, scale=scale,
                    blocks=blocks,
                )  # fmt: skip
        for name, value in seen.items():
            largest.setdefault(f"measured_{name}", []).append(value)
    return {name: torch.cat(values) for name, values in largest.items()}
