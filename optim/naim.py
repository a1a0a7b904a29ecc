"""Is the graph v = d attracting? Diagnostics of the normally attracting invariant manifold (NAIM) of arXiv 2601.22284.

A velocity v is pulled towards a target d(θ): v ← (1 − η)v + ηd. Its residual z = v − d obeys, exactly,

    z⁺ = (1 − η)(z − Δd),   Δd = d⁺ − d,

on a manifold with z and d transported to the new point. A :class:`NaimMonitor` measures it at every step of an optimizer, by
scalars only. What those scalars prove or fit: :func:`fitted_factor`, :func:`contraction_rate`, :func:`residual_bound` here,
the Lyapunov function and theorem 3.1 in :mod:`optim.naim_lyapunov`.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from optim.lyapunov.retraction import EmbeddedManifold
from optim.lyapunov.rlo_options import check_number
from optim.rlo import RLO, Lifted

NAN = float("nan")


@dataclass(frozen=True)
class NaimRecord:
    """Scalars of T steps, each [T] in float64; nan where unknown (all that compares with the step before, at the first one).

    residual ‖z‖, target ‖d‖, velocity ‖v‖, alignment cos(v, d), forcing ‖Δd‖, inflow ‖z − Δd‖ with the z of the step before,
    passed ⟨z⁺, z − Δd⟩, recursion ‖z⁺ − (1 − η)(z − Δd)‖/max(‖v⁺‖, ‖d⁺‖), loss h(θ) before the move.
    """

    eta: Tensor
    lr: Tensor
    residual: Tensor
    target: Tensor
    velocity: Tensor
    alignment: Tensor
    forcing: Tensor
    inflow: Tensor
    passed: Tensor
    recursion: Tensor
    loss: Tensor

    @property
    def thickness(self) -> Tensor:
        """‖z‖/‖d‖, how far off the graph in units of the target; inf or nan where d = 0."""
        return self.residual / self.target

    def constant(self, name: str) -> float:
        """The one value of ``eta`` or ``lr``; ValueError where it is unknown or changed along the run."""
        values = getattr(self, name)
        if not len(values) or not bool((values == values[0]).all()):
            raise ValueError(f"{name} is not one known number along this run: {values.unique().tolist()[:5]}")
        return float(values[0])


class NaimMonitor:
    """Records v and d of every step of ``optimizer``: an :class:`optim.rlo.RLO`, torch's SGD with momentum, Adam, AdamW.

    With SGD's buffer b ← μb + (1 − τ)g: v = −b, η = 1 − μ, d = −(1 − τ)g/η. With Adam's mean: v = −m, d = −g, η = 1 − β₁, the
    preconditioner left out of both. Any other optimizer (Woodbury, NAdam, RAdam, Adamax, RMSprop): call :meth:`add` after each
    of its steps, where it has a velocity that follows a target. ``note_loss`` before the
    step supplies h for the Lyapunov function. Reads are copies; the run is the same bit for bit.

    Raises TypeError for an unknown optimizer, ValueError for SGD without momentum, with Nesterov, and for coupled weight decay
    or maximize (the target is not −g then), at construction and, set since, after the step.

    >>> w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    >>> opt = RLO([w], lr=0.1, eta=0.25, memory="gradient", direction="identity")
    >>> with NaimMonitor(opt) as naim:
    ...     for _ in range(20):
    ...         opt.zero_grad()
    ...         h = 0.5 * w.square().sum()
    ...         naim.note_loss(h)
    ...         h.backward()
    ...         opt.step()
    >>> record = naim.record()
    >>> round(fitted_factor(record)[0], 12), bool(record.recursion[1:].max() < 1e-14)
    (0.75, True)
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None):
        self._rows: list[tuple[float, ...]] = []
        self._before: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._loss = NAN
        self._detach: Callable[[], None] = lambda: None
        if isinstance(optimizer, RLO):
            optimizer.observers.append(self._lifted)
            self._detach = lambda: optimizer.observers.remove(self._lifted)
        elif optimizer is not None:
            check_readable(optimizer)
            self._detach = optimizer.register_step_post_hook(self._stepped).remove

    def __enter__(self) -> "NaimMonitor":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; the record stays."""
        self._detach()
        self._detach = lambda: None

    def note_loss(self, loss: Tensor | float) -> None:
        """h(θ) at the point from which the next step leaves."""
        self._loss = float(loss.detach() if isinstance(loss, Tensor) else loss)

    @torch.no_grad()
    def add(
        self,
        velocities: Sequence[Tensor],
        targets: Sequence[Tensor],
        *,
        eta: float | Sequence[float] = NAN,
        lr: float | Sequence[float] = NAN,
        keys: Sequence[Hashable] | None = None,
        points: Sequence[tuple[EmbeddedManifold, Tensor]] | None = None,
    ) -> None:
        """One step: v after the lift and the d it was lifted towards, one tensor per parameter.

        ``eta`` and ``lr`` may differ between parameters (they are then recorded as unknown). ``keys`` say which parameter is
        which where not all take part in every step; after a change the comparison with the step before is left out.
        ``points``, (manifold, θ before the move) of each, are where the last step's vectors are transported to.

        Raises, and records nothing, ValueError for other counts or shapes than those of ``velocities`` (and of the step
        before), η outside (0, 1], lr outside [0, ∞), nan being unknown; TypeError for what is no tensor or no number.
        """
        count = len(velocities)
        keys = range(count) if keys is None else keys
        etas, lrs = (list(x) if isinstance(x, Sequence) else [x] * count for x in (eta, lr))
        points = [None] * count if points is None else points
        if not count == len(targets) == len(keys) == len(etas) == len(lrs) == len(points):
            raise ValueError(
                f"expected as many of each, got {count} velocities, {len(targets)} targets, {len(keys)} keys, "
                f"{len(etas)} etas, {len(lrs)} lrs, {len(points)} points"
            )
        if not count:
            raise ValueError("no velocities: a step moves at least one parameter")
        same = set(keys) == set(self._before)
        for i, (key, v, d) in enumerate(zip(keys, velocities, targets, strict=True)):
            _check_pair(i, v, d, self._before[key][0] if same else None)
        for own in etas:
            if own == own:
                check_number("eta", own, 1, open_below=True, closed_above=True)
        for own in lrs:
            if own == own:
                check_number("lr", own)
        now, sums = {}, []
        for i, (key, v, d, own) in enumerate(zip(keys, velocities, targets, etas, strict=True)):
            v, d = v.detach().to(torch.float64), d.detach().to(torch.float64, copy=True)
            z = v - d
            now[key] = z, d
            dots = [z.square().sum(), d.square().sum(), v.square().sum(), (v * d).sum()]
            if same:
                z_before, d_before = self._before[key]
                if points[i] is not None:
                    manifold, p = points[i]
                    p = p.detach().to(torch.float64)
                    z_before, d_before = manifold.tangent(p, z_before), manifold.tangent(p, d_before)
                step = d - d_before
                w = z_before - step
                gap = z - (1 - own) * w
                dots += [step.square().sum(), w.square().sum(), (z * w).sum(), gap.square().sum()]
            sums.append(torch.stack([x.cpu() for x in dots]))
        zz, dd, vv, vd, *rest = torch.stack(sums).sum(0).tolist()
        ss, ww, zw, gg = rest or [NAN] * 4
        size = max(vv, dd) ** 0.5
        self._rows.append(
            (
                _one(etas),
                _one(lrs),
                zz**0.5,
                dd**0.5,
                vv**0.5,
                vd / (vv * dd) ** 0.5 if vv * dd > 0 else NAN,
                ss**0.5,
                ww**0.5,
                zw,
                (gg**0.5 / size if size else gg**0.5),
                self._loss,
            )
        )
        self._before, self._loss = now, NAN

    def record(self) -> NaimRecord:
        """What has been recorded so far."""
        names = [field.name for field in fields(NaimRecord)]
        columns = torch.tensor(self._rows, dtype=torch.float64).reshape(-1, len(names)).unbind(1)
        return NaimRecord(**dict(zip(names, columns, strict=True)))

    def _lifted(self, groups: list[Lifted]) -> None:
        if not groups:
            return
        flat = [
            (one, p, v, d) for one in groups for p, v, d in zip(one.params, one.velocities, one.targets, strict=True)
        ]
        self.add(
            [v for _, _, v, _ in flat],
            [d for _, _, _, d in flat],
            eta=[one.eta for one, *_ in flat],
            lr=[one.lr for one, *_ in flat],
            keys=[p for _, p, *_ in flat],
            points=[(one.manifold, p) for one, p, *_ in flat],
        )

    def _stepped(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        check_readable(optimizer)  # what it was when the watch began may have been set otherwise since
        flat = list(velocity_pairs(optimizer))
        if flat:
            keys, velocities, targets, etas, lrs = map(list, zip(*flat, strict=True))
            self.add(velocities, targets, eta=etas, lr=lrs, keys=keys)


def check_readable(optimizer: torch.optim.Optimizer) -> None:
    """Raise unless v and d of ``optimizer`` can be read off its state (:class:`NaimMonitor`)."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam):
        raise TypeError(
            f"the velocity of {kind} is not known here (known are RLO, SGD with momentum, Adam, AdamW): make NaimMonitor() "
            "and call add(v, d, eta=…) after each step, v its velocity and d what it is pulled to. Woodbury with momentum μ, "
            'without Nesterov: v = −opt.state[p]["momentum_buffer"], d = −(1 − dampening)·G⁻¹g/(1 − μ), η = 1 − μ, with G⁻¹g '
            "from nt_kernel.ModelMetric before the step (docs/rlo.md, section 4)"
        )
    for group in optimizer.param_groups:
        coupled = group["weight_decay"] and not group.get("decoupled_weight_decay", False)
        if coupled or group.get("maximize"):
            raise ValueError(f"{kind} with coupled weight_decay or maximize has another target than −g; use add(v, d)")
        if isinstance(optimizer, torch.optim.SGD) and (not 0 < group["momentum"] < 1 or group["nesterov"]):
            raise ValueError(
                "SGD has a velocity that it follows only with momentum > 0 (and below 1) and nesterov=False, got "
                f"momentum={group['momentum']!r}, nesterov={group['nesterov']!r}"
            )


def velocity_pairs(optimizer: torch.optim.Optimizer):
    """(parameter, v, d, η, lr) of torch's SGD, Adam and AdamW after a step, gradients still in place."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if p.grad is None:
                continue
            if "exp_avg" in state:
                yield p, -state["exp_avg"], -p.grad, 1 - float(group["betas"][0]), float(group["lr"])
            elif state.get("momentum_buffer") is not None:
                eta = 1 - group["momentum"]
                yield p, -state["momentum_buffer"], p.grad * (-(1 - group["dampening"]) / eta), eta, float(group["lr"])


def fitted_factor(record: NaimRecord) -> tuple[float, float]:
    """(f, misfit): the least-squares f of z⁺ = f·(z − Δd) over the run, and ‖z⁺ − f·(z − Δd)‖/‖z⁺‖ of it; η is not used.

    For v ← (1 − η)v + ηd with a constant η, f = 1 − η and the misfit is √rounding. nan where nothing flowed in.
    """
    ok = record.inflow.isfinite() & (record.inflow > 0)
    ww, zw, zz = record.inflow[ok].square().sum(), record.passed[ok].sum(), record.residual[ok].square().sum()
    if not bool(ok.any()):
        return NAN, NAN
    f = zw / ww
    return float(f), float(((zz - f * zw).clamp_min(0) / zz).sqrt()) if zz > 0 else 0.0


@dataclass(frozen=True)
class Rate:
    """A contraction rate: mean log(‖z⁺‖/‖z‖) over ``pairs`` steps, log(1 − η), and how far apart they may be."""

    value: float
    expected: float
    tolerance: float
    pairs: int


def contraction_rate(record: NaimRecord, forced: float = 0.1) -> Rate:
    """The rate at which ‖z‖ itself shrinks, over the steps with q = ‖Δd‖/‖z‖ ≤ ``forced``, against the mean log(1 − η) there.

    **Derived.** |log(‖z⁺‖/‖z‖) − log(1 − η)| ≤ −log(1 − q), from z⁺ = (1 − η)(z − Δd); ``tolerance`` is the mean of the right
    side (no bound on a curved manifold, where transport shortens z). nan with 0 pairs where no step is so little forced.

    Raises ValueError for ``forced`` outside (0, 1), TypeError where it is no number.

    >>> naim = NaimMonitor()
    >>> for t in range(5):  # a target that stands still
    ...     naim.add([torch.tensor([1 + 0.5**t])], [torch.tensor([1.0])], eta=0.5)
    >>> rate = contraction_rate(naim.record())
    >>> round(rate.value, 6), round(rate.expected, 6), rate.pairs
    (-0.693147, -0.693147, 4)
    """
    check_number("forced", forced, 1, open_below=True)
    before, after, step, eta = record.residual[:-1], record.residual[1:], record.forcing[1:], record.eta[1:]
    ok = (before > 0) & (after > 0) & (step <= forced * before)
    if not bool(ok.any()):
        return Rate(NAN, NAN, NAN, 0)
    q = step[ok] / before[ok]
    value, expected = (after[ok] / before[ok]).log().mean(), torch.log1p(-eta[ok]).mean()
    return Rate(float(value), float(expected), float(-torch.log1p(-q).mean()), int(ok.sum()))


def residual_bound(record: NaimRecord) -> tuple[Tensor, float]:
    """(B, steady): B_{t+1} = (1 − η)(B_t + ‖Δd‖) ≥ ‖z_{t+1}‖ from B_0 = ‖z_0‖, [T], and its limit, ((1 − η)/η)·sup‖Δd‖.

    **Derived**, by the triangle inequality; on a manifold too, as projections do not lengthen. Holds for every run whose
    parameters take part in all steps. ``steady`` is nan where η varies or is unknown, and 0 for η = 1.
    """
    bound = [record.residual[0]] if len(record.residual) else []
    for eta, step in zip(record.eta[1:], record.forcing[1:], strict=True):
        bound.append((1 - eta) * (bound[-1] + step))
    if not bound:
        raise ValueError("an empty record: no step was taken while the monitor watched")
    try:
        eta = record.constant("eta")
    except ValueError:
        return torch.stack(bound), NAN
    known = record.forcing[1:]
    return torch.stack(bound), (1 - eta) / eta * float(known.max()) if len(known) else NAN


def _check_pair(i: int, v, d, before: Tensor | None) -> None:
    for name, x in (("velocity", v), ("target", d)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} {i} must be a tensor, got {type(x).__name__}")
    if v.shape != d.shape:
        raise ValueError(f"velocity and target {i} must be of one shape, got {tuple(v.shape)} and {tuple(d.shape)}")
    if before is not None and v.shape != before.shape:
        raise ValueError(f"velocity {i} must be {tuple(before.shape)} as in the step before, got {tuple(v.shape)}")


def _one(values: Sequence[float]) -> float:
    """The value all have, nan where they differ."""
    return float(values[0]) if all(v == values[0] for v in values) else NAN
