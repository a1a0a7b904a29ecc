"""The assumptions by key: names, quantities, equations of the paper, limits. No torch: a test run reads it at collection."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nt_kernel.errors import unknown_name

# Relative size below which a term that the proof drops counts as absent (float64 rounding along a run stays far below).
NEGLIGIBLE = 1e-6
# Largest relative distance to the flow, or defect of one Euler step, that counts as following it.
FLOW_DEFECT = 1e-2
# Largest share of the measured divergence that rounding alone (the null twin) may make.
NULL_SHARE = 1e-3
# Largest growth of κ_t and L_t over their start.
GROWTH = 4.0
# Largest share of λ_min(H) that its rounding radius may make.
ROUNDING_SHARE = 0.1


@dataclass(frozen=True)
class Spec:
    """One assumption. ``limit`` is what its value is held against unless the user sets another.

    ``below``: the value has to stay at or below the limit (above it otherwise). ``noise``: absolute changes of the value that
    mean nothing, for baselines (values that are rounding, and differ from machine to machine).
    """

    key: str
    name: str
    quantity: str
    equation: str
    limit: float
    below: bool
    meaning: str
    noise: float = 0.0


_SPECS = (
    Spec("positive_rate", "positive rate", "ξ = inf λ_min(H)", "P5, P14", 0.0, False,
         "The kernel H stays positive definite along the run on S."),
    Spec("full_row_rank", "full row rank", "λ_min(JJᵀ)/λ_max(JJᵀ), start and end", "P4, P5", 0.0, False,
         "J has rank n·p: parameters enough, no repeated input, no output that nothing moves."),
    Spec("bounded_jacobian", "bounded Jacobian", "κ = sup‖J_i‖₂", "P9", GROWTH, True,
         "κ_t stays within a multiple of its start, and is not on its way out of it when the run ends."),
    Spec("bounded_gradients", "bounded output gradients", "L = sup‖∇_y ℓ‖₂", "P9", GROWTH, True,
         "The same for the output gradients of both twins on S ∪ S'."),
    Spec("metric_floor", "G ⪰ μI", "min λ_min(G_α), start and end", "P9, P13", 0.0, False,
         "The metric is at least μ: every mass is, and the pulled-back term is positive semidefinite."),
    Spec("no_kernel_drift", "no kernel drift", "sup‖(H'_S − H)r'‖ / sup‖d‖", "P8", NEGLIGIBLE, True,
         "Both twins have the same kernel on S, as models linear in their parameters do.", NEGLIGIBLE),
    Spec("one_metric", "one metric", "max_α ‖G'^−½(G − G')G'^−½‖ at θ₀", "P8", NEGLIGIBLE, True,
         "Both twins move in the same metric, though each builds it on its own data.", NEGLIGIBLE),
    Spec("step_limit", "step below its limit", "bound on lr·λ_max(ΛHΛᵀ), both twins", "Euler step of P4", 2.0, True,
         "The linearised step contracts for each twin with its own H; ∇²ℓ = ΛᵀΛ, so that squared loss has lr·σλ_max(H)."),
    Spec("gradient_flow", "gradient flow", "sup_t‖y − y_flow‖ / sup_t‖y_flow − y_0‖", "P4", FLOW_DEFECT, True,
         "The run follows the continuous flow of which the theorem speaks, rather than finite steps."),
    Spec("squared_loss", "squared loss", "‖∇²_yℓ − σI‖₂ / σ", "P6", NEGLIGIBLE, True,
         "The output gradient is the residual (times σ), so the error equation is linear in it.", NEGLIGIBLE),
    Spec("smooth_activations", "C¹ activations", "modules with a kink", "P8", 0.0, True,
         "The network has a continuous derivative along the run; ReLU has kinks."),
    Spec("determinism", "determinism", "sup|y − y| of the same run, twice", "P4", 0.0, True,
         "The same start gives the same run, bit for bit: what differs between twins is the data."),
    Spec("resolved_by_floats", "resolved by floats", "null twin / measured sup", "–", NULL_SHARE, True,
         "The divergence is more than rounding, measured by a twin started one ulp apart.", NULL_SHARE),
    Spec("float_sufficiency", "float sufficiency", "sup rounding radius of H / λ_min(H)", "P5", ROUNDING_SHARE, True,
         "The dtype can tell λ_min(H) from 0 along the whole run.", ROUNDING_SHARE),
)  # fmt: skip

_OF_NAIM = (
    Spec("strict_descent", "strict descent", "½ − a − 2a²q², a = lr·L, q = (1 − η)/η", "arXiv 2601.22284", 0.0, False,
         "The Lyapunov function of parameters and velocity falls at every step with d = −∇h."),
    Spec("residual_recursion", "residual recursion", "sup‖z⁺ − (1 − η)(z − Δd)‖ / max(‖v⁺‖, ‖d⁺‖)", "arXiv 2601.22284",
         NEGLIGIBLE, True, "The velocity is lifted by the η that is claimed towards the target that is claimed.", NEGLIGIBLE),
    Spec("dissipation", "dissipation", "r of V⁺ ≤ (1 − r)V + c₃‖Δd‖²", "arXiv 2601.22284, theorem 3.1", 0.0, False,
         "V falls where the target stands still: the steady state is bounded by what moves the target."),
)  # fmt: skip

_OF_MOVEMENTS = (
    Spec("convex_energy", "convex energy", "min λ_min(∇²E) over the run's points", "arXiv 2605.27779", 0.0, False,
         "The energy is as convex as it claims wherever the run asks it."),
    Spec("inexactness", "inexactness reached", "max_k ‖u^{k+1} − P(u^k)‖", "arXiv 2605.27779", 0.0, True,
         "Every outer step ends within δ of its proximal point."),
    Spec("local_nondegeneracy", "local non-degeneracy", "min_k σ_min(J(θ^k))", "arXiv 2605.27779", 0.0, False,
         "J keeps half of its smallest singular value along the run: the network can go where the steps lead."),
    Spec("interior_localisation", "interior localisation", "max_k ‖θ^k − θ⁰‖, and 2·path/σ₀", "arXiv 2605.27779", 0.0,
         True, "The iterates stay inside the ball where σ_min is at least half its start, and so does the path they need."),
)  # fmt: skip

CATALOGUE: dict[str, Spec] = {spec.key: spec for spec in _SPECS}
"""Every assumption of theorem 3 that is checked, by key, in the order of reports."""
SYSTEMS: dict[str, Spec] = {spec.key: spec for spec in (*_OF_NAIM, *_OF_MOVEMENTS)}
"""Those of the optimizers with a velocity and of movements."""
KEY_OF: dict[str, str] = {spec.name: spec.key for spec in (*_SPECS, *_OF_NAIM, *_OF_MOVEMENTS)}


def known_key(key: str) -> str:
    """The key, or the one whose name was written; ValueError for anything else.

    >>> known_key("G ⪰ μI")
    'metric_floor'
    """
    if key in CATALOGUE or key in SYSTEMS:
        return key
    if key in KEY_OF:
        return KEY_OF[key]
    raise ValueError(unknown_name("assumption", key, [*CATALOGUE, *SYSTEMS]))


def known_keys(keys: Iterable[str], what: str) -> tuple[str, ...]:
    """Every key checked. A single string, which would be read letter by letter, is a TypeError."""
    if isinstance(keys, str):
        raise TypeError(f"{what} must be a list of assumptions, got the string {keys!r}; write [{keys!r}]")
    return tuple(known_key(key) for key in keys)


def theorem_key(key: str) -> str:
    """:func:`known_key` where ``check_assumptions`` measures: ValueError for an assumption of the other two systems.

    >>> theorem_key("dissipation")
    Traceback (most recent call last):
    ValueError: dissipation is no assumption of theorem 3; naim_assumptions measures it, its limits are arguments there
    """
    key = known_key(key)
    if key in SYSTEMS:
        measured_by = "naim_assumptions" if SYSTEMS[key] in _OF_NAIM else "movement_assumptions"
        raise ValueError(
            f"{key} is no assumption of theorem 3; {measured_by} measures it, its limits are arguments there"
        )
    return key


def theorem_keys(keys: Iterable[str], what: str) -> tuple[str, ...]:
    """:func:`known_keys`, each a :func:`theorem_key`."""
    return tuple(theorem_key(key) for key in known_keys(keys, what))


def check_limit(key: str, value: float) -> None:
    """ValueError for a limit that is no finite number >= 0: nothing could be held against it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"the limit of {key} must be a finite number >= 0, got {value!r}")


def limits_of(changed: Mapping[str, float] | None) -> dict[str, float]:
    """The limit of every assumption, the user's own where given.

    Raises ValueError for an unknown assumption or a limit that is no number >= 0.

    >>> limits_of({"no_kernel_drift": 0.5})["no_kernel_drift"]
    0.5
    """
    limits = {key: spec.limit for key, spec in CATALOGUE.items()}
    for name, value in (changed or {}).items():
        key = theorem_key(name)
        check_limit(key, value)
        if key == "step_limit" and not 0 < value <= 2:
            raise ValueError(f"the limit of step_limit is on lr·λ_max(ΛHΛᵀ): above 0, at most 2; got {value!r}")
        if key in ("bounded_jacobian", "bounded_gradients") and value < 1:
            raise ValueError(f"the limit of {key} is a growth over the start, at least 1; got {value!r}")
        limits[key] = float(value)
    return limits
