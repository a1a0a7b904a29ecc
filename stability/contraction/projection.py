"""Contraction metrics of large systems: programs on the slowest directions, Lyapunov's equation for the rest.

A program of D states has D(D + 1)/2 unknowns and its cost grows like D⁶; Lyapunov's equation costs D³. With V spanning the
k slowest eigenvectors of the mean matrix Ā and W its complement, WᵀĀV = 0: the two form a cascade, and
Θ = VΘ_kVᵀ + s·WΘ_cWᵀ contracts for small or large enough s where the A_t are near their mean. **Derived.** Nothing of that is
believed: the candidate is checked on all D states.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.linalg

from stability.contraction.sdp import exponent_of
from stability.contraction.search import speed, spread

SCALES = 10.0 ** np.arange(-4.0, 5.0)  # s
SHARES = (0.05, 0.5, 0.9)  # of the way between no contraction and the limit of the states left out


def slow_basis(kind: str, mean: np.ndarray, largest: int) -> np.ndarray:
    """V [D, k], k ≤ ``largest``: an orthonormal basis of the eigenvectors of slowest decay, conjugate pairs kept together.

    >>> slow_basis("discrete", np.diag([0.1, 0.9, 0.5]), 2).round(12) + 0.0
    array([[0., 0.],
           [1., 0.],
           [0., 1.]])
    """
    values, vectors = np.linalg.eig(mean)
    slowness = values.real if kind == "continuous" else np.abs(values)
    columns, taken = [], 0
    for i in np.argsort(-slowness, kind="stable"):
        if values[i].imag < 0:
            continue  # its conjugate stands for both
        pair = [vectors[:, i].real] if values[i].imag == 0 else [vectors[:, i].real, vectors[:, i].imag]
        if taken + len(pair) > largest:
            break
        columns += pair
        taken += len(pair)
    Q, R = np.linalg.qr(np.stack(columns, 1)) if columns else (np.zeros((len(mean), 0)), np.zeros((0, 0)))
    kept = np.abs(np.diag(R)) > 1e-10  # a defective eigenvalue gives one direction twice
    return Q[:, kept] * np.sign(np.diag(R)[kept])


def leaks(matrices: Sequence[np.ndarray], V: np.ndarray) -> tuple[float, float]:
    """max_t ‖(1 − VVᵀ)A_tV‖₂ and max_t ‖VᵀA_t(1 − VVᵀ)‖₂."""
    out = max(np.linalg.norm(A @ V - V @ (V.T @ A @ V), 2) for A in matrices)
    back = max(np.linalg.norm(V.T @ A - (V.T @ A @ V) @ V.T, 2) for A in matrices)
    return float(out), float(back)


def lyapunov_metric(kind: str, A: np.ndarray, q: float) -> np.ndarray | None:
    """Θ with (A + λ)ᵀΘ + Θ(A + λ) = −I, q = 2λ (discrete AᵀΘA/ρ² − Θ = −I, q = −ρ²); None where A does not decay so fast.

    >>> lyapunov_metric("continuous", np.array([[-1.0]]), 1.0).item()  # 2(−1 + ½)Θ = −1
    1.0
    """
    eye = np.eye(len(A))
    try:
        if kind == "continuous":
            Theta = scipy.linalg.solve_continuous_lyapunov((A + q / 2 * eye).T, -eye)
        else:
            Theta = scipy.linalg.solve_discrete_lyapunov(A.T / np.sqrt(-q), eye)
    except (np.linalg.LinAlgError, ValueError):
        return None
    Theta = (Theta + Theta.T) / 2
    return Theta if np.isfinite(Theta).all() and np.linalg.eigvalsh(Theta)[0] > 0 else None


def extended(
    kind: str,
    matrices: Sequence[np.ndarray],
    V: np.ndarray,
    Theta: np.ndarray | None,
    *,
    objective: str,
    condition: float,
) -> np.ndarray | None:
    """The best metric on all D states that was found, [D, D]; None where none contracts. Not yet checked.

    Candidates: Θ_k extended by s·Θ_c of the complement of V, and Lyapunov's metric of the whole mean matrix.
    """
    mean = np.mean(matrices, 0)
    best, best_value = None, -np.inf
    for candidate in _candidates(kind, mean, V, Theta):
        try:
            x = speed(kind, exponent_of(kind, matrices, [candidate]))
        except np.linalg.LinAlgError:
            continue
        chi = spread([candidate])
        if x <= 0 or chi > condition:
            continue
        value = x if objective == "rate" else x / np.sqrt(chi)
        if value > best_value:
            best, best_value = candidate, value
    return best


def lyapunov_sequence(matrices: Sequence[np.ndarray], rho: float) -> list[np.ndarray]:
    """Θ_T = I, Θ_t = I + A_tᵀΘ_{t+1}A_t/ρ²: T + 1 metrics with A_tᵀΘ_{t+1}A_t ⪯ ρ²Θ_t and I ⪯ Θ_t, for any A_t and ρ > 0.

    The price is χ = max λ_max(Θ_t), which falls with ρ. **Derived.**

    >>> [Theta.item() for Theta in lyapunov_sequence([np.array([[1.0]])] * 2, 0.5)]
    [21.0, 5.0, 1.0]
    """
    metrics = [np.eye(len(matrices[0]))]
    for A in reversed(matrices):
        Theta = np.eye(len(A)) + A.T @ metrics[-1] @ A / rho**2
        metrics.append((Theta + Theta.T) / 2)
    return metrics[::-1]


def best_sequence(matrices: Sequence[np.ndarray], *, objective: str, condition: float) -> list[np.ndarray] | None:
    """The :func:`lyapunov_sequence` of smallest ρ < 1, or of smallest √χ/(1 − ρ), at χ ≤ ``condition``; not yet checked."""
    best, least = None, np.inf
    for rho in np.unique(np.concatenate([np.linspace(0.02, 0.98, 49), 1 - np.logspace(-4, -1.7, 16)])):
        metrics = lyapunov_sequence(matrices, float(rho))
        if not all(np.isfinite(Theta).all() for Theta in metrics) or (chi := spread(metrics)) > condition:
            continue
        value = rho if objective == "rate" else np.sqrt(chi) / (1 - rho)
        if value < least:
            best, least = metrics, value
    return best


def _candidates(kind: str, mean: np.ndarray, V: np.ndarray, Theta: np.ndarray | None) -> Iterator[np.ndarray]:
    yield np.eye(len(mean))
    yield from _lyapunov_metrics(kind, mean)
    if Theta is None:
        return
    W = scipy.linalg.null_space(V.T)
    for rest in _lyapunov_metrics(kind, W.T @ mean @ W):
        for s in SCALES:
            yield V @ Theta @ V.T + s * W @ rest @ W.T


def _lyapunov_metrics(kind: str, A: np.ndarray) -> Iterator[np.ndarray]:
    z = np.linalg.eigvals(A)
    limit = -2 * z.real.max() if kind == "continuous" else -(max(np.abs(z).max(), 1e-6) ** 2)
    none = 0.0 if kind == "continuous" else -1.0
    if limit <= none:
        return
    for share in SHARES:
        Theta = lyapunov_metric(kind, A, none + share * (limit - none))
        if Theta is not None:
            yield Theta / np.linalg.eigvalsh(Theta)[0]
