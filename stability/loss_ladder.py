"""What replaces T0–T3 where the loss is not quadratic: bounds in the moving metric H⁻¹, for softmax in the quotient by 1.

On the flow ė = −H S̄ e + w with S̄e = ∇ℓ(y') − ∇ℓ(y) (the loss's secant) and w = d − (H'_S − H)r'. **Derived**: with
V = eᵀH⁻¹e and z = H^{−½}e,

    ½V̇ = −zᵀ(H^½S̄H^½ + ½H^{−½}ḢH^{−½})z + zᵀH^{−½}w,    so    d√V/dt ≤ −ρ√V + ‖w‖_{H⁻¹},

ρ = λ_min(H^½S̄H^½ + ½H^{−½}ḢH^{−½}), at least λ_min(H^½S̄H^½) − ½λ_max(H^½(dH⁻¹/dt)H^½). Softmax sees no common shift:
S̄ = ΠS̄Π, and the same holds of Πe, ΠHΠ, ΠS̄Π and Πw on 1⊥, Π = I − 11ᵀ/p per sample; nothing is said of the shift itself.

    T2H = √(sup λ_max(H)/inf λ_min(H))/inf ρ · sup‖d‖,    T3H = sup_t √λ_max(H_t)·E_t,  Ė = −ρE + ‖d‖_{H⁻¹}.

T2H needs ρ > 0 throughout; T3H does not, but grows where ρ < 0. ``T3H_drift`` takes the whole w and drops nothing.
"""

import math

import torch
from torch import Tensor

from nt_kernel.metric.inner import apply_blocks
from nt_kernel.spectra.spectrum import safe_lambda_min, symmetric_eigenvalues
from stability.loss_step import weighed

RUNGS = ("T2H", "T3H", "T3H_drift")
# What the summary of a pair has under every loss, and means nothing where ∇²ℓ is not σI.
QUADRATIC_ONLY = ("T0", "T1", "T1c", "T2", "T3", "vacuity_floor", "trivial_sup")
# NaN in a pair's summary where "not_applicable" says why.
NOT_APPLICABLE = (*QUADRATIC_ONLY, *RUNGS, "rate_H", "gain_H")
NOT_QUADRATIC = "T0 to T3: they need ½‖y − a‖² (or a multiple), the curvature of {} changes with y"


def shift_free_basis(p: int, like: Tensor) -> Tensor:
    """B [p − 1, p] with orthonormal rows orthogonal to 1 (Helmert's), BᵀB = Π = I − 11ᵀ/p.

    >>> B = shift_free_basis(3, torch.zeros(1, dtype=torch.float64))
    >>> torch.allclose(B.T @ B, torch.eye(3).double() - 1 / 3), torch.allclose(B @ B.T, torch.eye(2).double())
    (True, True)
    """
    rows = torch.arange(1, p, dtype=like.dtype, device=like.device)[:, None]
    columns = torch.arange(p, dtype=like.dtype, device=like.device)
    B = (columns < rows).to(like.dtype) - rows * (columns == rows)
    return B / (rows * (rows + 1)).sqrt()


def moving_rate(H: Tensor, S: Tensor, H_dot: Tensor) -> Tensor:
    """ρ = λ_min(H^½S̄H^½ + ½H^{−½}ḢH^{−½}) for secants S̄ [R, n, q, q] (blocks over samples); H ≻ 0, Ḣ [nq, nq] → [R].

    >>> H, S = torch.diag(torch.tensor([1.0, 4.0])), torch.full((1, 2, 1, 1), 0.5)
    >>> moving_rate(H, S, torch.zeros(2, 2)), moving_rate(H, S, -0.4 * H)  # min 0.5·λ; less half of 0.4
    (tensor([0.5000]), tensor([0.3000]))
    """
    values, U = torch.linalg.eigh((H + H.mT) / 2)
    root = values.clamp_min(0).sqrt()
    half = U * root  # H^½ in the eigenbasis, from the right
    inverse = U / root
    turning = inverse.mT @ H_dot @ inverse / 2
    matrices = half.mT @ apply_blocks(S, half.expand(len(S), *half.shape)) + turning
    return torch.linalg.eigvalsh((matrices + matrices.mT) / 2)[..., 0]


def moving_gain(rate: float, lowest: float, highest: float) -> float:
    """√(sup λ_max(H)/inf λ_min(H))/ρ: by how much sup‖w‖ is at most amplified; NaN unless ρ > 0 and H ≻ 0.

    >>> moving_gain(0.5, 1.0, 4.0), moving_gain(-0.1, 1.0, 4.0)
    (4.0, nan)
    """
    return math.sqrt(highest / lowest) / rate if rate > 0 and lowest > 0 else math.nan


def moving_step(E: Tensor, w: Tensor, rate: Tensor, dt: float) -> Tensor:
    """E⁺ = e^{−x}E + ((1 − e^{−x})/ρ)w, x = ρΔt, for rates of either sign (w·Δt added at ρ = 0).

    >>> moving_step(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.0]), 0.5)
    tensor([2.])
    """
    x = (rate * dt).clamp(-700, 700)  # e^700 is vacuous already, and still a number
    gain = torch.where(x != 0, -torch.expm1(-x) / torch.where(x != 0, x, 1), 1) * dt
    return torch.exp(-x) * E + gain * w


class LossLadder:
    """The rungs along a recorded run, instant by instant; every interval takes the worse rate and w of its two ends.

    Ḣ is the difference of the recorded H over the interval: exact where H is constant (models linear in θ with M
    constant), off by O(Δt) elsewhere. ``series`` holds [R] tensors per instant, ``lowest``, ``highest`` λ of H over the run.
    """

    def __init__(self, p: int, dt: float, like: Tensor, *, quotient: bool):
        self.dt, self.quotient = dt, quotient
        self.B = shift_free_basis(p, like) if quotient else None
        self.series: dict[str, list[Tensor]] = {
            name: [] for name in (*RUNGS[1:], "rate_H", "disturbance_H", "measured_H")
        }
        self.lowest, self.highest = math.inf, 0.0
        self._last: dict | None = None

    def record(self, H: Tensor, H_error: float, S: Tensor, e: Tensor, d: Tensor, drift: Tensor) -> None:
        """H [np, np] of the S run, the radius of its rounding, secants S̄ [R, n, p, p]; e, d, (H'_S − H)r' [R, n·p]."""
        H, S, e, d, w = self._reduced(H, S, e, d, d - drift)
        eigenvalues = symmetric_eigenvalues(H)
        self.lowest = min(self.lowest, safe_lambda_min(eigenvalues[0].item(), H_error))
        self.highest = max(self.highest, eigenvalues[-1].item())
        self.series["disturbance_H"].append(d.norm(dim=-1))
        self.series["measured_H"].append(e.norm(dim=-1))
        if self.lowest <= 0:  # H⁻¹ is no metric, here or before
            for name in (*RUNGS[1:], "rate_H"):
                self.series[name].append(e.new_full((len(e),), math.nan))
            return
        chol = torch.linalg.cholesky((H + H.mT) / 2)
        now = {"H": H, "S": S} | {k: _dual_norm(chol, v) for k, v in (("E", e), ("d", d), ("w", w))}
        state = (now["E"], now["E"])
        if self._last is None:
            self.series["rate_H"].append(torch.full_like(now["E"], math.nan))
        else:
            last, H_dot = self._last, (H - self._last["H"]) / self.dt
            rate = moving_rate(H, S, H_dot)
            if last["rate"] is None:  # the first instant waited for its Ḣ
                last["rate"] = moving_rate(last["H"], last["S"], H_dot)
                self.series["rate_H"][-1] = last["rate"]
            self.series["rate_H"].append(rate)
            worse, dt = torch.minimum(rate, last["rate"]), self.dt
            state = tuple(
                moving_step(E, torch.maximum(now[k], last[k]), worse, dt)
                for E, k in zip(last["state"], ("d", "w"), strict=True)
            )
            now["rate"] = rate
        self._last = {"rate": None, **now, "state": state}
        for name, E in zip(RUNGS[1:], state, strict=True):
            self.series[name].append(eigenvalues[-1].sqrt() * E)

    def _reduced(self, H: Tensor, S: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        if self.B is None:
            return H, S, *vectors
        n, p = S.shape[-3], S.shape[-1]
        basis = self.B.expand(n, *self.B.shape)
        return (
            weighed(H, basis),
            self.B @ S @ self.B.mT,
            *((v.unflatten(-1, (n, p)) @ self.B.mT).flatten(1) for v in vectors),
        )

    def rungs(self, loss: str = "the loss") -> list[dict]:
        """Per pair: T2H, T3H, T3H_drift, the rate inf ρ, the gain, sup‖d‖ and sup‖e‖ as they enter, and T0 to T3: NaN where a
        rung is not applicable, for the reasons in "not_applicable"."""
        rates = torch.stack(self.series["rate_H"])
        sup = {name: torch.stack(self.series[name]).amax(0).tolist() for name in self.series if name != "rate_H"}
        found = []
        for j, rate in enumerate(rates.amin(0).tolist()):
            gain = moving_gain(rate, self.lowest, self.highest)
            found.append(
                dict.fromkeys(QUADRATIC_ONLY, math.nan)
                | {"rate_H": rate, "gain_H": gain, "T2H": gain * sup["disturbance_H"][j]}
                | {name: sup[name][j] for name in sup}
                | {"not_applicable": "; ".join(filter(None, [NOT_QUADRATIC.format(loss), self.why_not(rate)]))}
            )
        return found

    def why_not(self, rate: float) -> str:
        """Why T2H does not apply at this inf ρ, with the number; "" where it does."""
        space = "on 1⊥ " if self.quotient else ""
        if self.lowest <= 0:
            return f"T2H, T3H: λ_min(H) {space}cannot be told from 0, H⁻¹ is no metric"
        if not rate > 0:
            return f"T2H: the rate in the metric H⁻¹ {space}is {rate:.3g}, not above 0"
        return ""


def _dual_norm(chol: Tensor, v: Tensor) -> Tensor:
    """‖v‖_{H⁻¹} for rows v [R, D], H = chol·cholᵀ."""
    return torch.linalg.solve_triangular(chol, v.mT, upper=False).norm(dim=0)
