"""How large a step may be: lr·λ_max < 2, with λ_max bounded for free where theory does it, computed where it does not.

For a loss of curvature ∇²_y ℓ = ΛᵀΛ the linearised step e ← (I − lr·H ΛᵀΛ)e contracts only while lr·λ_max(ΛHΛᵀ) < 2. With
momentum b the two-term recursion does so only while lr·λ_max < 2(1 + b)/(1 − dampening), Nesterov's while
lr·λ_max < 2(1 + b)/(1 + 2b); decoupled weight decay w takes lr·w/2 of the room, Riemannian decay adds to λ_max.

**Derived** (every block α with its own lr, b, w). A mode zᵗ of the linearised recursion solves det(I + Σ φ_α(z) H_α) = 0 with
φ = lr(1 − dampening)z/((z − 1 + lr·w)(z − b)), for Nesterov lr((1 + b)z − b)/((z − 1 + lr·w)(z − b)). On the upper unit circle
all Im φ_α are negative (∝ −(1 − b(1 − lr·w)), resp. −(1 + b) + 2b·Re z − b²·lr·w), so that Σ φ_α v*H_αv = −1 is impossible;
growing lr from 0, stability therefore ends at z = −1, where −φ_α(−1) = g_α/(1 − lr·w/2), g_α = lr(1 − dampening)/(2(1 + b)),
resp. lr(1 + 2b)/(2(1 + b)): it holds exactly while λ_max(Σ_α H_α g_α/(1 − lr·w/2)) < 1 (and lr·w < 2).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError
from optim.steps.update import Update


class StepTooLargeError(ValueError):
    """lr·λ_max ≥ 2, or what momentum and weight decay make of it: the linearised step does not contract.

    ``limit`` is what lr has to stay below, 2/λ_max without these; ``formula`` how it came about.
    """

    def __init__(self, lr: float, limit: float, where: str = "", formula: str = "2/λ_max"):
        self.lr, self.limit, self.where, self.formula = lr, limit, where, formula
        super().__init__(
            f"{where + ': ' if where else ''}lr = {lr:g} is too large: the step needs lr < {formula} = {limit:.4g}; "
            f"write lr = {round_down(0.9 * limit):g} or less"
        )

    def __reduce__(self):  # the message is not the argument: a copy from another process is made from its parts
        return type(self), (self.lr, self.limit, self.where, self.formula)


def largest_product(update: Update) -> float:
    """What lr·λ_max has to stay below, weight decay apart: 2(1 + b)/(1 − dampening), with Nesterov 2(1 + b)/(1 + 2b).

    >>> largest_product(Update(0.1)), largest_product(Update(0.1, 0.5)), largest_product(Update(0.1, 0.5, nesterov=True))
    (2.0, 3.0, 1.5)
    """
    b = update.momentum  # without momentum torch's SGD has no buffer to dampen
    return product_limit(b, update.dampening if b else 0.0, update.nesterov)


def product_limit(momentum: float, dampening: float, nesterov: bool) -> float:
    """The x for which lr·λ_max < x contracts: 2(1 + b)/(1 − dampening), Nesterov 2(1 + b)/(1 + 2b); ∞ at dampening 1.

    >>> product_limit(0.5, 0.25, False), product_limit(0.5, 0.0, True)
    (4.0, 1.5)
    """
    room = 1 + 2 * momentum if nesterov else 1 - dampening
    return 2 * (1 + momentum) / room if room else float("inf")


def round_down(value: float) -> float:
    """The first digit of a positive number, for advice that must not round up past a limit.

    >>> round_down(0.0567), round_down(1.99)
    (0.05, 1.0)
    """
    digit, exponent = f"{value:.15e}".split("e")
    return float(f"{digit[0]}e{exponent}")


def joint_rates(
    updates: Mapping[str, Sequence[Update]], smallest: Mapping[str, float] | None = None
) -> tuple[dict[str, float], dict[str, float]] | None:
    """(weights, options) of a step whose blocks have their own hyperparameters, for :func:`checked_rate`; None at lr 0.

    ``updates`` are those of each block's parameters, ``smallest`` {block: μ} is needed for Riemannian decay. The weights
    g_α/max g ≤ 1 go with the kernels, Σ weight_α·H_α in the place of H (the largest g within a block counts for all of it,
    and the largest lr·weight_decay for all blocks: safe bounds); the options are ``lr`` of the fastest update, its
    ``limit``, ``decay`` and ``ridge``.

    >>> slow, fast = Update(0.1), Update(0.3, momentum=0.5)  # g = .05 and .1
    >>> joint_rates({"0": [slow], "2": [fast]})
    ({'0': 0.5, '2': 1.0}, {'lr': 0.3, 'limit': 3.0, 'decay': 0.0, 'ridge': 0.0})
    """
    gains = {block: max(u.lr / largest_product(u) for u in own) for block, own in updates.items()}
    top = max(gains.values())
    if top == 0:
        return None
    everyone = [u for own in updates.values() for u in own]
    fastest = max(everyone, key=lambda u: u.lr / largest_product(u))
    shrinking = max(u.lr * u.weight_decay if u.decay == "decoupled" else 0.0 for u in everyone)
    ridges = [
        u.lr / largest_product(u) * u.weight_decay / smallest[block]
        for block, own in updates.items()
        for u in own
        if u.decay == "riemannian" and u.weight_decay
    ]
    options = {
        "lr": fastest.lr,
        "limit": largest_product(fastest),
        "decay": shrinking / fastest.lr,
        "ridge": max(ridges, default=0.0) / top,
    }
    return {block: gain / top for block, gain in gains.items()}, options


def auto_lr(blocks: int, scale: str) -> float:
    """lr = 1/N for N metric blocks: half of the limit 2/N that λ_max(ΛHΛᵀ) ≤ N/(c·n) = N guarantees at scale "mean".

    Below the limit under any momentum, too: 2(1 + b) > 2 and 2(1 + b)/(1 + 2b) > 4/3.

    It needs a loss of curvature ΛᵀΛ ⪯ M: squared loss with M = I, cross-entropy with its own Gauss-Newton matrix.

    >>> auto_lr(4, "mean")
    0.25
    """
    if scale != "mean":
        raise ValueError(f'lr="auto" rests on λ_max ≤ N, which needs scale="mean"; with scale={scale!r} write a number')
    return 1 / blocks


def check_lr(lr: float | str) -> None:
    """Raises ValueError or TypeError unless lr is positive and finite, or "auto"."""
    if lr == "auto":
        return
    if isinstance(lr, bool) or not isinstance(lr, int | float | Tensor):
        raise TypeError(f'lr must be a positive number or "auto", got {lr!r}')
    if not 0 < float(lr) < float("inf"):
        raise ValueError(f'lr must be positive and finite, or "auto"; got {float(lr)!r}')


def checked_rate(
    lr: float,
    bound: float,
    matrix: Callable[[], Tensor] | None,
    where: str = "",
    *,
    limit: float = 2.0,
    decay: float = 0.0,
    ridge: float = 0.0,
    rate: str = "λ_max",
) -> float:
    """A bound on λ_max that allows ``lr``: ``bound`` where it does, else the Frobenius norm of ``matrix()``, else λ_max.

    ``matrix`` is a function, called only when the bound does not suffice; it returns symmetric matrices [..., P, P].
    Allowed is lr·(λ/limit + decay/2) < 1: ``limit`` of :func:`largest_product`, ``decay`` the decoupled weight decay.
    ``ridge`` bounds what Riemannian decay adds, weight_decay/μ: λ is max(bound, ridge), or λ(matrix) + ridge. ``rate`` is what
    the message calls λ_max.
    Raises :class:`StepTooLargeError`, naming 2/λ_max, where none allows it; NumericalError for kernels that are not finite.

    **Derived** (ridge, scale "mean"). With C ⪯ N·blockdiag(c·J_αᵀMJ_α) the curvature C + wI of h + ½w‖θ‖² is at most
    max(N, w/μ)·G.

    >>> checked_rate(0.1, 3.0, None)
    3.0
    >>> checked_rate(0.1, float("inf"), lambda: torch.eye(2) * 30)
    Traceback (most recent call last):
    optim.steps.step_limit.StepTooLargeError: lr = 0.1 is too large: the step needs lr < 2/λ_max = 0.06667; ...
    """

    def allows(value: float) -> bool:
        return lr * (value / limit + decay / 2) < 1

    bound = max(bound, ridge)
    if allows(bound):
        return bound
    matrices = matrix()
    if not bool(torch.isfinite(matrices).all()):
        raise NumericalError("the kernel is not finite (did training diverge?)", where=where)
    largest = matrices.flatten(-2).norm(dim=-1).max().item() + ridge  # ‖·‖_F ≥ λ_max
    if not allows(largest):
        largest = torch.linalg.eigvalsh(matrices)[..., -1].max().item() + ridge
    if not allows(largest):
        formula = f"{limit:g}/{rate}" if decay == 0 else f"1/({rate}/{limit:g} + {decay:g}/2)"
        raise StepTooLargeError(lr, lr_limit(largest, limit, decay), where, formula)
    return largest


def lr_limit(largest: float, limit: float = 2.0, decay: float = 0.0) -> float:
    """The lr at which lr·(λ_max/limit + decay/2) is 1; inf where nothing limits it.

    >>> lr_limit(4.0), lr_limit(4.0, limit=3.8), lr_limit(0.0)
    (0.5, 0.95, inf)
    """
    rate = largest / limit + decay / 2
    return 1 / rate if rate > 0 else float("inf")
