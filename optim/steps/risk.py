"""The empirical risk h of any loss, and its gradient in the outputs, at parameters given by name."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import batch_size, call_model, flatten_outputs
from nt_kernel.capture.probe import split_state


def risk_at(
    model: nn.Module,
    params: Mapping[str, Tensor] | None,
    x,
    loss: Callable[[Tensor], Tensor],
    *,
    output: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """(h, r = ∂h/∂y [N, C]) at ``params`` (None: the model's own), one forward pass; float64, pure.

    ``loss`` takes what the model returns (``output`` of it, where given) to the losses of the samples [N], whose mean is
    h, or to h itself, a scalar. The model and the loss run in the model's dtype. Passes of hooks that record training
    (:class:`optim.Woodbury`) do not see this one. Raises ValueError/TypeError for a loss of another shape, or one that no
    gradient comes through.

    >>> y = torch.tensor([[1.0], [2.0]])
    >>> h, r = risk_at(nn.Identity(), {}, y, lambda y: 0.5 * y.square().sum(1))
    >>> h.item(), r.flatten().tolist()
    (1.25, [0.5, 1.0])
    """
    own, fixed = split_state(model)
    params = own if params is None else params
    with torch.no_grad():
        y = call_model(model, {**fixed, **params}, x)
        y = y if output is None else output(y)
    N = batch_size(x)
    flatten_outputs(y, N)  # says what is wrong with outputs that are no outputs
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        h = mean_loss(loss(y), N)
        if not h.requires_grad:
            raise ValueError("the loss does not depend on the model's outputs by any path that autograd can follow")
        (r,) = torch.autograd.grad(h, y)
    return h.detach().double(), flatten_outputs(r, N).double()


def mean_loss(value: Tensor, N: int) -> Tensor:
    """h of what a loss function returned: losses of N samples [N], or a scalar.

    >>> mean_loss(torch.tensor([1.0, 3.0]), 2).item()
    2.0
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss must return a tensor, the losses of the samples [N] or their mean; got {type(value).__name__}"
        )
    if value.dim() > 1 or (value.dim() == 1 and len(value) != N):
        raise ValueError(
            f"loss must return the losses of the {N} samples, [{N}], or their mean, a scalar; got shape {tuple(value.shape)}"
        )
    return value.mean()
