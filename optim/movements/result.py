"""What a minimizing movement leaves behind: the sequence in function space and a table of every outer step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.movements.inner import Inner
from optim.movements.tracking import Trajectory, tracking_columns


@dataclass(frozen=True)
class MovementRun:
    """K outer steps: ``trajectory`` in function space, ``inner`` how each was solved; ``energies`` E(u^k), ``exact_energies``
    E(ū^k) [K + 1], ``certificates`` ‖∇F(u^{k+1})‖/(λ + 1/τ) [K], which bound δ_k without the proximal point; ``target`` the δ
    asked for; ``parameters`` θ^k by name, [K + 1, …], where they were kept."""

    trajectory: Trajectory
    inner: tuple[Inner, ...]
    energies: Tensor
    exact_energies: Tensor
    certificates: Tensor
    target: float
    parameters: dict[str, Tensor] | None = None

    @property
    def reached(self) -> bool:
        """True where every outer step came within δ of its proximal point."""
        return all(one.reached for one in self.inner)

    @property
    def reason(self) -> str:
        """Why not, of the first step that did not; "" otherwise."""
        missed = [(k, one) for k, one in enumerate(self.inner) if not one.reached]
        if not missed:
            return ""
        k, one = missed[0]
        return (
            f"outer step {k} stopped at a distance of {one.delta:.3g} from its proximal point, {self.target:g} was asked for "
            f"({one.reason}); {len(missed)} of {len(self.inner)} steps fell short"
        )

    @property
    def iterations(self) -> int:
        """Inner iterations, all steps together."""
        return sum(one.iterations for one in self.inner)

    def columns(self) -> dict[str, list]:
        """{name: [K]}: ``tracking_columns``, and of each inner solve its target, outcome, iterations, passes and seconds."""
        K = len(self.inner)
        found: dict[str, list] = {
            "step": list(range(1, K + 1)),
            "energy": self.energies[1:].tolist(),
            "exact_energy": self.exact_energies[1:].tolist(),
            "asked_delta": [self.target] * K,
            "delta_certificate": self.certificates.tolist(),
        }
        found |= {name: column.tolist() for name, column in tracking_columns(self.trajectory).items()}
        for name in ("reached", "reason", "iterations", "evaluations", "gradients", "seconds"):
            found[name] = [getattr(one, name) for one in self.inner]
        return found

    def to_frame(self):
        """The columns as a pandas DataFrame, one row an outer step."""
        import pandas as pd

        return pd.DataFrame(self.columns())

    def violated(self, slack: float = 1e-9) -> list[str]:
        """Names of the inequalities that do not hold on this run, which then is not one of a λ-convex energy: none expected.

        Rounding: relative ``slack``, and 1e-12 of the size of the outputs.
        """
        c = {
            name: torch.tensor(values, dtype=torch.float64) for name, values in self.columns().items() if name in _SIDES
        }
        room = 1e-12 * max(1.0, self.trajectory.outputs.abs().max().item()) * len(self.inner)
        pairs = [(a, b) for a, b in INEQUALITIES if not bool(c[a].isnan().any() | c[b].isnan().any())]
        return [f"{a} ≤ {b}" for a, b in pairs if bool((c[a] > c[b] * (1 + slack) + room).any())]


# Left ≤ right, at every step.
INEQUALITIES = (
    ("tracking", "tracking_bound"),
    ("tracking_bound", "uniform_bound"),
    ("distance", "distance_bound"),
    ("exact_path", "budget"),
    ("budget", "budget_b0"),
    ("path", "path_bound"),
    ("path_bound", "path_bound_b0"),
    ("delta", "delta_certificate"),
)
_SIDES = {name for pair in INEQUALITIES for name in pair}
