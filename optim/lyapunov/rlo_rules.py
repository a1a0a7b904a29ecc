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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nt_kernel.errors import unknown_name

BETAS = {"gradient": (0.0, 0.0), "ema": (0.9, 0.0), "lion": (0.9, 0.99), "adam": (0.9, 0.999)}
SCALE = 1e-2  # of tanh: u well above it moves by lr, u well below it as gradient descent with lr/scale
EPS = 1e-8
SLOTS = {"gradient": (), "ema": ("mean",), "lion": ("mean",), "adam": ("mean", "square")}
ENTRYWISE = ("identity", "tanh", "sign")
DIRECTIONS = (*ENTRYWISE, "normalized")

Tensors = list[Tensor]
BLOCK = 2**18  # entries at once: few calls, and a sum of squares in float32 keeps its digits (of 2²⁴ it loses 1e-3)


@dataclass(frozen=True)
class Room:
    """Memory for one tensor per parameter, next to each other: what is done entry by entry is done once per block.

    ``blocks``, flat, are the entries of ``tensors``, each once.

    >>> room = Room.like([torch.zeros(2, 2), torch.zeros(3)])
    >>> room.blocks[0].copy_(torch.arange(7.0))
    tensor([0., 1., 2., 3., 4., 5., 6.])
    >>> room.tensors
    [tensor([[0., 1.],
            [2., 3.]]), tensor([4., 5., 6.])]
    """

    tensors: Tensors
    blocks: Tensors

    @classmethod
    def like(cls, params: Sequence[Tensor]) -> "Room":
        """Room for tensors of the shapes, strides, types and devices of ``params``; what it holds is not set."""
        kinds: dict[tuple, list[int]] = {}
        for i, p in enumerate(params):
            kinds.setdefault((p.dtype, p.device), []).append(i)
        tensors, blocks = {}, []
        for (dtype, device), members in kinds.items():
            flat, start = torch.empty(sum(params[i].numel() for i in members), dtype=dtype, device=device), 0
            for i in members:
                p = params[i]
                strides = torch.empty_like(p, device="meta").stride()  # dense, in the order of p's
                tensors[i] = flat.as_strided(p.shape, strides, start)
                start += p.numel()
            blocks += flat.split(BLOCK)
        return cls([tensors[i] for i in range(len(params))], blocks)

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether it is room for these."""
        return len(params) == len(self.tensors) and all(
            (t.shape, t.dtype, t.device) == (p.shape, p.dtype, p.device)
            for t, p in zip(self.tensors, params, strict=True)
        )


def signal(
    memory: str,
    slots: Mapping[str, Tensors],
    gradients: Tensors,
    steps: Sequence[int],
    betas: tuple[float, float],
    eps: float = EPS,
    *,
    times: float = 1.0,
    room: "Room | None" = None,
) -> Tensors:
    """``times``·u of every parameter (the table above) in ``room``. ``slots`` move on in place; ``gradients`` stay.

    ``steps`` counts each parameter's gradients, this one included. ``room`` is what to write to, a new one where none is
    given.

    >>> m = [torch.tensor([1.0])]
    >>> signal("lion", {"mean": m}, [torch.tensor([0.0])], [1], (0.5, 0.25)), m  # .5·1; .25·1
    ([tensor([0.5000])], [tensor([0.2500])])
    """
    beta1, beta2 = betas
    room = Room.like(gradients) if room is None else room
    out = room.tensors
    if memory == "gradient":
        return _written("mul", gradients, times, out=out)
    mean = slots["mean"]
    if memory == "lion":
        _written("lerp", mean, gradients, 1 - beta1, out=out)
        if times != 1:
            torch._foreach_mul_(out, times)
        torch._foreach_lerp_(mean, gradients, 1 - beta2)
        return out
    torch._foreach_lerp_(mean, gradients, 1 - beta1)
    if memory == "ema":
        return _written("mul", mean, times, out=out)
    square = slots["square"]
    torch._foreach_mul_(square, beta2)
    torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)
    # m̂/(√ŝ + ε) with both bias corrections and ``times`` in the denominator: (b₁/times)·(√s/√b₂ + ε), bᵢ = 1 − βᵢᵗ
    b1 = [(1 - beta1**t) / times for t in steps]
    of_root = [b / (1 - beta2**t) ** 0.5 for b, t in zip(b1, steps, strict=True)]
    if _on_cpu(out):
        _written("sqrt", square, out=out)
        parts = zip(out, b1, of_root, strict=True)
        if len(set(steps)) == 1:
            parts = ((x, b1[0], of_root[0]) for x in room.blocks)
        for x, b, a in parts:
            torch.add(torch.tensor(b * eps, dtype=x.dtype), x, alpha=a, out=x)
        for m, o in zip(mean, out, strict=True):
            torch.div(m, o, out=o)
    else:  # a quotient: the reciprocal of a small ε is ∞ in half precision, and ∞·0 no 0
        size = torch._foreach_sqrt(square)
        torch._foreach_mul_(size, of_root)
        torch._foreach_add_(size, [b * eps for b in b1])
        torch._foreach_zero_(out)
        torch._foreach_addcdiv_(out, mean, size)
    return out


def factor(phi: str, scale: float = SCALE) -> float:
    """What u is multiplied with before Φ is :func:`bend`: −2/scale for tanh, −1."""
    return -2 / scale if phi == "tanh" else -1.0


def too_small(
    phi: str | Callable, dtype: torch.dtype, *, scale: float, memory: str, betas: tuple[float, float], eps: float
) -> str | None:
    """ "scale" or "eps" where that is so small that in ``dtype`` a zero gradient gives 0·∞ or 0/0 instead of 0, else None.

    2/scale of tanh must be finite there, and with the memory "adam" the least denominator of m̂/(√ŝ + ε), that of a first
    step, (1 − β₁)·ε, for tanh times scale/2, not 0 (unless ε is, which asks for it).

    >>> adam = {"memory": "adam", "betas": (0.9, 0.999), "eps": 1e-8}
    >>> [too_small("tanh", torch.float32, scale=s, **adam) for s in (1e-2, 1e-37, 1e-40)]
    [None, 'scale', 'scale']
    >>> too_small("identity", torch.float16, scale=1e-2, **adam)
    'eps'
    """
    times = 1.0 if callable(phi) else abs(factor(phi, scale))
    if not _rounded(times, dtype).isfinite():
        return "scale"
    least = (1 - betas[0]) * eps
    if memory != "adam" or eps == 0 or _rounded(least / times, dtype) > 0:
        return None
    return "eps" if _rounded(least, dtype) == 0 else "scale"


def bend(phi: str, signals: Tensors) -> None:
    """Φ in place, of signals that have been multiplied with its :func:`factor`.

    >>> d = [torch.tensor([0.5]) * factor("tanh", scale=0.5)]
    >>> bend("tanh", d)
    >>> d
    [tensor([-0.7616])]

    Raises ValueError for an unknown name. All but "normalized" act on each entry alone (``ENTRYWISE``).
    """
    if phi not in DIRECTIONS:
        raise ValueError(unknown_name("direction", phi, DIRECTIONS))
    if phi == "tanh":
        tanh_of_half_(signals)
    elif phi == "sign":
        torch._foreach_sign_(signals)
    elif phi == "normalized":
        _divide_by_norms(signals, together=False)


def own_direction(phi: Callable[[Tensor], Tensor], signals: Tensors) -> Tensors:
    """d = phi(u) of every parameter, the minus sign included, by a function of the user's, in tensors of our own.

    Raises ValueError where it returns another shape, dtype or device, TypeError where it returns no tensor.
    """
    targets = [phi(u.clone()) for u in signals]
    for u, d in zip(signals, targets, strict=True):
        check_target(u, d)
    return [d.clone() for d in targets]  # normalisation divides in place, and what came may be kept, or come twice


def tanh_of_half_(values: Tensors) -> None:
    """tanh(y/2) in place, as e/(e + 2) with e = exp(y) − 1 where torch's own is slow: single and double precision on the CPU.

    e is the library's ``expm1``, which keeps the relative accuracy near 0: within 4ε of tanh, relative, everywhere. From
    |y| = 40 on it is ±1 in both types, and e would overflow, or be slow on its way to −1.

    >>> y = [torch.tensor([-2e-9, 1.0, 1e9], dtype=torch.float64)]
    >>> tanh_of_half_(y)
    >>> y[0] / torch.tensor([-1e-9, 0.46211715726000975, 1.0], dtype=torch.float64)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    if not (_on_cpu(values) and all(x.dtype in (torch.float32, torch.float64) for x in values)):
        torch._foreach_mul_(values, 0.5)
        torch._foreach_tanh_(values)
        return
    for x in values:  # one tensor after the other: it stays in the cache
        x.clamp_(-40.0, 40.0).expm1_()
        x.div_(x + 2.0)


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

    lr is then the length of a step of RLO-Λ, and what bounds that of RLO-Lifted. Right at every size that the types hold,
    where squares under- or overflow too; an infinite or undefined entry leaves nan.

    >>> d = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    >>> unit_norm(d)
    >>> d
    [tensor([0.6000]), tensor([0.0000, 0.8000])]
    >>> d = [torch.tensor([3e-30]), torch.tensor([0.0, 4e-30])]
    >>> unit_norm(d)
    >>> d
    [tensor([0.6000]), tensor([0.0000, 0.8000])]
    """
    _divide_by_norms(targets, together=True)


def _divide_by_norms(targets: Tensors, *, together: bool) -> None:
    """d ← d/‖d‖ in place, ‖·‖ of all targets ``together`` or of each of them; taken in float32 at least. 0 stays 0."""
    targets = [d for d in targets if d.numel()]
    if not targets:
        return
    wide = torch.float64 if any(d.dtype == torch.float64 for d in targets) else torch.float32
    if _on_cpu(targets):
        norms = _norms(targets, wide, together)
        # Sums of squares between √tiny and 1/√tiny: none has overflowed, and what underflowed in them is below rounding.
        least = torch.finfo(wide).tiny ** 0.25
        if all(least < norm < 1 / least for norm in norms.tolist()):
            torch._foreach_div_(targets, norms.tolist())
            return
    # Out of range, or where asking would wait for the device: first by a power of two, to a largest entry in [½, 1).
    peaks = torch.stack([d.abs().amax().to(targets[0].device, wide) for d in targets])
    if together:
        peaks = peaks.amax().expand(len(targets))
    exponents = torch.where(peaks.isfinite(), torch.frexp(peaks).exponent, 0)
    for half in (exponents // 2, exponents - exponents // 2):  # 2¹⁴⁹, the inverse of float32's smallest, is ∞ there
        for d, power in zip(targets, half.unbind(), strict=True):
            # Where 2^most is too little, the peak is another type's and smaller than all this one holds: d = 0, not 0·∞.
            most = math.frexp(torch.finfo(d.dtype).max)[1] - 1
            d.mul_(torch.exp2(-power.clamp(min=-most).to(wide)).to(d.device, d.dtype))
    norms = _norms(targets, wide, together)
    for d, norm in zip(targets, torch.where(norms == 0, 1, norms).unbind(), strict=True):
        d.div_(norm.to(d.device))


def _norms(tensors: Tensors, dtype: torch.dtype, together: bool) -> Tensor:
    """‖d‖ of each tensor, or of all together the same number for each, on the first one's device."""
    norms = torch.stack([n.to(tensors[0].device, dtype) for n in torch._foreach_norm(tensors, dtype=dtype)])
    return torch.linalg.vector_norm(norms).expand(len(tensors)) if together else norms


def lift(velocities: Tensors, targets: Tensors, eta: float) -> None:
    """v ← (1 − η)v + ηd, in place.

    >>> v = [torch.tensor([1.0])]
    >>> lift(v, [torch.tensor([-3.0])], 0.25)
    >>> v
    [tensor([0.])]
    """
    torch._foreach_lerp_(velocities, targets, eta)


def _rounded(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).to(dtype)


def _on_cpu(tensors: Tensors) -> bool:
    return all(x.device.type == "cpu" for x in tensors)


def _written(operation: str, sources: Tensors, *more: float | Tensors, out: Tensors) -> Tensors:
    """``out`` ← operation(sources, …), one pass; where launching kernels costs more than a pass, a copy and then in place."""
    if _on_cpu(out):
        act = getattr(torch, operation)
        for i, (x, o) in enumerate(zip(sources, out, strict=True)):
            act(x, *(a[i] if isinstance(a, list) else a for a in more), out=o)
    else:
        torch._foreach_copy_(out, sources)
        getattr(torch, f"_foreach_{operation}_")(out, *more)
    return out
