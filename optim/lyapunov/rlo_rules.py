r"""What a Riemannian Lyapunov optimizer is made of: the memory Ψ, the direction Φ and their constants (arXiv 2601.22284).

Ψ turns gradients ĝ into a *signal* u, Φ turns the signal into the target direction d = Φ(u), which points downhill:

| memory Ψ | signal u | slots |
|---|---|---|
| "gradient" | ĝ | none |
| "ema" | m ← β₁m + (1 − β₁)ĝ, u = m | mean |
| "lion" | u = β₁m + (1 − β₁)ĝ with the old m, then m ← β₂m + (1 − β₂)ĝ | mean |
| "adam" | m ← β₁m + (1 − β₁)ĝ, s ← β₂s + (1 − β₂)ĝ², u = m̂/(√ŝ + ε), m̂ = m/(1 − β₁ᵗ), ŝ = s/(1 − β₂ᵗ) | mean, square |

| direction Φ | d |
|---|---|
| "identity" | −u |
| "tanh" | −tanh(u/scale) |
| "sign" | −sign(u) |
| "normalized" | −u/‖u‖, per parameter tensor |

All slots start at 0. The paper leaves Ψ, Φ, their constants and what "global normalisation" divides by unpublished; the
choices are ours, all of them in this file (``BETAS``, ``SCALE``, ``EPS``, the two tables, :func:`unit_norm`).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

BETAS = {"gradient": (0.0, 0.0), "ema": (0.9, 0.0), "lion": (0.9, 0.99), "adam": (0.9, 0.999)}
SCALE = 1e-2  # of tanh: u well above it moves by lr, u well below it as gradient descent with lr/scale
EPS = 1e-8
SLOTS = {"gradient": (), "ema": ("mean",), "lion": ("mean",), "adam": ("mean", "square")}
SHARED = ("gradient", "ema")  # memories whose signal is the gradient or a slot itself
DIRECTIONS = ("identity", "tanh", "sign", "normalized")

Tensors = list[Tensor]


def signal(
    memory: str,
    slots: Mapping[str, Tensors],
    gradients: Tensors,
    steps: Sequence[int],
    betas: tuple[float, float],
    eps: float = EPS,
) -> Tensors:
    """u of every parameter (the table above). ``slots`` move on in place; ``gradients`` are left as they are.

    ``steps`` counts each parameter's gradients, this one included. "gradient" returns ``gradients`` and "ema" a slot
    themselves (``SHARED``), to be read only; the others new tensors.

    >>> m = [torch.tensor([1.0])]
    >>> signal("lion", {"mean": m}, [torch.tensor([0.0])], [1], (0.5, 0.25)), m  # .5·1; .25·1
    ([tensor([0.5000])], [tensor([0.2500])])
    """
    beta1, beta2 = betas
    if memory == "gradient":
        return gradients
    mean = slots["mean"]
    if memory == "lion":
        u = list(torch._foreach_lerp(mean, gradients, 1 - beta1))
        torch._foreach_lerp_(mean, gradients, 1 - beta2)
        return u
    torch._foreach_lerp_(mean, gradients, 1 - beta1)
    if memory == "ema":
        return mean
    square = slots["square"]
    torch._foreach_mul_(square, beta2)
    torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)
    # m̂/(√ŝ + ε) with both bias corrections in the denominator: b₁·(√s/√b₂ + ε), bᵢ = 1 − βᵢᵗ
    b1 = [1 - beta1**t for t in steps]
    size = list(torch._foreach_sqrt(square))
    torch._foreach_mul_(size, [b / (1 - beta2**t) ** 0.5 for b, t in zip(b1, steps, strict=True)])
    torch._foreach_add_(size, [b * eps for b in b1])
    torch._foreach_reciprocal_(size)
    torch._foreach_mul_(size, mean)
    return size


def direction(
    phi: str | Callable[[Tensor], Tensor], signals: Tensors, scale: float = SCALE, *, overwrite: bool = False
) -> Tensors:
    """d = Φ(u) of every parameter, new tensors, or in the place of ``signals`` where these may be overwritten.

    A callable is applied to each u and must return d, the minus sign included.

    Raises ValueError where a callable returns another shape, dtype or device, TypeError where it returns no tensor.

    >>> direction("tanh", [torch.tensor([0.5])], scale=0.5)
    [tensor([-0.7616])]
    """
    if callable(phi):
        targets = [phi(u.clone()) for u in signals]
        for u, d in zip(signals, targets, strict=True):
            check_target(u, d)
        return targets
    if phi == "normalized":
        return [-u / _at_least_tiny(norm) for u, norm in zip(signals, torch._foreach_norm(signals), strict=True)]
    factor = -1 / scale if phi == "tanh" else -1.0
    if overwrite:
        d = signals
        torch._foreach_mul_(d, factor)
    else:
        d = list(torch._foreach_mul(signals, factor))
    if phi == "tanh":
        tanh_(d)
    elif phi == "sign":
        torch._foreach_sign_(d)
    return d


def tanh_(values: Tensors) -> None:
    """tanh in place, as 1/(1 + 2/e) with e = exp(2x) − 1 where torch's own is slow: single and double precision on the CPU.

    e is the library's ``expm1``, which keeps the relative accuracy near 0: within 4ε of tanh, relative, everywhere. Beyond
    |x| = 20 it is ±1 in both types, and e would overflow.

    >>> x = [torch.tensor([-1e-9, 0.5, 1e9], dtype=torch.float64)]
    >>> tanh_(x)
    >>> x[0] / torch.tensor([-1e-9, 0.46211715726000975, 1.0], dtype=torch.float64)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    if not all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) for x in values):
        return torch._foreach_tanh_(values)
    for x in values:  # one tensor after the other: it stays in the cache
        x.clamp_(-20.0, 20.0).mul_(2.0).expm1_().reciprocal_().mul_(2.0).add_(1.0).reciprocal_()


def check_target(u: Tensor, d) -> None:
    """Raise unless d is a tensor like u: what a user's Φ has to return."""
    if not isinstance(d, Tensor):
        raise TypeError(f"direction must return a tensor, got {type(d).__name__}")
    if (d.shape, d.dtype, d.device) != (u.shape, u.dtype, u.device):
        raise ValueError(
            f"direction must return what it was given in shape, dtype and device, {tuple(u.shape)}, {u.dtype}, {u.device}; "
            f"got {tuple(d.shape)}, {d.dtype}, {d.device}"
        )


def unit_norm(targets: Tensors) -> None:
    """Global normalisation, in place: d ← d/‖d‖, the norm over all of ``targets`` together; d = 0 stays 0.

    lr is then the length of a step of RLO-Λ, and what bounds that of RLO-Lifted.

    >>> d = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    >>> unit_norm(d)
    >>> d
    [tensor([0.6000]), tensor([0.0000, 0.8000])]
    """
    norms = [n.to(targets[0].device, torch.promote_types(n.dtype, torch.float32)) for n in torch._foreach_norm(targets)]
    norm = _at_least_tiny(torch.linalg.vector_norm(torch.stack(norms)))
    for d in targets:
        d.div_(norm.to(d.device))


def lift(velocities: Tensors, targets: Tensors, eta: float) -> None:
    """v ← (1 − η)v + ηd, in place.

    >>> v = [torch.tensor([1.0])]
    >>> lift(v, [torch.tensor([-3.0])], 0.25)
    >>> v
    [tensor([0.])]
    """
    torch._foreach_lerp_(velocities, targets, eta)


def _at_least_tiny(norm: Tensor) -> Tensor:
    return norm.clamp_min(torch.finfo(norm.dtype).tiny)
