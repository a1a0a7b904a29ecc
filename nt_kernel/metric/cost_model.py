"""What an inner system costs to solve, and the rule that chooses between Cholesky and conjugate gradients (CG).

Cholesky forms K and factorises S, once. CG costs one product v ↦ Kv a step, and only the run itself tells how many steps
a residual needs: the eigenvalues of P⁻¹S decide, and what bounds them cheaply (traces) is off by ten. So nothing is
predicted about the spectrum. CG runs on a budget, the price of Cholesky in steps (:func:`cholesky_in_steps`), and makes
way once the rest of the run looks more expensive than Cholesky would be from here (:func:`too_slow`): renting skis until
the rent has come near their price. ``python -m benchmarks solver`` holds the rule against the times of both solvers.

Prices are sums of work over speed, fitted to 132 layers (CPU seconds of one thread, float32 and float64, sizes 8 … 2560;
nine in ten were met within 30 %, and four in five of 33 to which the preconditioner's set-up was fitted anew). Only their
ratios count, and they are constants rather than measurements of the moment, so that the same numbers always take the same
way. GPUs were not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, log10

import torch

from nt_kernel.metric.preconditioner import SAMPLED
from nt_kernel.products.forms import Decoupled, Flat, Outer, Weighted
from nt_kernel.products.positions import Positions, route_costs
from nt_kernel.products.tiles import Form

# float32: multiplications a second of Gram matrices, of Cholesky factorisations and of the products of a CG step; numbers
# a second that a CG step reads.
GRAM_SPEED, CHOLESKY_SPEED, PRODUCT_SPEED, READ_SPEED = 8e10, 2.3e10, 2.7e10, 3.4e10
# Seconds for each entry of S (formed, copied, shifted, solved with), for each entry of the preconditioner (factorised
# once; solved with at each step), for each number read to form the means and blocks that it is made of, and for the calls.
PER_ENTRY, SETUP_PER_ENTRY, STEP_PER_ENTRY, PER_BLOCK = 8.5e-9, 1.7e-8, 6e-10, 8.5e-11
CHOLESKY_CALLS, SETUP_CALLS, STEP_CALLS = 2.4e-4, 5e-4, 3.2e-4
# float64 moves and multiplies half as many numbers a second, large products a quarter (``nt_kernel.products.dense``).
DOUBLE, DOUBLE_GRAM = 2.0, 4.0
# Below this size nothing is as fast as Cholesky: not even looking for it.
SMALL = 128
# CG shows how fast it converges after this part of the budget; no verdict earlier, and none later than 1.5 budgets.
PATIENCE, LAST = 0.25, 1.5


@dataclass(frozen=True)
class Work:
    """Of one network: multiplications and numbers read by one product Kv, and multiplications that form K."""

    product: float = 0.0
    read: float = 0.0
    gram: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.product + other.product, self.read + other.read, self.gram + other.gram)


def work_of(form: Form) -> Work:
    """The work of one form on its own points; shapes alone decide. A Gram matrix is symmetric: half the products.

    >>> work_of(Outer(torch.zeros(128, 256), torch.zeros(128, 10, 256)))
    Work(product=8388608.0, read=655360.0, gram=209715200.0)
    """
    if isinstance(form, Decoupled):
        N, d = form.inputs.shape[-2:]
        return Work(2 * N * form.outputs * min(N, d), N * d, N**2 * d / 2)
    if isinstance(form, Flat):
        N, C, P = form.jacobian.shape[-3:]
        return Work(0, 2 * N * C * P, (N * C) ** 2 * P / 2)
    if isinstance(form, Outer):
        (N, C, o), d = form.deltas.shape[-3:], form.inputs.shape[-1]
        return Work(float(2 * N * o * min(N, d)), float(2 * N * C * o), (N * C) ** 2 * o / 2)
    N, C, T, o = form.deltas.shape[-4:]
    d = form.weights.shape[-1] if isinstance(form, Weighted) else form.width
    lookup = isinstance(form, Positions) and form.vocabulary > 0
    routes = route_costs(N, N, C, T, T, o, d, lookup)
    gram = routes["summed"] if isinstance(form, Weighted) else min(routes.values())
    return Work(0 if lookup else 2 * N * T * o * d, 2 * N * C * T * o, gram / 2)


def cholesky_in_steps(forms: Sequence[Form], rows: int, N: int, dtype: torch.dtype, networks: int = 1) -> float:
    """The time of one Cholesky solve of S [rows, rows], K formed, in CG steps; what CG takes to start is deducted.

    ``N`` samples are the size of CG's preconditioner (``nt_kernel.metric.preconditioner``), ``networks`` a stack's height.

    >>> layer = Outer(torch.zeros(128, 256), torch.zeros(128, 10, 256))
    >>> round(cholesky_in_steps([layer], 1280, 128, torch.float32))
    47
    >>> layer = Outer(torch.zeros(16, 256), torch.zeros(16, 10, 256))
    >>> round(cholesky_in_steps([layer], 160, 16, torch.float32))
    0
    """
    work = sum((work_of(form) for form in forms), Work())
    double, outputs = dtype == torch.float64, rows / N
    slower, gram_speed = networks * (DOUBLE if double else 1.0), GRAM_SPEED * (DOUBLE / DOUBLE_GRAM if double else 1.0)
    cholesky = work.gram / gram_speed + rows**3 / 6 / CHOLESKY_SPEED + rows**2 * PER_ENTRY
    setup = work.read * (1 + outputs * min(1, SAMPLED / N)) * PER_BLOCK + N**2 * SETUP_PER_ENTRY
    step = work.product / PRODUCT_SPEED + work.read / READ_SPEED + N**2 * STEP_PER_ENTRY
    return (CHOLESKY_CALLS - SETUP_CALLS + slower * (cholesky - setup)) / (STEP_CALLS + slower * step)


def worth_a_try(budget: float, tolerance: float) -> bool:
    """True where a budget (of CG steps) allows about one step for each digit of the tolerance, the least that is seen.

    >>> worth_a_try(5, 1e-4), worth_a_try(5, 1e-12)
    (True, False)
    """
    return budget >= -log10(tolerance)


def too_slow(taken: int, residual: float, tolerance: float, budget: float) -> bool:
    """True where CG, ``taken`` steps to the relative ``residual``, should make way for a solver that costs ``budget`` steps.

    The steps still to take are foretold by the mean rate so far. CG gets faster as it goes, so at first the rest may look
    twice as expensive as the budget. After 1.5 budgets the run ends in any case: never more than 2.5 times Cholesky.

    >>> too_slow(3, 1e-2, 1e-4, 10), too_slow(5, 0.5, 1e-4, 10), too_slow(15, 2e-4, 1e-4, 10)
    (False, True, True)
    """
    if residual <= tolerance or taken < PATIENCE * budget:
        return False
    if taken >= LAST * budget or residual >= 1:
        return True
    return taken * (log(tolerance) / log(residual) - 1) > max(2 * budget - taken, budget / 2)
