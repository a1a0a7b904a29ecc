"""The semidefinite programs behind a contraction metric, for cvxpy and Clarabel.

One inequality covers all kinds: G_t(Θ) + qΘ_t ⪯ 0 with G_t(Θ) = A_tᵀΘ + ΘA_t and q = 2λ in continuous time, G_t(Θ) =
A_tᵀΘ_{t+1}A_t and q = −ρ² in discrete time. q is *the exponent* here; the larger, the faster the contraction. A solver's
Θ is only a proposal: :func:`exponent_of` says what it is worth, ``stability.contraction.check`` proves it.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

FIRST_SAMPLES = 4  # a program starts with as many samples, evenly spaced, and takes in those that its Θ violates
ADDED_SAMPLES = 3
VIOLATION = 1e-7  # of the largest ‖G‖ that counts as violated; interior-point solutions are good to 1e-8


def inequalities(kind: str, matrices: Sequence, metrics: Sequence, intervals: Sequence[float] | None) -> Iterator:
    """Pairs (G, Θ) of the inequalities G + qΘ ⪯ 0, for arrays, tensors and cvxpy expressions alike.

    One metric holds for all T samples, T + 1 metrics are those before, between and after them. In continuous time
    A is taken constant on [t, t + h_t] (``intervals``) and Θ linear there: dΘ/ds + AᵀΘ + ΘA + 2λΘ is affine in s, so
    both ends imply the rest.
    """
    constant = len(metrics) == 1
    for t, A in enumerate(matrices):
        now, after = (metrics[0], metrics[0]) if constant else (metrics[t], metrics[t + 1])
        if kind == "discrete":
            yield A.T @ (after @ A), now
        elif constant:
            product = now @ A
            yield product + product.T, now
        else:
            slope = (after - now) / intervals[t]
            for Theta in (now, after):
                product = Theta @ A
                yield product + product.T + slope, Theta


def exponents(kind: str, matrices, metrics, intervals=None) -> np.ndarray:
    """Of every inequality the largest q that it allows: −λ_max(L⁻¹G L⁻ᵀ), Θ = LLᵀ; in floating point, without proof."""
    found = []
    for G, Theta in inequalities(kind, matrices, metrics, intervals):
        half = np.linalg.solve(np.linalg.cholesky(Theta), G)
        white = np.linalg.solve(np.linalg.cholesky(Theta), half.T)
        found.append(-np.linalg.eigvalsh((white + white.T) / 2)[-1])
    return np.array(found)


def exponent_of(kind: str, matrices, metrics, intervals=None) -> float:
    """The largest q with G_t(Θ) + qΘ_t ⪯ 0 for all t.

    >>> round(exponent_of("continuous", [np.array([[-1.0, 1.0], [0.0, -1.0]])], [np.eye(2)]), 12)  # 2(1 − ½)
    1.0
    """
    return float(exponents(kind, matrices, metrics, intervals).min())


@dataclass
class Programs:
    """The two programs over I ⪯ Θ ⪯ χI, and how often they were solved.

    :meth:`slackest` minimises s subject to G_t + qΘ ⪯ sI at given χ: feasible for every q, so the solver always has an
    answer. :meth:`roundest` minimises χ subject to G_t + qΘ ⪯ 0. Of many samples only those are in the program that some
    Θ has violated (exact: the rest holds at the answer).
    """

    kind: str
    matrices: list[np.ndarray]  # T of [D, D]
    time_varying: bool = False
    intervals: list[float] | None = None
    solves: int = 0
    failure: str = ""
    _active: list[int] = field(default_factory=list)
    _compiled: dict = field(default_factory=dict)

    def __post_init__(self):
        T = len(self.matrices)
        first = np.linspace(0, T - 1, T if self.time_varying else min(T, FIRST_SAMPLES))
        self._active = sorted(set(first.round().astype(int).tolist()))
        self._scale = max(float(np.linalg.norm(A, 2)) for A in self.matrices) or 1.0

    @property
    def count(self) -> int:
        return len(self.matrices) + 1 if self.time_varying else 1

    def slackest(self, q: float, condition: float) -> list[np.ndarray] | None:
        """Θ of the smallest s, scaled and clipped to I ⪯ Θ ⪯ χI; None where the solver failed (``failure`` says how)."""
        metrics = self._generate("slack", q, condition)
        return None if metrics is None else clipped(metrics, condition)

    def roundest(self, q: float) -> list[np.ndarray] | None:
        """Θ of the smallest χ, scaled to I ⪯ Θ; None where q is infeasible or the solver failed."""
        metrics = self._generate("condition", q, None)
        return None if metrics is None else clipped(metrics, None)

    def _generate(self, goal: str, q: float, condition: float | None) -> list[np.ndarray] | None:
        while True:
            metrics = self._solve(goal, q, condition)
            if metrics is None or len(self._active) == len(self.matrices):
                return metrics
            try:
                allowed = exponents(self.kind, self.matrices, metrics)
            except np.linalg.LinAlgError:
                return metrics  # not positive definite: judged, and refused, by whoever asked
            least = min(q, allowed[self._active].min())
            missing = np.argsort(allowed)[:ADDED_SAMPLES]
            missing = [t for t in missing.tolist() if allowed[t] < least - VIOLATION * self._scale]
            if not set(missing) - set(self._active):
                return metrics
            self._active = sorted({*self._active, *missing})
            self._compiled.clear()

    def _solve(self, goal: str, q: float, condition: float | None) -> list[np.ndarray] | None:
        import cvxpy

        if goal not in self._compiled:
            self._compiled[goal] = self._compile(goal)
        problem, exponent, chi, metrics = self._compiled[goal]
        exponent.value = q
        if condition is not None:
            chi.value = condition
        self.solves += 1
        try:
            with warnings.catch_warnings(
                action="ignore"
            ):  # "may be inaccurate": judged by exponent_of, not by its word
                problem.solve(solver=cvxpy.CLARABEL)
        except (cvxpy.error.SolverError, ValueError, ArithmeticError) as error:
            self.failure = f"Clarabel failed at {self._rate(q)}: {error}"
            return None
        if metrics[0].value is None or problem.status not in ("optimal", "optimal_inaccurate", "user_limit"):
            self.failure = f"Clarabel says {problem.status} at {self._rate(q)}"
            return None
        return [(Theta.value + Theta.value.T) / 2 for Theta in metrics]

    def _rate(self, q: float) -> str:
        return f"λ = {q / 2:.6g}" if self.kind == "continuous" else f"ρ = {max(-q, 0.0) ** 0.5:.6g}"

    def _compile(self, goal: str):
        """A parametrised (DPP) problem: a new q or χ is solved without being compiled again."""
        import cvxpy

        size = len(self.matrices[0])
        eye = np.eye(size)
        metrics = [cvxpy.Variable((size, size), symmetric=True) for _ in range(self.count)]
        q = cvxpy.Parameter()
        slack = cvxpy.Variable() if goal == "slack" else 0.0
        chi = cvxpy.Parameter(pos=True) if goal == "slack" else cvxpy.Variable()
        used = [self.matrices[t] for t in self._active]
        constraints = [
            slack * eye - G - q * Theta >> 0 for G, Theta in inequalities(self.kind, used, metrics, self.intervals)
        ]
        for Theta in metrics:
            constraints += [Theta - eye >> 0, chi * eye - Theta >> 0]
        return cvxpy.Problem(cvxpy.Minimize(slack if goal == "slack" else chi), constraints), q, chi, metrics


def clipped(metrics: Sequence[np.ndarray], condition: float | None) -> list[np.ndarray]:
    """Metrics with eigenvalues clipped to [1, χ] (a solver leaves the interval by its tolerance), or scaled to Θ ⪰ I."""
    pairs = [np.linalg.eigh(Theta) for Theta in metrics]
    if condition is None:
        smallest = min(values[0] for values, _ in pairs)
        return [Theta / smallest for Theta in metrics] if smallest > 0 else list(metrics)
    top = max(1.0, condition * (1 - 1e-12))
    return [(vectors * np.clip(values, 1.0, top)) @ vectors.T for values, vectors in pairs]
