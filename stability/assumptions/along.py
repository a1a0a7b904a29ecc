"""κ_t, L_t, ξ_t along a twin study: how large they get, where, and whether they are bounded in a sense that can fail."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from nt_kernel.factors import layer_factors
from stability.assumptions.verdict import Assumption
from stability.assumptions.verdicts import verdict_on

TAIL = 10  # the last tenth of a run says at what pace it ends


class Watch:
    """An observer of ``train_twins``: call it once per instant. Keeps series, and where each has its extremum.

    Rows of a run are those of S, with the replaced sample under its own number wherever it stands; a z' has the number of the
    sample that it replaced.
    """

    def __init__(self):
        self.kappa: list[float] = []
        self.L: list[float] = []
        self.rounding: list[float] = []  # rounding radius of H / λ_min(H)
        self.outputs: list[Tensor] = []
        self.places: dict[str, dict] = {}
        self._kappa_at: tuple[dict[str, Tensor], Tensor] | None = None
        self._largest = {"kappa": -math.inf, "L": -math.inf, "rounding": -math.inf, "xi": -math.inf}

    @property
    def instants(self) -> int:
        return len(self.kappa)

    def __call__(self, system, snapshot, eigenvalues: Tensor) -> None:
        """``system``, its ``snapshot`` at this instant, the eigenvalues of H, ascending."""
        own = snapshot.jacobian_norms.clone()  # [V, n + 1]
        own[0, -1] = -1  # no sample
        norms = [(own, False), (snapshot.probe_norms[:, None], True)]
        value, run, row, probe = _largest(norms)
        self.kappa.append(value)
        if self._is_extreme("kappa", value):
            at = 0 if probe else run  # probes follow the S run's parameters
            params = {name: p[at].clone() for name, p in system.params.items()}
            x = _probe_row(system, run) if probe else system.x[run, row]
            self._kappa_at = (params, x[None])
            self._put("kappa", system, run, row, probe)
        residuals = snapshot.residuals.norm(dim=-1)
        residuals[0, -1] = -1
        value, run, row, probe = _largest([(residuals, False), (snapshot.probe_residuals.norm(dim=-1)[:, None], True)])
        self.L.append(value)
        if self._is_extreme("L", value):
            self._put("L", system, run, row, probe)
        smallest = eigenvalues[0].item()
        share = snapshot.H_error / smallest if smallest > 0 else math.inf
        self.rounding.append(share)
        for name, extreme in (("rounding", share), ("xi", -smallest)):
            if self._is_extreme(name, extreme):
                self.places[name] = {"step": self.instants - 1, "sample": _weakest_sample(snapshot.H, system.p)}
        self.outputs.append(snapshot.outputs[0].clone())

    def kappa_layer(self, model: nn.Module) -> str:
        """The layer with the largest ‖J_i,α‖ where κ peaks."""
        params, x = self._kappa_at
        norms = {name: f.block_norms().item() for name, f in layer_factors(model, x, params=params)[1].items()}
        return max(norms, key=norms.get)

    def _is_extreme(self, name: str, value: float) -> bool:
        if value != value or value > self._largest[name]:
            self._largest[name] = math.inf if value != value else value
            return True
        return False

    def _put(self, name: str, system, run: int, row: int, probe: bool) -> None:
        replaced = int(system.replaced[run - (not probe)]) if probe or run else -1
        sample = replaced if probe or row == system.n else row
        self.places[name] = {"step": self.instants - 1, "sample": sample, "replaced": replaced}


def _largest(groups: list[tuple[Tensor, bool]]) -> tuple[float, int, int, bool]:
    """Value, row and column of the largest entry of several [rows, columns], NaN above all, and the group's flag."""
    best = (-math.inf, 0, 0, False)
    for values, flag in groups:
        filled = values.nan_to_num(nan=math.inf, posinf=math.inf)
        index = int(filled.argmax())
        value = values.flatten()[index].item()
        if value != value or value > best[0]:
            best = (value, *divmod(index, values.shape[1]), flag)
    return best


def _probe_row(system, j: int) -> Tensor:
    return system.x[system.trained :].flatten(0, 1)[j]


def _weakest_sample(H: Tensor, p: int) -> int:
    _, vectors = torch.linalg.eigh((H + H.mT).double() / 2)
    return int(vectors[:, 0].reshape(-1, p).square().sum(1).argmax())


def bounded(key: str, series, limit: float, place: Mapping) -> Assumption:
    """sup of a series stays within ``limit`` times its start, and is not on its way out when the run ends.

    - *violated*: not finite somewhere, or above limit·(start);
    - *undecided*: within, but still growing: at the pace of the last tenth of the run it is out before the run could be
      repeated once more (a supremum over the steps that were made is then no bound for those that follow);
    - *holds* otherwise. The value is the supremum itself, the threshold limit·(start).

    >>> bounded("bounded_jacobian", [1.0, 1.4, 1.8], 2.0, {}).verdict, bounded("bounded_jacobian", [1.0, 2.5], 2.0, {}).verdict
    ('undecided', 'violated')
    >>> bounded("bounded_jacobian", [1.0] + [1.5] * 20, 2.0, {}).verdict
    'holds'
    """
    series = np.asarray(series, dtype=float)
    bad = np.flatnonzero(~np.isfinite(series))
    if len(bad):
        step = int(bad[0])
        where = {**place, "step": step}
        return verdict_on(key, math.inf, limit * series[0], "violated", f"not finite from step {step} on", **where)
    start, peak, steps = float(series[0]), float(series.max()), len(series) - 1
    threshold = limit * start
    growth = f"{peak / start:.3g} times its start" if start > 0 else f"{peak:.3g}, from 0"
    if peak > threshold:
        return verdict_on(key, peak, threshold, "violated", growth, **place)
    tail = max(steps // TAIL, 1)
    pace = (series[-1] - series[-1 - tail]) / tail if steps else 0.0
    if pace > 0 and series[-1] + pace * steps > threshold:
        left = math.ceil((threshold - series[-1]) / pace)
        reason = f"{growth}, still growing at the end: at that pace out of bounds {left} steps later"
        return verdict_on(key, peak, threshold, "undecided", reason, **place)
    return verdict_on(key, peak, threshold, "holds", growth, **place)
