"""Output gradients ∇_y ℓ of the convex losses that twins are predicted for."""

from collections.abc import Callable

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name

OutputGradient = Callable[[Tensor, Tensor], Tensor]  # (y, a), both [..., N, p] → ∇_y ℓ [..., N, p]


def output_gradient(loss: "str | OutputGradient") -> OutputGradient:
    """∇_y ℓ(y, a) of the loss of one sample, by name, or a function of the user's own.

    - "squared", ½‖y − a‖²: y − a;
    - "cross_entropy", −Σ a_c log softmax(y)_c, a one-hot or any distribution: softmax(y) − a;
    - "logistic", Σ log(1 + e^{y_c}) − a_c y_c: 1/(1 + e^{−y}) − a;
    - "huber", threshold 1, coordinate by coordinate: y − a cut to [−1, 1].

    A callable takes y and a [..., N, p] and returns ∇_y ℓ of that shape. Raises ValueError for an unknown name, TypeError
    for anything else.

    >>> output_gradient("huber")(torch.tensor([3.0, 0.5]), torch.zeros(2))
    tensor([1.0000, 0.5000])
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a function (y, a) -> ∇_y ℓ, got {type(loss).__name__}")
    if loss not in GRADIENTS:
        raise ValueError(unknown_name("loss", loss, GRADIENTS))
    return GRADIENTS[loss]


GRADIENTS: dict[str, OutputGradient] = {
    "squared": lambda y, a: y - a,
    "cross_entropy": lambda y, a: y.softmax(-1) - a,
    "logistic": lambda y, a: torch.sigmoid(y) - a,
    "huber": lambda y, a: (y - a).clamp(-1, 1),
}
