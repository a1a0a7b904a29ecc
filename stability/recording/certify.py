"""``certify``: two recorded runs against each other, from the measured divergence to the paper's bound."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError
from stability.contraction.result import ContractionMetric, metric_enclosure
from stability.enclosures import (
    ellipsoid_norm,
    ellipsoid_radii,
    ellipsoid_step,
    path_length,
    scalar_step,
    spectral_norm,
)
from stability.recording.closed_loop import ClosedLoop
from stability.recording.ladder import flow_ladder
from stability.recording.record import RunRecord
from stability.recording.rung import ALWAYS, ENCLOSURE, NOT_APPLICABLE, THEORY_FREE, Certificate, Cost, Rung

LARGEST = 1e100  # of outputs, and of an enclosure before it counts as infinite: squares must stay in range


def certify(
    run_S: RunRecord,
    run_twin: RunRecord,
    *,
    held_out=None,
    replaced: Sequence[int] | None = None,
    metric: ContractionMetric | None = None,
    scalar: bool = True,
    ladder: bool = True,
    dense: bool | None = None,
    further: Sequence[Callable[[RunRecord, RunRecord, Certificate], Rung]] = (),
) -> Certificate:
    """Measure, enclose and bound the divergence e = y' − y of two recorded runs, on the inputs of ``run_S``.

    Parameters
    ----------
    run_S: the run on S, from :func:`stability.record`; the closed loop A_t is its alone. run_twin: of the same model with as
        many steps, on S' (or on S from other parameters, with another optimizer: T4, T5 and the path hold for any two runs).
    held_out: further inputs to measure e on. replaced: the rows in which S' differs; None: where x or the targets do.
    metric: a discrete contraction metric of the A_t (``stability.contraction_metric(ClosedLoop(run_S).matrices(),
        kind="discrete")``, ``momentum_metric``): adds T4 in it, the way out where ‖A_t‖₂ > 1.
    scalar: T4 needs ‖A_t‖₂, an eigenvalue problem of the states for every step, which can be most of the cost. False leaves
        it out.
    ladder: T0 to T3, where the S run follows metric descent; costs a twin study of these two runs.
    dense: A_t as matrices, or by products with the layers, which have no T4. None: matrices up to 4096 states in e, but
        products where T4 is not asked for, G = D, and there are fewer than D/4 steps: several times cheaper there.
    further: bounds of one's own, functions (run_S, run_twin, certificate so far) → :class:`stability.Rung`, in this order.

    Returns a :class:`Certificate`. Cost for T steps, D = N·p states (2D with memory): the kernel of the S run at every step,
    O(D³) per layer, ‖A_t‖₂, O(D³), and a product of A_t with the t + 1 columns of T5's factor, O(D²·min(T, D)).

    Raises ValueError/TypeError for runs that cannot be compared and what is no rung, NumericalError where outputs are not
    finite.

    >>> from torch import nn
    >>> from stability import record
    >>> def trained(x, a):
    ...     model = nn.Linear(2, 1).double()
    ...     _ = [p.data.fill_(0.1) for p in model.parameters()]
    ...     opt = torch.optim.Adam(model.parameters(), lr=0.05)
    ...     with record(model, x, opt, targets=a) as run:
    ...         for _ in range(10):
    ...             opt.zero_grad()
    ...             (0.5 * (model(x) - a).square().sum(1).mean()).backward()
    ...             opt.step()
    ...     return run
    >>> x, a = torch.eye(2).double(), torch.ones(2, 1).double()
    >>> found = certify(trained(x, a), trained(x, a * torch.tensor([[1.0], [-1.0]])))
    >>> found.replaced, found["T5"].value >= found.measured["sup"], found["T4"].value >= found.measured["l2"]
    ((1,), True, True)
    """
    start = perf_counter()
    _check(run_S, run_twin, metric)
    further = _functions(further)
    grid = [t for t in run_S.times if t in set(run_twin.times)]
    loop = ClosedLoop(run_S, grid, False if dense is None and not scalar and _few_products(run_S) else dense)
    ours, theirs = _outputs(run_S, grid, run_S.reader.x), _outputs(run_twin, grid, run_S.reader.x)
    errors = theirs - ours  # [times, N, p]
    replaced = _replaced(run_S, run_twin) if replaced is None else tuple(int(k) for k in replaced)
    others = [i for i in range(errors.shape[1]) if i not in replaced]
    measured = _measured(errors, replaced, others)
    if held_out is not None:
        there = _outputs(run_twin, grid, held_out) - _outputs(run_S, grid, held_out)
        measured |= {"heldout": there.norm(dim=-1).max().item(), "final_heldout": there[-1].norm(dim=-1).max().item()}
    states = _states(run_S, run_twin, grid, errors) if loop.memory else errors.flatten(1)
    rungs = _paths(errors, measured)
    rungs |= _enclosures(loop, states, errors, measured, replaced, others, scalar)
    if metric is not None:
        rungs["T4_metric"] = _in_metric(loop, states, metric, measured)
    verdicts: tuple[dict, ...] = ()
    if ladder:
        bounds, verdicts = flow_ladder(run_S, run_twin, grid, replaced, measured)
        rungs |= bounds
    held = run_S.nbytes + run_twin.nbytes + max((r.cost.nbytes for r in rungs.values()), default=0)
    found = Certificate(
        rungs, measured, errors, tuple(grid), replaced, loop, loop.exact, loop.description,
        tuple(_notes(run_S, run_twin, grid)), Cost(perf_counter() - start, held), verdicts,
    )  # fmt: skip
    for bound in further:
        found = _with(found, bound(run_S, run_twin, found))
    return found


def _functions(further) -> tuple[Callable, ...]:
    if callable(further) or isinstance(further, str) or not isinstance(further, Iterable):
        raise TypeError(f"further must be a list of functions, got {further!r}; write further=[…]")
    further = tuple(further)
    for bound in further:
        if not callable(bound):
            raise TypeError(f"further must be a list of functions, got {bound!r} in it")
    return further


def _with(found: Certificate, rung) -> Certificate:
    if not isinstance(rung, Rung):
        raise TypeError(f"a function of further must return a Rung, got {type(rung).__name__}")
    if rung.name in found.rungs:
        raise ValueError(f"there is a rung {rung.name!r} already")
    cost = Cost(found.cost.seconds + rung.cost.seconds, max(found.cost.nbytes, rung.cost.nbytes))
    return replace(found, rungs=found.rungs | {rung.name: rung}, cost=cost)


def _check(run_S: RunRecord, run_twin: RunRecord, metric) -> None:
    for name, run in (("run_S", run_S), ("run_twin", run_twin)):
        if not isinstance(run, RunRecord):
            raise TypeError(f"{name} must be a recorded run, what record(…) gives; got {type(run).__name__}")
        if len(run) == 0:
            raise ValueError(
                f"{name} holds no step: train inside `with record(…)`, with the optimizer that was given to it"
            )
    if len(run_S) != len(run_twin):
        raise ValueError(f"the runs have {len(run_S)} and {len(run_twin)} steps; twins take equally many")
    shapes = [{n: tuple(p.shape) for n, p in run.snapshots.held[0].state.items()} for run in (run_S, run_twin)]
    if shapes[0] != shapes[1]:
        raise ValueError("the runs are of models with different parameters")
    if metric is not None and not isinstance(metric, ContractionMetric):
        raise TypeError(f"metric must be a ContractionMetric, got {type(metric).__name__}")


def _few_products(run: RunRecord) -> bool:
    """True where T5 by products with the layers costs less than the matrices, and leaves nothing out."""
    plain = all(
        r.metric.scale == "none" and not r.metric.shares and not isinstance(r.decay, Mapping) and r.pull == 0
        for r in run.rules
    )
    return plain and 4 * len(run) < run.outputs(0).numel()


def _outputs(run: RunRecord, grid: Sequence[int], x) -> Tensor:
    found = []
    for t in grid:
        y = run.outputs(t, x)
        if not bool((y.abs() < LARGEST).all()):
            raise NumericalError(f"training diverged: outputs beyond {LARGEST:g}, or not finite", where=f"step {t}")
        found.append(y)
    return torch.stack(found)


def _replaced(run_S: RunRecord, run_twin: RunRecord) -> tuple[int, ...]:
    """The rows of S whose input or target the twin has replaced."""
    different: set[int] = set()
    pairs = [(run_S.reader.x, run_twin.reader.x), (run_S.targets, run_twin.targets)]
    for ours, theirs in pairs:
        ours, theirs = (v if isinstance(v, tuple) else (v,) for v in (ours, theirs))
        for a, b in zip(ours, theirs, strict=True):
            if not isinstance(a, Tensor) or not isinstance(b, Tensor):
                continue
            if a.shape != b.shape:
                raise ValueError(f"S and S' must be of one size, got {tuple(a.shape)} and {tuple(b.shape)}")
            different |= set(
                (a != b).flatten(1).any(1).nonzero()[:, 0].tolist()
                if a.dim() > 1
                else (a != b).nonzero()[:, 0].tolist()
            )
    return tuple(sorted(different))


def _measured(errors: Tensor, replaced: Sequence[int], others: Sequence[int]) -> dict[str, float]:
    norms = errors.norm(dim=-1)
    found = {}
    for name, part in (("", norms), ("final_", norms[-1:])):
        found[f"{name}sup"] = part.max().item()
        found[f"{name}l2"] = part.square().sum(-1).sqrt().max().item()
        found[f"{name}replaced"] = part[:, list(replaced)].max().item() if replaced else 0.0
        found[f"{name}others"] = part[:, list(others)].max().item() if others else 0.0
    return found


def _states(run_S: RunRecord, run_twin: RunRecord, grid: Sequence[int], errors: Tensor) -> Tensor:
    """(e_t, f_t) with f_t = e_t − e_{t−1}, f_0 = 0, [times, 2D]."""
    moves = [torch.zeros_like(errors[0])]
    for j, t in enumerate(grid[1:], 1):
        if grid[j - 1] == t - 1:
            moves.append(errors[j] - errors[j - 1])
            continue
        if not all(t - 1 in run.snapshots.held for run in (run_S, run_twin)):
            raise ValueError(
                f"momentum needs the parameters before step {t} of both runs; record both with one optimizer"
            )
        moves.append(errors[j] - run_twin.outputs(t - 1, run_S.reader.x) + run_S.outputs(t - 1))
    return torch.cat([errors.flatten(1), torch.stack(moves).flatten(1)], 1)


def _paths(errors: Tensor, measured: dict[str, float]) -> dict[str, Rung]:
    stacked, per_sample = path_length(errors.flatten(1), errors.shape[-1])
    sup = per_sample.amax(-1)
    return {
        "path_l2": Rung(
            "path_l2", "l2", stacked[-1].item(), measured["l2"], THEORY_FREE, ALWAYS, "Σ‖e_{t+1} − e_t‖", series=stacked
        ),
        "path_sup": Rung(
            "path_sup", "sup", sup[-1].item(), measured["sup"], THEORY_FREE, ALWAYS, "max_i Σ‖e_{t+1,i} − e_{t,i}‖",
            series=sup,
        ),
    }  # fmt: skip


def _enclosures(
    loop: ClosedLoop, states: Tensor, errors: Tensor, measured, replaced, others, scalar: bool
) -> dict[str, Rung]:
    """T4 and T5 in one pass over the A_t."""
    D, p = loop.outputs, errors.shape[-1]
    E, F = states[0].norm(), states[0][:, None]
    scalars, radii, stacked = [E], [ellipsoid_radii(F[:D], p)], [ellipsoid_norm(F[:D])]
    spent, most = {"A": 0.0, "T4": 0.0, "T5": 0.0}, {"T4": 0, "T5": 0}
    clock = perf_counter()

    def lap(what: str) -> None:
        nonlocal clock
        now = perf_counter()
        spent[what], clock = spent[what] + now - clock, now

    for j, A in enumerate(loop):
        lap("A")
        w = states[j + 1] - A @ states[j]
        F = ellipsoid_step(F, A @ F, w)
        if bool((F.abs() < LARGEST).all()):
            radii.append(ellipsoid_radii(F[:D], p))
            stacked.append(ellipsoid_norm(F[:D]))
        else:  # the enclosure has exploded, and stays so
            F = torch.full_like(F, torch.inf)
            radii.append(torch.full_like(radii[0], torch.inf))
            stacked.append(torch.full_like(stacked[0], torch.inf))
        lap("T5")
        most["T5"] = max(most["T5"], A.nbytes + 2 * F.numel() * F.element_size())
        if scalar and loop.dense:
            E = scalar_step(E, spectral_norm(A.dense(states)), w.norm())
            scalars.append(E)
            lap("T4")
            most["T4"] = max(most["T4"], A.nbytes + 2 * loop.states**2 * states.element_size())
    series = torch.stack(radii)  # [times, N]
    share = spent["A"] + spent["T5"]
    cost = Cost(share, most["T5"])
    formula = "P⁺ = (1 + 1/β)A P Aᵀ + (1 + β)w wᵀ"
    parts = {"T5": ("sup", series.amax(-1)), "T5_l2": ("l2", torch.stack(stacked))}
    if replaced and others:
        parts["T5_replaced"] = ("replaced", series[:, list(replaced)].amax(-1))
        parts["T5_others"] = ("others", series[:, list(others)].amax(-1))
    found = {
        name: Rung(
            name, what, values.max().item(), measured[what], ENCLOSURE, ALWAYS, formula, cost=cost, series=values
        )
        for name, (what, values) in parts.items()
    }
    if scalar and not loop.dense:
        found["T4"] = Rung(
            "T4", "l2", math.nan, measured["l2"], ENCLOSURE, ALWAYS, "E⁺ = ‖A‖₂E + ‖w‖", NOT_APPLICABLE,
            f"‖A_t‖₂ was not computed: it needs A_t as a matrix, {loop.states} × {loop.states}; write dense=True",
        )  # fmt: skip
    elif scalar:
        values = torch.stack(scalars)
        found["T4"] = Rung(
            "T4", "l2", values.max().item(), measured["l2"], ENCLOSURE, ALWAYS, "E⁺ = ‖A‖₂E + ‖w‖",
            cost=Cost(spent["A"] + spent["T4"], most["T4"]), series=values,
        )  # fmt: skip
    return found


def _in_metric(loop: ClosedLoop, states: Tensor, metric: ContractionMetric, measured) -> Rung:
    start = perf_counter()
    matrices = [A.dense(states) for A in loop]
    values = metric_enclosure(states, matrices, metric)
    nbytes = sum(A.numel() * A.element_size() for A in matrices)
    return Rung(
        "T4_metric", "l2", values.max().item(), measured["l2"], ENCLOSURE, ALWAYS, "E⁺ = ρE + ‖w‖_Θ",
        cost=Cost(perf_counter() - start, nbytes), series=values,
    )  # fmt: skip


def _notes(run_S: RunRecord, run_twin: RunRecord, grid: Sequence[int]) -> list[str]:
    notes = []
    stride = max(b - a for a, b in pairwise(grid))
    if stride > 1:
        notes.append(
            f"every {stride}th step was kept within the budget: all of this is about these {len(grid)} times, and a larger "
            "divergence between them goes unseen"
        )
    for name, run in (("S", run_S), ("twin", run_twin)):
        defect = run.gradient_defect
        if defect is not None and defect > 1e-3:
            notes.append(
                f"the first gradient of the {name} run is not that of the declared loss (‖g − ∇h‖/‖∇h‖ = {defect:.3g}): "
                "A_t is about another step, which T4 and T5 bear, but pay for"
            )
    if any(not _equal(a, b) for a, b in zip(run_S.rows, run_twin.rows, strict=True)):
        notes.append("the runs trained on different rows in some steps: the index stream was not shared")
    return notes


def _equal(a, b) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or (isinstance(a, str) and isinstance(b, str))
