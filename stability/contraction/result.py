"""What a search for a contraction metric found: :class:`ContractionMetric`, and :class:`Projection` for large systems."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """What was done to a system of more states than the programs take.

    The programs saw VᵀA_tV on the k slowest directions of the mean matrix. Where ``whole``, Θ was extended to the other
    states by Lyapunov's equation for the mean, and the inequality is certified on all of them. Otherwise ``rate`` and
    ``condition`` speak of VᵀA_tV alone and are no certificate for the system.
    """

    dimension: int  # k
    states: int  # D
    basis: Tensor  # V, [D, k], orthonormal
    leak: float  # max_t ‖(1 − VVᵀ)A_tV‖₂: what the subspace hands to the states left out
    coupling: float  # max_t ‖VᵀA_t(1 − VVᵀ)‖₂: what it receives from them
    rate: float
    condition: float
    whole: bool

    def __str__(self) -> str:
        fate = "extended to all of them" if self.whole else f"{self.states - self.dimension} left out"
        return (
            f"{self.dimension} of {self.states} states, {fate}; leak {self.leak:.2g}, coupling {self.coupling:.2g}, "
            f"rate {self.rate:.6g} in the subspace"
        )


@dataclass(frozen=True)
class ContractionMetric:
    """Θ with I ⪯ Θ ⪯ χI and AᵀΘ + ΘA ⪯ −2λΘ (discrete AᵀΘA ⪯ ρ²Θ) at every sample, or why there is none.

    Where ``feasible``, rate, condition and margin are those of ``stability.contraction.check``, not the solver's. Where not,
    ``metric`` is None, ``gain`` inf, ``reason`` says why, and ``rate`` is the best that was found (no contraction, or nan).
    """

    feasible: bool
    reason: str  # "" where feasible
    kind: str  # "continuous" or "discrete"
    rate: float  # λ per unit of time, or ρ per step
    metric: Tensor | None  # Θ [D, D]; Θ_0 … Θ_T [T + 1, D, D] where it varies
    condition: float  # χ
    gain: float  # √χ/λ, or √χ/(1 − ρ): sup‖e‖ ≤ gain·sup‖w‖ once e_0 is forgotten
    margin: float  # certified smallest eigenvalue of −(AᵀΘ + ΘA + 2λΘ), of ρ²Θ − AᵀΘA: ≥ 0; nan where composed
    projected: Projection | None
    assumptions: str
    solves: int = 0

    @property
    def time_varying(self) -> bool:
        return self.metric is not None and self.metric.dim() == 3

    def norm(self, e: Tensor, t: int | None = None) -> Tensor:
        """‖e‖_Θ = √(eᵀΘe) for e [..., D] → [...]; ‖e‖ ≤ ‖e‖_Θ ≤ √χ‖e‖.

        Where the metric varies, ``t`` picks Θ_t; without it e is [T + 1, D], a row per Θ_t. Raises ValueError where there is
        no metric and for what does not fit it.
        """
        if self.metric is None:
            raise ValueError(f"there is no contraction metric: {self.reason}")
        Theta = self.metric.to(e)
        if Theta.dim() == 3 and t is not None:
            Theta = Theta[t]
        if e.shape[-1] != Theta.shape[-1] or (Theta.dim() == 3 and e.shape[:-1] != Theta.shape[:1]):
            raise ValueError(f"e has shape {tuple(e.shape)}, the metric {tuple(self.metric.shape)}")
        return (e * (Theta @ e[..., None])[..., 0]).sum(-1).clamp_min(0).sqrt()

    def __str__(self) -> str:
        symbol = "λ" if self.kind == "continuous" else "ρ"
        if not self.feasible:
            return f"no contraction metric: {self.reason}"
        text = f"{symbol} = {self.rate:.6g}, χ = {self.condition:.6g}, gain {self.gain:.6g}, margin {self.margin:.2g}"
        return text + (f"; {self.projected}" if self.projected else "")


def gain_of(kind: str, rate: float, condition: float) -> float:
    """√χ/λ, or √χ/(1 − ρ); inf where nothing contracts.

    >>> gain_of("continuous", 0.5, 4.0), gain_of("discrete", 0.5, 4.0), gain_of("discrete", 1.0, 1.0)
    (4.0, 4.0, inf)
    """
    speed = rate if kind == "continuous" else 1 - rate
    return math.sqrt(condition) / speed if speed > 0 else math.inf


def metric_enclosure(errors: Tensor, closed_loop, metric: ContractionMetric) -> Tensor:
    """**T4 in a metric**: E_{t+1} = ρE_t + ‖w_t‖_Θ, E_0 = ‖e_0‖_Θ, [T + 1], w_t = e_{t+1} − A_t e_t; ‖e_t‖ ≤ ‖e_t‖_Θ ≤ E_t.

    ``errors`` [T + 1, D], ``closed_loop`` the T matrices that a *discrete* ``metric`` was found for (or others that contract
    in it at its rate). An a-posteriori enclosure as T4 is (``stability.enclosures``), and finite where ‖A_t‖₂ > 1.

    Raises ValueError for a metric that is not feasible or not discrete, and for shapes that do not fit.

    >>> from stability.contraction.metric import contraction_metric
    >>> A = torch.tensor([[0.5, 2.0], [0.0, 0.5]], dtype=torch.float64)
    >>> found = contraction_metric([A], kind="discrete", objective="gain")
    >>> e = torch.stack([torch.linalg.matrix_power(A, t) @ A.new_tensor([0.0, 1.0]) for t in range(20)])
    >>> bool((metric_enclosure(e, [A] * 19, found) >= e.norm(dim=1)).all())
    True
    """
    if not metric.feasible or metric.kind != "discrete":
        raise ValueError(f"metric_enclosure needs a feasible discrete metric, got: {metric} ({metric.kind})")
    if errors.dim() != 2 or len(closed_loop) != len(errors) - 1:
        raise ValueError(
            f"errors must be [T + 1, D] with T closed-loop matrices; got {tuple(errors.shape)} and {len(closed_loop)}"
        )
    at = (lambda t: t) if metric.time_varying else (lambda t: None)
    E = [metric.norm(errors[0], at(0))]
    for t, A in enumerate(closed_loop):
        E.append(metric.rate * E[-1] + metric.norm(errors[t + 1] - A @ errors[t], at(t + 1)))
    return torch.stack(E)
