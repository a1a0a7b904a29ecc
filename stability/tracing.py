"""TracIn: what a replaced sample does to the outputs, as a sum of first-order steps along one recorded run.

G. Pruthi, F. Liu, S. Kale, M. Sundararajan, *Estimating Training Data Influence by Tracing Gradient Descent*, arXiv
2002.08484 (TracInCP), with outputs in the place of the test loss: every step of the S run is asked what it would have
added without the gradient of sample k and with that of z', and the answers are summed as if they did not act on the
steps after. It is the kernel-path recursion without its closed loop.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from nt_kernel.mass import Mass
from nt_kernel.metric.output_metric import OutputMetric
from stability.influence_functions import Effects, pulls
from stability.losses import Loss, PerSample

# θ_t by parameter name, and the lr of the step that is taken there (of all steps up to the next checkpoint, summed).
Checkpoint = tuple[Mapping[str, Tensor], float]


def tracin_path(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    others: Tensor,
    other_targets: Tensor,
    query: Tensor | None = None,
    *,
    checkpoints: Iterable[Checkpoint],
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    loss: "str | Loss | PerSample" = "squared",
) -> Iterator[Effects]:
    """The effects after each checkpoint, a generator: for every (k, z') and every point q

        y'_t(q) − y_t(q) ≈ −Σ_{s<t} (lr_s/n) J_{q,s} G_s⁻¹(J_{z',s}ᵀ r_{z',s} − J_{k,s}ᵀ r_{k,s}).

    Parameters
    ----------
    model, x, targets, others, other_targets, query, loss: as for :func:`stability.influence_functions.influence`.
    checkpoints: (params, lr) along the run on S: θ_t and the lr of the step taken there. A run kept at every tenth step is
        ten steps with the gradients of the first: lr is then their sum.
    mass, output_metric, scale, blocks: the metric G of the optimizer, as given to :class:`optim.Woodbury` (the preconditioned
        form). ``scale="none"`` at mass 1 is G = I, TracIn as published, for gradient descent.

    Cost: at every checkpoint one pass on all points and per layer a Gram matrix of all points with S and the others (plus one
    Cholesky of [np, np], unless scale="none").

    Raises ValueError/TypeError for data, checkpoints or options that do not fit, NumericalError.
    """
    total: Tensor | None = None
    for params, lr in checkpoints:
        if not 0 < lr < float("inf"):
            raise ValueError(f"a checkpoint is (params, lr) with lr > 0, got lr = {lr!r}")
        step = lr * pulls(
            model, x, targets, others, other_targets, query, params=params, mass=mass, output_metric=output_metric,
            scale=scale, blocks=blocks, loss=loss,
        )  # fmt: skip
        total = step if total is None else total + step
        yield Effects(total, len(x))


def tracin(
    model: nn.Module, x: Tensor, targets: Tensor, others: Tensor, other_targets: Tensor, *args, **options
) -> Effects:
    """The last of :func:`tracin_path`, with its arguments: the effects at the end of the run.

    Raises ValueError for an empty run, and what :func:`tracin_path` raises.

    >>> import torch
    >>> model = nn.Linear(1, 1, bias=False)
    >>> run = [({"weight": torch.tensor([[0.0]])}, 0.5), ({"weight": torch.tensor([[1.0]])}, 0.5)]  # y = w·x
    >>> x, z = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0]])
    >>> effects = tracin(model, x, torch.tensor([[1.0], [2.0]]), z, torch.zeros(1, 1), checkpoints=run, scale="none")
    >>> effects.replaced(0, 0)[0].item()  # −(0.5/2)·[(0 − (−1)) + (1 − 0)]
    -0.5
    """
    path = deque(tracin_path(model, x, targets, others, other_targets, *args, **options), maxlen=1)
    if not path:
        raise ValueError("checkpoints is empty: TracIn sums over the steps of a recorded run")
    return path.pop()
