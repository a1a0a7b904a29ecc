"""``predict_twins``: every twin's outputs, on training and held-out points, from one run on S; no twin is trained."""

from collections.abc import Callable, Sequence
from copy import deepcopy

from torch import Tensor, nn

from nt_kernel.mass import Mass
from nt_kernel.metric.output_metric import OutputMetric
from optim.steps.step_limit import check_lr
from stability.losses import Loss, PerSample
from stability.prediction.run import Prediction, TwinPredictor
from stability.prediction.strided import STRIDE
from stability.replacement import Replacement

__all__ = ["Prediction", "TwinPredictor", "predict_twins"]


def predict_twins(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    candidates: Sequence[Replacement],
    *,
    steps: int = 200,
    lr: float | str = 0.1,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    loss: "str | Loss | PerSample" = "squared",
    held_out: Tensor | None = None,
    method: str = "parameter-path",
    cg_steps: int = 2,
    stride: int = STRIDE,
    memory_limit: int | None = None,
) -> Prediction:
    """Train once on S by full-batch Riemannian descent, θ ← θ − lr·G⁻¹∇h, and predict every twin S^(k→z) on the way.

    A twin's step is −(lr/n)D⁻¹J'ᵀv'_α with v'_α = r' − c·L'ᵀ(I + cL'K'_αL'ᵀ)⁻¹L'K'_αr' on S'. All candidates share one
    factorisation per step and block; each rebuilds it on its own data by a rank-2p update (``docs/prediction.md``).

    Parameters
    ----------
    model: its parameters are the shared initialisation; it is not changed. x, targets, candidates, held_out, steps, lr, mass,
        output_metric, scale, blocks: as for :func:`stability.train_twins`.
    loss: "squared" (½‖y − a‖²), "mse", "cross_entropy", "logistic", "huber", or a convex function (y, a) → losses [N]
        (:func:`stability.resolve_loss`).
    method: "kernel-path": first order, every Jacobian at the parameters of the S run, output space only, the cheapest.
        "parameter-path": the twins' parameters are followed and J' is taken there; only the inner inverse is the rebuilt
        one of the S run, bettered by ``cg_steps`` conjugate gradient steps. "cg": the same to a residual of 1e-12, which is
        the trained twin to rounding. "strided-path", the fast one: the parameter path looked at only now and then, with up to
        ``stride`` steps between looks taken at once (``stability.prediction.strided``); suprema are over the looks. All
        are exact for models linear in θ with M constant.
    memory_limit: bytes beyond the model's and the data's (default 2 GiB); the candidates go through in groups that keep to it.

    Raises ValueError/TypeError for bad input, ``StepTooLargeError`` for a step that the S run does not bear,
    NumericalError where the arithmetic fails or a prediction diverges.

    >>> import torch
    >>> model = nn.Linear(2, 1).double()
    >>> x, a = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    >>> z = Replacement(0, torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    >>> from stability.twins import train_twins
    >>> trained = train_twins(model, x, a, [z], steps=20).pairs[0]["measured_sup"]
    >>> abs(predict_twins(model, x, a, [z], steps=20).pairs[0]["predicted_sup"] - trained) < 1e-12
    True
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int >= 1, got {steps!r}")
    check_lr(lr)
    model = deepcopy(model)
    predictor = TwinPredictor(
        model, x, targets, candidates, mass=mass, output_metric=output_metric, scale=scale, blocks=blocks, loss=loss,
        held_out=held_out, method=method, cg_steps=cg_steps, stride=stride, steps=steps, memory_limit=memory_limit,
    )  # fmt: skip
    step = predictor.auto_lr() if lr == "auto" else float(lr)
    parameters = dict(model.named_parameters())
    for _ in range(steps):
        for name, direction in predictor.advance(step).items():
            parameters[name].data.sub_(direction, alpha=step)
    return predictor.result()
