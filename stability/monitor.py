"""The running account of R pairs of runs: measured divergence, constants, bounds and enclosures at every instant."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from stability.bounds import gronwall_step
from stability.constants import (
    column_norm,
    disturbance,
    gradient_bound,
    jacobian_bound,
    kernel_drift,
    metric_norm,
    spectrum_of,
)
from stability.enclosures import ellipsoid_norm, ellipsoid_radii, ellipsoid_step, scalar_step
from stability.loss_ladder import LossLadder
from stability.step_matrix import StepMatrix
from stability.system import Snapshot, TwinSystem

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Monitor:
    """Call :meth:`record` once per instant, in order. ``pairs`` holds [R] tensors, ``run`` floats, per instant.

    ``observer(system, snapshot, eigenvalues of H)`` sees every instant too. T4 and T5 take A_t = I − Δt·H_t∇²ℓ(y_t) of the
    S run, fixed before the twin is seen. ``ladder``: the rungs of a loss that is not quadratic, else None.
    """

    def __init__(self, system: TwinSystem, dt: float, observer: Callable | None = None):
        self.system, self.dt, self.observer = system, dt, observer
        self.pairs: dict[str, list[Tensor]] = defaultdict(list)
        self.run: dict[str, list[float]] = defaultdict(list)
        self.spectrum: list[Tensor] = []
        self._others = torch.ones(system.R, system.n, dtype=torch.bool, device=system.x.device)
        self._others[torch.arange(system.R), system.replaced] = False
        self._last: dict = {}
        self.ladder = None
        if system.sigma is None:
            self.ladder = LossLadder(system.p, dt, system.x, quotient=system.loss.shift_invariant)

    def record(self, snapshot: Snapshot) -> None:
        """Take in one instant."""
        system, pairs = self.system, self.pairs
        e = snapshot.outputs[1:] - snapshot.outputs[0]  # [R, n, p]
        eigenvalues, xi = spectrum_of(snapshot)
        d, drift = disturbance(snapshot, system), kernel_drift(snapshot, system)
        self._record_divergence(e, snapshot)
        pairs["kappa"].append(jacobian_bound(snapshot))
        pairs["L"].append(gradient_bound(snapshot))
        pairs["h"].append(metric_norm(snapshot))
        pairs["column"].append(column_norm(snapshot, system))
        pairs["disturbance"].append(d.norm(dim=-1))
        pairs["drift"].append(drift.norm(dim=-1))
        pairs["twin_train_loss"].append(snapshot.train_loss[1:])
        if self.ladder is not None:
            S = system.loss.secant(snapshot.outputs[:1], snapshot.outputs[1:], system.S_targets)
            self.ladder.record(snapshot.H, snapshot.H_error, S, e.flatten(1), d, drift)
        self._record_enclosures(e.flatten(1))
        loop = StepMatrix(snapshot.H, self.dt, sigma=system.sigma, root=snapshot.root, eigenvalues=eigenvalues)
        self._record_run(snapshot, eigenvalues, loop.rate, xi)
        self._last |= {"e": e.flatten(1), "loop": loop, "xi": xi, "d": d.norm(dim=-1)}
        if self.observer is not None:
            self.observer(system, snapshot, eigenvalues)

    def _record_divergence(self, e: Tensor, snapshot: Snapshot) -> None:
        norms = e.norm(dim=-1)  # [R, n]
        self.pairs["measured_sup"].append(norms.amax(-1))
        self.pairs["measured_l2"].append(e.flatten(1).norm(dim=-1))
        self.pairs["measured_replaced"].append(norms[~self._others])
        self.pairs["measured_others"].append(self._over_others(norms))
        held_out = self.system.held_out_outputs()
        if held_out is not None:
            self.pairs["measured_heldout"].append((held_out[1:] - held_out[0]).norm(dim=-1).amax(-1))
        if snapshot.null_outputs is not None:
            gap = (snapshot.null_outputs - snapshot.outputs[0]).norm(dim=-1).max()
            self.run["null_sup"].append(gap.item())

    def _record_enclosures(self, e: Tensor) -> None:
        last, p = self._last, self.system.p
        if not last:  # e_0: all enclosures start at its size
            state = {"E": e.norm(dim=-1), "F": e[..., None], "path": e.norm(dim=-1)}
            state["T3"] = e.norm(dim=-1) if self.ladder is None else e.new_full((len(e),), torch.nan)
            state["paths"] = e.unflatten(-1, (-1, p)).norm(dim=-1)
        else:
            move = e - last["e"]
            w = move + last["loop"].pull(last["e"])  # e_{t+1} − A_t e_t
            state = {
                "E": scalar_step(last["E"], last["loop"].norm, w.norm(dim=-1)),
                "F": ellipsoid_step(last["F"], last["loop"].apply(last["F"]), w),
                "T3": last["T3"]
                if self.ladder is not None  # not applicable
                else gronwall_step(last["T3"], last["d"], self.system.sigma * last["xi"], self.dt),
                "path": last["path"] + move.norm(dim=-1),
                "paths": last["paths"] + move.unflatten(-1, (-1, p)).norm(dim=-1),
            }
        self._last |= state
        radii = ellipsoid_radii(state["F"], p)
        self.pairs["T3"].append(state["T3"])
        self.pairs["T4"].append(state["E"])
        self.pairs["T5"].append(radii.amax(-1))
        self.pairs["T5_l2"].append(ellipsoid_norm(state["F"]))
        self.pairs["T5_others"].append(self._over_others(radii))
        self.pairs["path_l2"].append(state["path"])
        self.pairs["path_sup"].append(state["paths"].amax(-1))

    def _record_run(self, snapshot: Snapshot, eigenvalues: Tensor, rate: float, xi: float) -> None:
        levels = torch.tensor(QUANTILES, dtype=eigenvalues.dtype, device=eigenvalues.device)
        self.spectrum.append(torch.quantile(eigenvalues, levels).cpu())
        self.run["xi"].append(xi)
        self.run["lambda_max"].append(eigenvalues[-1].item())
        self.run["lambda_max_twin"].append(snapshot.rate)
        self.run["kappa"].append(snapshot.jacobian_norms[0, :-1].max().item())
        self.run["train_loss"].append(snapshot.train_loss[0].item())
        self._record_flow_defect(snapshot, rate)

    def _record_flow_defect(self, snapshot: Snapshot, rate: float) -> None:
        """What an Euler step leaves out of the flow, relative to it: curvature ‖Δy + Δt·Hr‖/‖Δt·Hr‖, or Δtλ_max(ΛHΛᵀ)/2."""
        y, r, defect = snapshot.outputs[0].flatten(), snapshot.residuals[0, :-1].flatten(), 0.0
        if "y" in self._last:
            linear = self._last["pull"]
            if linear.norm() > 1e-9 * self._last["first_pull"]:
                defect = ((y - self._last["y"] + linear).norm() / linear.norm()).item()
        pull = self.dt * snapshot.H @ r
        self._last |= {"y": y, "pull": pull}
        self._last.setdefault("first_pull", pull.norm())
        self.run["flow_defect"].append(max(defect, self.dt * rate / 2))

    def _over_others(self, per_sample: Tensor) -> Tensor:
        """max over i ≠ k, [R, n] → [R]; 0 for n = 1."""
        return per_sample.masked_fill(~self._others, 0).amax(-1)
