"""How a direction moves a parameter: learning rate, momentum, weight decay. Pure; leading dimensions are stacked networks."""

from dataclasses import dataclass
from numbers import Real

import torch  # noqa: F401 (the examples use it)
from torch import Tensor

from nt_kernel.errors import unknown_name

DECAYS = ("decoupled", "riemannian")


@dataclass(frozen=True)
class Update:
    """One group's hyperparameters. With d = G⁻¹g in the place of the gradient they are those of ``torch.optim.SGD``:

        v ← momentum·v + (1 − dampening)·d (at first v = d),   θ ← θ − lr·v,   with ``nesterov`` θ ← θ − lr·(d + momentum·v).

    decay="decoupled": θ ← (1 − lr·weight_decay)·θ before that, as ``torch.optim.AdamW`` (Loshchilov & Hutter,
    arXiv 1711.05101). decay="riemannian": weight_decay·θ is added to g before G⁻¹, the metric's gradient of
    h + ½·weight_decay·‖θ‖² (:func:`decayed_gradient`); with G = I that is what SGD calls weight decay.

    Raises TypeError for what is no number, ValueError for momentum or dampening outside [0, 1), a negative or infinite
    weight decay or lr, an unknown decay, Nesterov without momentum or with dampening.

    >>> Update(0.1, momentum=1.0)
    Traceback (most recent call last):
    ...
    ValueError: momentum must be in [0, 1), got 1.0
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: str = "decoupled"

    def __post_init__(self):
        for name, most in (("lr", None), ("momentum", 1), ("dampening", 1), ("weight_decay", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value < (float("inf") if most is None else most):
                raise ValueError(f"{name} must be in [0, {'∞' if most is None else most}), got {value!r}")
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov must be True or False, got {self.nesterov!r}")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening = 0, "
                f"got momentum={self.momentum!r}, dampening={self.dampening!r}"
            )
        if self.decay not in DECAYS:
            raise ValueError(unknown_name("decay", self.decay, DECAYS))


def moved(p: Tensor, direction: Tensor, buffer: Tensor | None, update: Update) -> tuple[Tensor, Tensor | None]:
    """(θ, v) after one step along ``direction`` (:class:`Update`), new tensors of the shape of p; v is None without momentum.

    ``buffer`` is the v of the step before, None at the first. Bit for bit ``torch.optim.SGD``'s (not fused) without decay.

    >>> heavy_ball = Update(0.5, momentum=0.5)
    >>> p, v = moved(torch.tensor([4.0]), torch.tensor([2.0]), None, heavy_ball)  # 4 − .5·2
    >>> moved(p, torch.tensor([2.0]), v, heavy_ball)  # v = .5·2 + 2
    (tensor([1.5000]), tensor([3.]))
    """
    if update.momentum:
        buffer = (
            direction.clone()
            if buffer is None
            else (buffer * update.momentum).add(direction, alpha=1 - update.dampening)
        )
        direction = direction.add(buffer, alpha=update.momentum) if update.nesterov else buffer
    if update.weight_decay and update.decay == "decoupled":
        p = p * (1 - update.lr * update.weight_decay)
    return p.sub(direction, alpha=update.lr), buffer


def decayed_gradient(g: Tensor, p: Tensor, update: Update) -> Tensor:
    """g + weight_decay·θ for decay="riemannian", else g: what the inverse metric is applied to.

    >>> decayed_gradient(torch.tensor([1.0]), torch.tensor([2.0]), Update(0.1, weight_decay=0.5, decay="riemannian"))
    tensor([2.])
    """
    return g.add(p, alpha=update.weight_decay) if update.weight_decay and update.decay == "riemannian" else g
