"""First-order rules for stacked training: what moves one network, given its gradient; ``stacked_step`` maps them over K.

A rule is a function (parameters, gradients, memory, step) → (parameters, memory) of one network, pure, in operations that
``torch.func.vmap`` follows. ``memory`` is {what: {parameter: tensor}}, empty before the first step; ``step`` counts the steps
taken, an int. Being mapped, a rule may take norms over all its parameters without mixing networks.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from optim.steps.update import Update, decayed_gradient, moved

Parameters = Mapping[str, Tensor]
Memory = Mapping[str, Mapping[str, Tensor]]
Rule = Callable[[Parameters, Parameters, Memory, int], tuple[Parameters, Memory]]


def gradient_descent(
    lr: float,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: str = "decoupled",
) -> Rule:
    """θ ← θ − lr·v with v ← momentum·v + (1 − dampening)·∇h, as ``torch.optim.SGD``; the options of :class:`optim.Woodbury`.

    ``decay="riemannian"``, the gradient of ½·weight_decay·‖θ‖² added to ∇h, is what torch calls weight decay of SGD.

    >>> rule = gradient_descent(0.1, momentum=0.5)
    >>> params, gradients = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
    >>> params, memory = rule(params, gradients, {}, 0)  # 1 − .1·2
    >>> params, memory = rule(params, gradients, memory, 1)  # .8 − .1·(.5·2 + 2)
    >>> params["w"].item()
    0.5
    """
    update = Update(lr, momentum, dampening, nesterov, weight_decay, decay)

    def rule(params: Parameters, gradients: Parameters, memory: Memory, step: int):
        gradients = {name: decayed_gradient(g, params[name], update) for name, g in gradients.items()}
        return move_all(params, gradients, memory, update)

    return rule


def adam(
    lr: float = 1e-3, *, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
) -> Rule:
    """θ ← (1 − lr·weight_decay)·θ − lr·m̂/(√v̂ + ε), m̂ and v̂ the bias-corrected means of ∇h and ∇h² (``torch.optim.AdamW``).

    Kingma & Ba, arXiv 1412.6980; the decay of Loshchilov & Hutter, arXiv 1711.05101.

    >>> params, memory = adam(0.1)({"w": torch.tensor([1.0])}, {"w": torch.tensor([-7.0])}, {}, 0)
    >>> params["w"].item()  # the first step is lr, whatever the gradient
    1.1...
    """
    for what, value, least, most in (
        ("lr", lr, 0, float("inf")),
        ("betas[0]", betas[0], 0, 1),
        ("betas[1]", betas[1], 0, 1),
        ("eps", eps, 0, float("inf")),
        ("weight_decay", weight_decay, 0, float("inf")),
    ):
        if isinstance(value, bool) or not isinstance(value, Real) or not least <= value < most:
            raise ValueError(f"{what} must be a number in [{least}, {most}), got {value!r}")

    def rule(params: Parameters, gradients: Parameters, memory: Memory, step: int):
        t, (b1, b2) = step + 1, betas
        out, mean, square = {}, {}, {}
        for name, g in gradients.items():
            m, v = (memory[key][name] if memory else torch.zeros_like(g) for key in ("mean", "square"))
            mean[name] = b1 * m + (1 - b1) * g
            square[name] = b2 * v + (1 - b2) * g.square()
            size = (square[name] / (1 - b2**t)).sqrt() + eps
            out[name] = (1 - lr * weight_decay) * params[name] - lr / (1 - b1**t) * mean[name] / size
        return out, {"mean": mean, "square": square}

    return rule


def move_all(
    params: Parameters, directions: Parameters, memory: Memory, update: Update
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Every parameter moved along its direction (:func:`optim.steps.update.moved`), its buffer in ``memory["momentum"]``."""
    out, buffers, held = {}, {}, memory.get("momentum", {})
    for name, p in params.items():
        out[name], buffer = moved(p, directions[name].to(p.dtype), held.get(name), update)
        if buffer is not None:
            buffers[name] = buffer
    return out, {"momentum": buffers} if buffers else {}
