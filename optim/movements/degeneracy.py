r"""Can the network go where the proximal steps lead? Local non-degeneracy and interior localisation along a run, measured.

A movement in function space is followed by one in the parameters only where J is onto. In the norms of the mass and of the
function space, σ_min(J) = √(λ_min(K)/N), K = J D⁻¹Jᵀ. The analysis of minimizing movements over networks asks for

- *local non-degeneracy*: σ_min(J(θ)) ≥ σ > 0 around the start;
- *interior localisation*: the iterates stay inside the ball around θ⁰ where that is so.

**Derived.** With ‖J(θ) − J(θ⁰)‖ ≤ L_J‖θ − θ⁰‖ in the ball of radius R = σ₀/(2L_J), σ_min ≥ σ₀/2 there (Weyl), and a path in
function space of length ℓ is followed by one in θ of length at most 2ℓ/σ₀ (θ̇ = D⁻¹Jᵀ(JD⁻¹Jᵀ)⁻¹u̇, the shortest): it stays
inside if 2ℓ/σ₀ < R. L_J is measured on the run's own points, a lower estimate; what is said of R is therefore of those points.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import as_inputs
from nt_kernel.factors import Factor, join_factors, layer_factors
from nt_kernel.mass import Mass
from nt_kernel.metric.layer_metric import model_mass
from nt_kernel.metric.model_metric import mass_entries
from nt_kernel.spectra.spectrum import rounding_radius, safe_lambda_min
from optim.movements.result import MovementRun


@dataclass(frozen=True)
class Verdict:
    """One assumption: what was measured, against what, with what verdict (holds | violated | undecided), and why."""

    assumption: str
    quantity: str
    value: float
    threshold: float
    margin: float  # signed: how far on the good side of the threshold
    verdict: str
    reason: str
    equation: str = "arXiv 2605.27779"

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Nondegeneracy:
    """At θ⁰ … θ^K: ``sigma_min`` (a lower bound, 0.0 where it cannot be told from 0) and ``sigma_max`` of J, ``displacement``
    ‖θ^k − θ⁰‖, ``change`` ‖J(θ^k) − J(θ⁰)‖, all [K + 1]; ``path`` Σ‖u^{k+1} − u^k‖; ``structural``: why J cannot be onto, ""
    where nothing speaks against it."""

    sigma_min: Tensor
    sigma_max: Tensor
    displacement: Tensor
    change: Tensor
    path: float
    structural: str

    @property
    def lipschitz(self) -> float:
        """L_J on the run's points, max ‖J(θ^k) − J(θ⁰)‖/‖θ^k − θ⁰‖; 0 where nothing moved or J is constant."""
        moved = self.displacement > 0
        return float((self.change[moved] / self.displacement[moved]).max()) if bool(moved.any()) else 0.0

    @property
    def radius(self) -> float:
        """R = σ₀/(2L_J); ∞ for a model linear in θ."""
        return float(self.sigma_min[0]) / (2 * self.lipschitz) if self.lipschitz else math.inf

    @property
    def needed(self) -> float:
        """2ℓ/σ₀: how far the parameters have to go for the path that the outputs went, at most."""
        start = float(self.sigma_min[0])
        return 2 * self.path / start if start else math.inf

    def verdicts(self) -> list[Verdict]:
        """Local non-degeneracy on the run, interior localisation of the run, and of its budget beforehand."""
        start, least = float(self.sigma_min[0]), float(self.sigma_min.min())
        far, name = float(self.displacement.max()), "interior localisation"
        if self.structural:
            first, why = "violated", self.structural
        elif start == 0:
            first, why = "undecided", "σ_min(J) at the start cannot be told from 0 in this arithmetic"
        elif least >= start / 2:
            first, why = "holds", "σ_min(J) keeps half of what it was at the start"
        else:
            first, why = "violated", f"σ_min(J) falls to {least / start:.3g} of its start"
        found = [
            Verdict("local non-degeneracy", "min_k σ_min(J(θ^k))", least, start / 2, least - start / 2, first, why)
        ]
        for quantity, value, what in (
            ("max_k ‖θ^k − θ⁰‖", far, "the iterates"),
            ("2·path/σ₀", self.needed, "the shortest parameter path that the outputs' path may need"),
        ):
            if not start:
                verdict, reason = first, "there is no ball: " + why
            else:
                inside = value < self.radius
                verdict = "holds" if inside else "violated"
                reason = (
                    f"{what} {'stay inside' if inside else 'leave'} the ball where σ_min ≥ σ₀/2, R = {self.radius:.3g}"
                )
            margin = self.radius - value if start and math.isfinite(value) else -math.inf
            found.append(Verdict(name, quantity, value, self.radius, margin, verdict, reason))
        return found


def local_nondegeneracy(
    model: nn.Module, x, run: MovementRun, *, mass: Mass = 1.0, output: Callable | None = None
) -> Nondegeneracy:
    """J at every θ^k of a run that kept its parameters; ``mass`` is D of the norm on them.

    K is [NC, NC] at each of the K + 1 points; ‖J(θ^k) − J(θ⁰)‖² = λ_max(K_kk − K_k0 − K_0k + K_00), known to √ε·σ_max.

    Raises ValueError for a run without parameters.

    >>> from optim.minimizing_movement import minimizing_movements
    >>> from optim.movements.energy import SquaredEnergy
    >>> model, x = nn.Linear(1, 1, bias=False, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
    >>> run = minimizing_movements(
    ...     model, x, SquaredEnergy(torch.ones(1, 1)), tau=1.0, steps=2, delta=1e-6, keep_parameters=True
    ... )
    >>> seen = local_nondegeneracy(model, x, run)
    >>> [round(s, 9) for s in seen.sigma_min.tolist()], seen.radius, [v.verdict for v in seen.verdicts()]
    ([2.0, 2.0, 2.0], inf, ['holds', 'holds', 'holds'])
    """
    if run.parameters is None:
        raise ValueError("this run did not keep its parameters; write minimizing_movements(…, keep_parameters=True)")
    steps = len(next(iter(run.parameters.values())))

    def layers(k: int) -> dict[str, Factor]:
        return layer_factors(model, x, params={n: p[k] for n, p in run.parameters.items()}, output=output)[1]

    def seen(k: int) -> Factor:
        return join_factors(layers(k)).to(torch.float64)

    first, masses = seen(0), model_mass(layers(0), mass)
    K_0 = _matrix(first, first, masses)
    least, most, moved, change = [], [], [], []
    for k in range(steps):
        now = first if k == 0 else seen(k)
        K = K_0 if k == 0 else _matrix(now, now, masses)
        cross = K_0 if k == 0 else _matrix(now, first, masses)
        values = torch.linalg.eigvalsh(K)
        size = values[-1].item()
        least.append(safe_lambda_min(values[0].item(), rounding_radius(len(K), size)))
        most.append(size)
        gap = torch.linalg.eigvalsh(K - cross - cross.mT + K_0)[-1].item()
        noise = rounding_radius(len(K), size + K_0.norm().item())
        change.append(max(gap - noise, 0.0))
        moved.append(
            sum(
                (mass_entries(masses[n], p[k].double()) * (p[k] - p[0]).double().square()).sum().item()
                for n, p in run.parameters.items()
            )
        )
    N = len(run.trajectory.outputs[0])
    as_norm = lambda values: (torch.tensor(values, dtype=torch.float64) / N).clamp_min(0).sqrt()  # noqa: E731
    path = float(sum(run.columns()["move"]))
    displacement = torch.tensor(moved, dtype=torch.float64).sqrt()
    return Nondegeneracy(
        as_norm(least), as_norm(most), displacement, as_norm(change), path, _structural(first, len(K_0), x)
    )


def _matrix(a: Factor, b: Factor, masses) -> Tensor:
    gram = a.gram(None if a is b else b, masses)
    return gram.flatten(2).flatten(0, 1)


def _structural(factor: Factor, rows: int, x) -> str:
    """Why J cannot be onto whatever θ: too few parameters, or an input that occurs twice."""
    if factor.size < rows:
        return f"{factor.size} parameters cannot move {rows} outputs freely"
    flat = torch.cat([t.reshape(len(t), -1).double() for t in as_inputs(x) if isinstance(t, Tensor)], 1)
    _, counts = torch.unique(flat, dim=0, return_counts=True)
    return f"{int(counts.max())} samples have the same input: their outputs move together" if counts.max() > 1 else ""
