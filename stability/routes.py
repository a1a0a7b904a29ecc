"""Other routes to stability, through the parameters: Hardt–Recht–Singer, Kozachkov–Wensing–Slotine, Bousquet–Elisseeff.

Each route is a pure function of measured constants (``stability.risk_constants``) that gives a :class:`Route`: a
bound of the distance ‖D^½(θ − θ')‖ of two twins and of ε = sup_z |ℓ(θ, z) − ℓ(θ', z)|, its assumptions with verdicts,
and its cost. An assumption that is violated makes the route *not applicable*: its value is then nan and ``reason``
says why. One that is *undecided* (constants seen on points of a path, asked for on a region) leaves a conditional
value.

One step of full-batch descent on both twins: θ⁺ − θ'⁺ = [θ − lr∇F_S(θ)] − [θ' − lr∇F_S(θ')] + (lr/n)(∇ℓ_z'(θ') −
∇ℓ_k(θ')). The last term is at most 2·lr·L_θ/n; what the brackets do to δ = ‖θ − θ'‖ is the whole difference between
the routes:

    convex, lr ≤ 2/β        δ⁺ ≤ δ + 2·lr·L_θ/n                ε ≤ (2L_θ²/n) Σ lr
    γ-convex, lr(β+γ) ≤ 2   δ⁺ ≤ (1 − lr·γ)δ + 2·lr·L_θ/n      ε ≤ 2L_θ²/(γn)
    smooth                  δ⁺ ≤ (1 + lr·β)δ + 2·lr·L_θ/n      ε ≤ (2L_θ²/(βn))(Π(1 + lr·β) − 1)

Sources: M. Hardt, B. Recht, Y. Singer, *Train faster, generalize better*, arXiv 1509.01240 (theorems 3.8, 3.9, 3.12,
there for one sample per step, in expectation; the deterministic full-batch form above is **Derived**); L. Kozachkov,
P. Wensing, J.-J. Slotine, *Generalization as dynamical robustness*, arXiv 2201.06656; O. Bousquet, A. Elisseeff,
*Stability and generalization*, JMLR 2 (2002).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stability.assumptions import Assumption
from stability.risk_constants import ParameterConstants

ROUNDING = 1e-9  # relative to ‖∇²‖: curvature above −ROUNDING·‖∇²‖ counts as not negative
CONSTANT, ON_POINTS = "holds for all θ", "seen on points of the runs, asked for on the segments between them"
FULL = "two runs, the Hessian's extreme eigenvalues along them"


@dataclass(frozen=True)
class Route:
    """One route's statement: ``value`` bounds ``what``, ``distance`` ‖D^½(θ − θ')‖; nan where not applicable."""

    route: str
    what: str
    value: float
    distance: float
    kind: str
    assumptions: tuple[Assumption, ...]
    cost: str
    source: str
    vacuous: str = ""  # why the value says nothing, "" where it says something or nothing is known

    @property
    def applicable(self) -> bool:
        return all(a.verdict != "violated" for a in self.assumptions)

    @property
    def conditional(self) -> bool:
        """Applicable, but some assumption is undecided."""
        return self.applicable and any(a.verdict == "undecided" for a in self.assumptions)

    @property
    def reason(self) -> str:
        """What is violated; where nothing is, what is undecided."""
        verdict = "undecided" if self.applicable else "violated"
        return "; ".join(f"{a.assumption}: {a.reason}" for a in self.assumptions if a.verdict == verdict)

    def to_dict(self) -> dict:
        """One row of a table; the assumptions as "name: verdict"."""
        status = "not applicable" if not self.applicable else "conditional" if self.conditional else "applicable"
        return {
            "route": self.route, "what": self.what, "value": self.value, "distance": self.distance, "kind": self.kind,
            "status": status, "reason": self.reason, "vacuous": self.vacuous, "cost": self.cost, "source": self.source,
            "assumptions": "; ".join(f"{a.assumption}: {a.verdict}" for a in self.assumptions),
        }  # fmt: skip


def convex_route(c: ParameterConstants) -> Route:
    """Hardt–Recht–Singer, theorem 3.8: F convex and β-smooth, lr ≤ 2/β: ε ≤ (2L_θ²/n) Σ lr.

    >>> c = ParameterConstants(10, (0.1,) * 20, lipschitz=3.0, smoothness=2.0, curvature=0.0, everywhere=True, both_runs=True)
    >>> convex_route(c).value  # 2·9/10·2
    3.6...
    """
    distance = 2 * c.lipschitz / c.n * sum(c.lrs)
    found = (*_shared(c), _curvature(c, "convex", 0.0), _step(c, "lr ≤ 2/β", c.smoothness / 2))
    return _route("convex (Hardt–Recht–Singer)", distance, c, found, "arXiv 1509.01240, theorem 3.8")


def strongly_convex_route(c: ParameterConstants) -> Route:
    """Hardt–Recht–Singer, theorem 3.9: F γ-strongly convex and β-smooth: ε ≤ 2L_θ²/(γn), whatever the number of steps.

    Their step condition is lr ≤ 1/β; lr(β + γ) ≤ 2 is all that the contraction |1 − lr·s| ≤ 1 − lr·γ on [γ, β] needs.
    For one sample per step γ and β are those of every sample's loss.

    >>> c = ParameterConstants(10, (0.1,) * 20, lipschitz=3.0, smoothness=2.0, curvature=0.5, everywhere=True, both_runs=True)
    >>> strongly_convex_route(c).value  # 2·9/(0.5·10)
    3.6
    """
    distance = 2 * c.lipschitz / (c.curvature * c.n) if c.curvature > 0 else math.inf
    found = (*_shared(c), _curvature(c, "strongly convex", _noise(c)), _contracting_step(c))
    return _route("strongly convex (Hardt–Recht–Singer)", distance, c, found, "arXiv 1509.01240, theorem 3.9")


def kozachkov_route(c: ParameterConstants, *, condition: float = 1.0) -> Route:
    """Kozachkov, Wensing & Slotine: the flow contracts at rate λ in a metric of condition number χ:

        ‖θ − θ'‖ ≤ 2√χ L_θ/(λn),   ε ≤ 2√χ L_θ²/(λn).

    λ is the measured curvature of F along the runs, the rate in the metric that the coordinates φ make Euclidean (χ = 1: the
    same number as the strongly convex route, on whose region, not on all of space, it is asked). Pass ``condition`` = χ for a
    rate that was found in another metric (``dataclasses.replace(c, curvature=λ)``). Raises ValueError for χ < 1.

    >>> c = ParameterConstants(10, (0.1,) * 20, lipschitz=3.0, smoothness=2.0, curvature=0.5, everywhere=True, both_runs=True)
    >>> kozachkov_route(c, condition=4.0).distance  # 2·2·3/(0.5·10)
    2.4
    """
    if not 1 <= condition < math.inf:
        raise ValueError(f"a condition number is finite and at least 1, got {condition!r}")
    distance = 2 * condition**0.5 * c.lipschitz / (c.curvature * c.n) if c.curvature > 0 else math.inf
    found = (*_shared(c), _curvature(c, "contracting", _noise(c)), _contracting_step(c))
    if c.sampling != "full batch":
        found += (_verdict("full batch", "sampling", 0, 1, False, "the flow of the risk on all of S is meant"),)
    return _route("contraction in parameters (Kozachkov et al.)", distance, c, found, "arXiv 2201.06656")


def smooth_route(c: ParameterConstants) -> Route:
    """β-smooth, nothing else, full batch: ε ≤ (2L_θ²/(βn))(Π(1 + lr·β) − 1), β = ‖∇²F‖₂. **Derived**: it grows like e^{βT}.

    >>> c = ParameterConstants(10, (0.5, 0.5), lipschitz=3.0, smoothness=2.0, curvature=-1.0, everywhere=False, both_runs=True)
    >>> smooth_route(c).value  # 2·9/(2·10)·(2·2 − 1)
    2.7
    """
    growth = math.fsum(math.log1p(lr * c.steepest) for lr in c.lrs)
    if growth < 700:  # e^709 is the last that float64 holds
        expanded = math.expm1(growth) / c.steepest if c.steepest > 0 else sum(c.lrs)
    else:
        expanded = math.inf
    distance = 2 * c.lipschitz / c.n * expanded
    found = (*_shared(c), _seen(c, "smooth on the region", "β = sup‖∇²F‖₂", c.steepest))
    if c.sampling != "full batch":
        reason = "full-batch recursion; for one sample per step see nonconvex_route"
        found += (_verdict("full batch", "sampling", 0, 1, False, reason),)
    return _route("smooth, no convexity", distance, c, found, "the smooth case of arXiv 1509.01240, lemma 3.3")


def nonconvex_route(c: ParameterConstants, *, loss_bound: float) -> Route:
    """Hardt–Recht–Singer, theorem 3.12: one sample per step, losses in [0, M], lr_t ≤ a/t:

        ε ≤ M·(1 + 1/(βa))/(n − 1)·(2aL_θ²/M)^{1/(βa+1)}·T^{βa/(βa+1)}, in expectation over the draws of the samples.

    (M = 1 in the paper; ℓ/M has L/M, β/M and steps M·lr.) Full-batch steps hit the replaced sample every time: the argument
    about the first hit does not apply to them. Raises ValueError unless 0 < M < ∞.

    >>> c = ParameterConstants(11, (1.0, 0.5), 1.0, 1.0, -1.0, everywhere=False, both_runs=True, sampling="one sample")
    >>> nonconvex_route(c, loss_bound=2.0).value  # 2·2/10·1^½·2^½
    0.5656...
    """
    if not 0 < loss_bound < math.inf:
        raise ValueError(f"loss_bound M must be finite and above 0, got {loss_bound!r}")
    a = max((t + 1) * lr for t, lr in enumerate(c.lrs))
    beta_a = c.steepest * a
    base = 2 * a * c.lipschitz**2 / loss_bound
    epsilon = math.inf
    if beta_a > 0 and c.n > 1:
        epsilon = loss_bound * (1 + 1 / beta_a) / (c.n - 1)
        epsilon *= base ** (1 / (beta_a + 1)) * len(c.lrs) ** (beta_a / (beta_a + 1))
    one, grow = c.sampling == "one sample", any(later > lr for lr, later in pairwise(c.lrs))
    found = (
        *_shared(c),
        _seen(c, "smooth on the region", "β = sup‖∇²ℓ‖₂", c.steepest),
        _verdict("one sample per step", "sampling", float(one), 1, one, "one sample" if one else "every step sees all of S"),
        _verdict("steps do not grow", "lr_t", max(c.lrs), math.inf, not grow, "lr rises" if grow else "lr does not rise"),
    )  # fmt: skip
    distance = epsilon / c.lipschitz if c.lipschitz > 0 else 0.0
    vacuous = f"not below the range M = {loss_bound:g} of the loss" if epsilon >= loss_bound else ""
    route = _route("non-convex SGD (Hardt–Recht–Singer)", distance, c, found, "arXiv 1509.01240, theorem 3.12", vacuous)
    return route


def bousquet_elisseeff(
    epsilon: float, n: int, loss_bound: float, *, delta: float = 0.05, proved: bool = False
) -> Route:
    """Replace-one corollary of Bousquet & Elisseeff: with probability 1 − δ over S

        L(f_S) − L_S(f_S) ≤ ε + (2nε + M)·√(ln(1/δ)/(2n)),   losses in [0, M], ε the uniform replace-one stability.

    *Proof:* E[gap] ≤ ε, and one sample moves the gap by at most 2ε + M/n: McDiarmid. ε has to hold for every S, z' and z.
    ``proved``: ε is a bound of that kind. A measured maximum over some twins is a LOWER estimate of ε, so the value is then no
    bound: "undecided". The second term grows like √n·ε: it says nothing unless ε = o(n^−½). ``vacuous`` where the value
    is not below M.

    Raises ValueError for ε < 0, n < 1, M <= 0 or δ outside (0, 1).

    >>> found = bousquet_elisseeff(0.001, 1000, 1.0, proved=True)
    >>> found.value, found.applicable, found.vacuous  # 0.001 + 3·√(ln 20/2000)
    (0.117..., True, '')
    >>> bousquet_elisseeff(0.1, 1000, 1.0).vacuous
    'not below the range M = 1 of the loss'
    """
    if not epsilon >= 0 or n < 1 or not loss_bound > 0 or not 0 < delta < 1:
        raise ValueError(
            f"expected ε >= 0, n >= 1, M > 0, 0 < δ < 1; got ε = {epsilon!r}, n = {n!r}, M = {loss_bound!r}, δ = {delta!r}"
        )
    value = epsilon + (2 * n * epsilon + loss_bound) * math.sqrt(math.log(1 / delta) / (2 * n))
    reason = "proved for every S, z' and z" if proved else "a measured maximum is a lower estimate of ε"
    uniform = _verdict("uniform stability", "ε", epsilon, math.inf, True if proved else None, reason)
    vacuous = "" if value < loss_bound else f"not below the range M = {loss_bound:g} of the loss"
    return Route(
        "replace-one corollary (Bousquet–Elisseeff)", "generalization gap, with probability 1 − δ", value, math.nan,
        "bound under assumptions" if proved else "the bound's formula at a lower estimate of ε", (uniform,),
        "none beyond ε", "JMLR 2 (2002), theorem 12", vacuous,
    )  # fmt: skip


def parameter_routes(c: ParameterConstants, *, loss_bound: float, condition: float = 1.0) -> list[Route]:
    """All routes in the parameters, side by side, the inapplicable ones with their reasons."""
    return [
        convex_route(c), strongly_convex_route(c), kozachkov_route(c, condition=condition), smooth_route(c),
        nonconvex_route(c, loss_bound=loss_bound),
    ]  # fmt: skip


def _route(
    name: str, distance: float, c: ParameterConstants, found: Sequence[Assumption], source: str, vacuous: str = ""
) -> Route:
    if any(a.verdict == "violated" for a in found):
        distance, vacuous = math.nan, ""
    what = "ε = sup |ℓ(θ, z) − ℓ(θ', z)|, z of S and the others"
    if c.sampling == "one sample":
        what += ", in expectation over the samples of the steps"
    epsilon = c.lipschitz * distance if distance != 0 else 0.0
    return Route(name, what, epsilon, distance, "bound under assumptions", tuple(found), FULL, source, vacuous)


def _shared(c: ParameterConstants) -> tuple[Assumption, ...]:
    metric = "G = D, the same for both twins" if c.constant_metric else "G = D + c·JᵀMJ moves with θ and with the data"
    # ‖∇_θ ℓ‖ = ‖J‖·|r| is convex in θ for squared loss and outputs affine in θ: its supremum on a segment is at an end.
    seen = True if c.both_runs and c.everywhere else None
    where = "seen on both runs" if c.both_runs else "seen on the run on S only, asked for on the twin's"
    where += "" if c.everywhere else "; asked for between their ends too"
    smooth = () if c.smooth is None else (c.smooth,)
    return (
        _verdict("one constant metric", 'scale "none"', float(c.constant_metric), 1, c.constant_metric, metric),
        _verdict("Lipschitz in θ", "L_θ", c.lipschitz, math.inf, seen, where),
        *smooth,
    )


def _noise(c: ParameterConstants) -> float:
    return ROUNDING * c.steepest


def _curvature(c: ParameterConstants, name: str, least: float) -> Assumption:
    if c.curvature < least - (_noise(c) if least == 0 else 0) or (least > 0 and c.curvature <= least):
        verdict, reason = False, f"λ_min of the Hessian comes down to {c.curvature:.3g}"
    elif c.everywhere:
        verdict, reason = True, CONSTANT
    else:
        verdict, reason = None, ON_POINTS
    return _verdict(name, "γ = inf λ_min(∇²F)", c.curvature, least, verdict, reason, c.curvature - least)


def _step(c: ParameterConstants, name: str, per_lr: float) -> Assumption:
    value = max(c.lrs) * per_lr
    ok = value <= 1 + ROUNDING
    exact = True if c.everywhere else None
    reason = f"the largest step is {value:.3g} of the limit" + (
        "" if c.everywhere or not ok else " that β on the runs gives"
    )
    return _verdict(name, "largest lr over its limit", value, 1.0, exact if ok else False, reason, 1 - value)


def _contracting_step(c: ParameterConstants) -> Assumption:
    return _step(c, "lr(β + γ) ≤ 2", (c.smoothness + max(c.curvature, 0.0)) / 2)


def _seen(c: ParameterConstants, name: str, quantity: str, value: float) -> Assumption:
    verdict = True if c.everywhere else None
    return _verdict(name, quantity, value, math.inf, verdict, CONSTANT if c.everywhere else ON_POINTS)


def _verdict(
    name: str, quantity: str, value: float, threshold: float, ok: bool | None, reason: str, margin: float = math.nan
) -> Assumption:
    verdict = {True: "holds", False: "violated", None: "undecided"}[ok]
    return Assumption(name, quantity, float(value), float(threshold), margin, verdict, reason, "–")
