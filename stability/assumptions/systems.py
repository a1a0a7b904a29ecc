"""What is assumed of the other two systems: of optimizers with a velocity (NAIM) and of minimizing movements.

Numbers of a finished run in, an :class:`AssumptionReport` out, as of ``check_assumptions``; both systems have data and losses
of their own, so that nothing is trained here.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nt_kernel.mass import Mass
from optim.movements.convexity import SLACK
from optim.movements.degeneracy import local_nondegeneracy
from optim.movements.energy import ConvexEnergy, Energy
from optim.movements.result import MovementRun
from optim.naim import NaimRecord
from optim.naim_lyapunov import descent_margin, lyapunov, steady_state
from stability.assumptions.catalogue import NEGLIGIBLE, SYSTEMS
from stability.assumptions.report import AssumptionReport
from stability.assumptions.verdict import Assumption
from stability.assumptions.verdicts import undecided, verdict_on


def naim_assumptions(
    record: NaimRecord, *, smoothness: float | None = None, floor: float = 0.0, limit: float = NEGLIGIBLE
) -> AssumptionReport:
    """Strict descent, the recursion of the residual and the dissipation inequality, on what a :class:`optim.NaimMonitor` saw.

    Parameters
    ----------
    smoothness: L of ∇h; without it strict descent is undecided. It speaks of d = −∇h (memory "gradient", "identity", full
        batches), which a record cannot tell.
    floor: a lower bound of h. limit: largest relative error of the recursion (raise it for parameters in half precision).

    Raises TypeError for anything but a record and for a floor that is no number; ValueError for a smoothness or a limit that
    is no finite number ≥ 0, and for a floor that is not finite or above a loss.

    >>> from optim import RLO, NaimMonitor
    >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    >>> opt = RLO([w], lr=0.1, eta=0.5, memory="gradient", direction="identity")
    >>> naim = NaimMonitor(opt)
    >>> for _ in range(5):
    ...     opt.zero_grad()
    ...     h = 0.5 * w.square().sum()
    ...     naim.note_loss(h)
    ...     h.backward()
    ...     opt.step()
    >>> [(v.assumption, v.verdict) for v in naim_assumptions(naim.record(), smoothness=1.0)]
    [('strict descent', 'holds'), ('residual recursion', 'holds'), ('dissipation', 'holds')]
    """
    if not isinstance(record, NaimRecord):
        raise TypeError(f"record must be a NaimRecord, what NaimMonitor.record() gives; got {type(record).__name__}")
    if isinstance(floor, bool) or not isinstance(floor, int | float):
        raise TypeError(f"floor must be a number, a lower bound of h; got {floor!r}")
    if not math.isfinite(floor):
        raise ValueError(f"floor must be finite, a lower bound of h; got {floor!r}")
    for name, value in (("smoothness", smoothness), ("limit", limit)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
        ):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    constants = _constants(record)
    found = (_descent(constants, smoothness), _recursion(record, limit), _dissipation(record, constants, floor))
    return AssumptionReport(found, {"steps": len(record.residual)})


def movement_assumptions(
    run: MovementRun,
    energy: Energy,
    model: nn.Module | None = None,
    x=None,
    *,
    mass: Mass = 1.0,
    output: Callable | None = None,
) -> AssumptionReport:
    """Convexity of E, inexactness, local non-degeneracy and interior localisation of a movement.

    The last two need ``model`` and ``x`` and a run that kept its parameters, and are undecided otherwise; ``mass``, ``output``
    as of :func:`optim.movements.degeneracy.local_nondegeneracy`.

    Raises TypeError for a run, an energy or a model that is none, ValueError for a model without its inputs.

    >>> from optim import SquaredEnergy, minimizing_movements
    >>> model, x = nn.Linear(1, 1, bias=False, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    >>> energy = SquaredEnergy(torch.ones(1, 1))
    >>> run = minimizing_movements(model, x, energy, tau=1.0, steps=2, delta=1e-6, keep_parameters=True)
    >>> report = movement_assumptions(run, energy, model, x)
    >>> report.verdict, report["convex_energy"].value, report["inexactness"].threshold
    ('holds', 1.0, 1e-06)
    """
    for name, value, wanted in (("run", run, MovementRun), ("energy", energy, Energy), ("model", model, nn.Module)):
        if not isinstance(value, wanted) and not (name == "model" and value is None):
            raise TypeError(f"{name} must be of type {wanted.__name__}, got {type(value).__name__}")
    if model is not None and x is None:
        raise ValueError("model was given without x, the inputs of the run")
    trajectory = run.trajectory
    points = torch.cat([trajectory.outputs, trajectory.proximal, trajectory.exact])
    found = [convex_energy(energy, points), inexactness(run)]
    if model is None or run.parameters is None:
        missing = "no model was given" if model is None else "the run did not keep its parameters"
        keys = ("local_nondegeneracy", "interior_localisation")
        found += [undecided(key, SYSTEMS[key].limit, missing) for key in keys]
    else:
        seen = local_nondegeneracy(model, x, run, mass=mass, output=output)
        found += [Assumption(**verdict.to_dict()) for verdict in seen.verdicts()]
    context = {"steps": len(run.inner), "tau": trajectory.tau, "delta": run.target, "energy": energy.name}
    return AssumptionReport(tuple(found), context)


def convex_energy(energy: Energy, points: Tensor) -> Assumption:
    """λ_min(∇²E) ≥ λ, up to rounding, at every one of ``points`` [K, N, C]: no more is claimed of a callable.

    >>> double_well = ConvexEnergy(lambda u: (u * u - 1).square().sum(1))  # E'' = 12u² − 4
    >>> verdict = convex_energy(double_well, torch.tensor([[[1.0]], [[0.5]]], dtype=torch.float64))
    >>> verdict.verdict, round(verdict.value, 9), verdict.step
    ('violated', -1.0, 1)
    """
    least, where, slack = math.inf, -1, 0.0
    everywhere = not isinstance(energy, ConvexEnergy)
    for k, u in enumerate(points[:1] if everywhere else points):
        curvature = energy.curvature(u)
        if not bool(curvature.hessian.isfinite().all()):
            return undecided("convex_energy", energy.convexity, "the Hessian is not finite", step=k)
        value = curvature.smallest()
        if value < least:
            least, where, slack = value, k, SLACK * max(1.0, curvature.hessian.abs().max().item())
    holds = least >= energy.convexity - slack
    if holds:
        reason = (
            "the energy is quadratic: its Hessian is one" if everywhere else "so at every point of the run; not beyond"
        )
    else:
        reason = f"{energy.name!r} claims λ = {energy.convexity:g}"
    margin = max(0.0, least - energy.convexity) if holds else least - energy.convexity
    place = {} if everywhere else {"step": where}
    return verdict_on(
        "convex_energy", least, energy.convexity, "holds" if holds else "violated", reason, margin=margin, **place
    )


def inexactness(run: MovementRun) -> Assumption:
    """‖u^{k+1} − P(u^k)‖ ≤ δ at every outer step, measured; P(u^k) is exact."""
    deltas = [one.delta for one in run.inner]
    step = max(range(len(deltas)), key=deltas.__getitem__)
    verdict, reason = ("holds", "every outer step came within δ") if run.reached else ("violated", run.reason)
    return verdict_on("inexactness", deltas[step], run.target, verdict, reason, step=step)


def _constants(record: NaimRecord) -> tuple[float, float] | str:
    """(lr, η), or why there are none."""
    if not len(record.residual):
        return "no step was recorded"
    try:
        lr, eta = record.constant("lr"), record.constant("eta")
    except ValueError as error:
        return str(error)
    return (lr, eta) if lr > 0 else "lr is 0: nothing moves"


def _descent(constants: tuple[float, float] | str, smoothness: float | None) -> Assumption:
    if isinstance(constants, str) or smoothness is None:
        reason = constants if isinstance(constants, str) else "no smoothness L of ∇h was given"
        return undecided("strict_descent", 0.0, reason)
    lr, eta = constants
    margin = descent_margin(lr, eta, smoothness)
    verdict = "holds" if margin > 0 else "violated"
    return verdict_on("strict_descent", margin, 0.0, verdict, f"lr = {lr:g}, η = {eta:g}, L = {smoothness:g}")


def _recursion(record: NaimRecord, limit: float) -> Assumption:
    known = record.recursion.isfinite()
    if not bool(known.any()):
        return undecided("residual_recursion", limit, "η is unknown, or fewer than two steps in a row were recorded")
    step = int(torch.where(known, record.recursion, -1.0).argmax())
    value = float(record.recursion[step])
    holds = value <= limit
    reason = "the recursion is exact up to rounding" if holds else "another η, or another target, than the one claimed"
    return verdict_on("residual_recursion", value, limit, "holds" if holds else "violated", reason, step=step)


def _dissipation(record: NaimRecord, constants: tuple[float, float] | str, floor: float) -> Assumption:
    if isinstance(constants, str):
        return undecided("dissipation", 0.0, constants)
    if len(record.residual) < 2 or not bool(record.loss.isfinite().all() & record.forcing[1:].isfinite().all()):
        return undecided(
            "dissipation", 0.0, "V needs two steps in a row and h at each: call note_loss(h) before every step"
        )
    lr, eta = constants
    V = lyapunov(record, floor)
    found = steady_state(V, record.forcing, eta=eta, lr=lr)
    if found.applicable:
        reason = f"with c₃ = {found.c3:.3g}, fitted to these steps: no forecast"
        return verdict_on("dissipation", found.rate, 0.0, "holds", reason)
    rise = torch.where(record.forcing[1:] == 0, V.diff() / V[:-1].clamp_min(torch.finfo(V.dtype).tiny), -math.inf)
    step = int(rise.argmax())
    return verdict_on("dissipation", -float(rise[step]), 0.0, "violated", found.reason, step=step + 1)
