"""The Riemannian Lyapunov optimizers of Wang, Patil & Dixon (arXiv 2601.22284): ``RLO``, ``RLOLambda``, ``RLOLifted``."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.lyapunov.retraction import EmbeddedManifold, embedded_manifold
from optim.lyapunov.rlo_options import check_params, checked_eta, checked_lr, checked_options, checked_rule
from optim.lyapunov.rlo_rules import (
    ENTRYWISE,
    EPS,
    SCALE,
    SLOTS,
    Room,
    Tensors,
    bend,
    factor,
    lift,
    own_direction,
    signal,
    unit_norm,
)

Eta = float | Callable[[int], float]
TRANSPORTED = ("mean", "velocity")  # tangent vectors; Adam's square is none, it stays what it is entry by entry
# Options that may be functions: the optimizer's own, never in a state_dict (which torch.load must read with weights_only).
FUNCTIONS = ("direction", "manifold", "eta_schedule")
SET_BETWEEN_STEPS = ("memory", "direction", "betas", "scale", "eps", "normalize", "weight_decay", "manifold")


@dataclass(frozen=True)
class Lifted:
    """What an observer of a step sees of one group, after the lift and before the move; nothing here may be written to, and
    what is to outlast the step must be copied."""

    params: Tensors  # θ, before the move
    velocities: Tensors  # v = (1 − η)v' + ηd
    targets: Tensors  # d
    eta: float
    lr: float
    manifold: EmbeddedManifold


class RLO(torch.optim.Optimizer):
    r"""u ← Ψ(y, ĝ), d = Φ(u), v ← (1 − η)v + ηd, θ ← R_θ(lr·v), v ← P_θ v: the velocity is pulled towards the graph v = d.

    In this order: ĝ = P_θ(p.grad); the memory moves on; d = P_θ Φ(u); with ``normalize`` d ← d/‖d‖ over all parameters; lift;
    θ ← (1 − lr·weight_decay)·θ; θ ← R_θ(lr·v); v and the memory's mean are projected onto the new tangent space. v starts at
    0. With the constant η = 1, v = d and no velocity is kept (RLO-Λ). Without curvature P is the identity, R_θ(u) = θ + u.

    Parameters
    ----------
    lr: step size in units of the direction ("tanh", "sign": the most an entry moves; ``normalize``: the length of a step).
    eta: η ∈ (0, 1], or a function of the number of steps the group has taken, t = 0, 1, …
    memory: Ψ, "gradient", "ema", "lion", "adam", with ``betas`` and ``eps``; formulas in :mod:`optim.lyapunov.rlo_rules`.
    direction: Φ, "identity", "tanh" (of u/``scale``), "sign", "normalized", or a function u → d of one tensor, minus included.
    normalize: one norm over the parameters of all groups that ask for it. weight_decay: decoupled (arXiv 1711.05101).
    manifold: "euclidean", "sphere" (rows of norm 1), "stiefel" (orthonormal columns, rows of a wide matrix), or an
        :class:`optim.lyapunov.retraction.EmbeddedManifold`; every parameter of the group is a point of it.

    All are options of param groups; ``group["eta"]`` and ``group["lr"]`` may be set between steps. Functions are not saved by
    ``state_dict``: a loading optimizer keeps its own. Memory, in copies of the parameters: those of Ψ (0 to 2), v where η < 1,
    and one for d, which is kept between steps and not saved. Special cases, held against the originals in the tests:

    - SGD: memory="gradient", direction="identity", eta=1; with η < 1 it is SGD with momentum 1 − η and learning rate lr·η.
    - AdamW: memory="adam", direction="identity", eta=1. Lion (arXiv 2302.06675): memory="lion", direction="sign", eta=1.

    Raises ValueError/TypeError at construction, and in ``step`` before anything moves for what was set since: options out of
    range, unknown names, parameters off their manifold, a scale of tanh (2/scale = ∞) or an eps too small for a parameter's
    type, a weight decay on the sphere or the Stiefel manifold (θ is normal there, its tangent part is 0); in ``step`` also for
    an η of a schedule outside (0, 1], sparse gradients and a direction of the wrong shape.

    >>> w = torch.nn.Parameter(torch.tensor([2.0]))
    >>> opt = RLO([w], lr=0.5, eta=0.5, memory="gradient", direction="sign")
    >>> for _ in range(2):
    ...     opt.zero_grad()
    ...     (0.5 * w.square()).sum().backward()
    ...     opt.step()  # v = −½, then −¾
    >>> w.item()
    1.375
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        eta: Eta = 0.1,
        memory: str = "ema",
        direction: str | Callable[[Tensor], Tensor] = "tanh",
        betas: tuple[float, float] | None = None,
        scale: float = SCALE,
        eps: float = EPS,
        normalize: bool = False,
        weight_decay: float = 0.0,
        manifold: str | EmbeddedManifold = "euclidean",
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        self.observers: list[Callable[[list[Lifted]], None]] = []
        self._rooms: dict[int, Room] = {}
        self._checked: dict[int, tuple] = {}
        super().__init__(params, {**options, "lr": checked_options(options)["lr"]})

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; a group that is refused is not added."""
        if not isinstance(param_group, dict):
            return super().add_param_group(param_group)  # torch's words for what is no group
        options = checked_options({**self.defaults, **param_group})
        self._check_kind(options)
        params = param_group["params"]
        if not isinstance(params, Tensor | set):  # a set has no order: torch says so
            params = list(params)
        check_params([params] if isinstance(params, Tensor) else params, options)
        super().add_param_group({**options, "params": params})

    def _check_kind(self, group: dict) -> None:
        """Raise where this class has no groups of that kind: with a velocity, ``lifted``, or without."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step; ``closure`` re-evaluates the loss as for any torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        moving = [(group, params) for group, params in moving if params]
        for group, _ in moving:
            self._check_again(group)
        etas = [checked_eta(group) for group, _ in moving]
        if any(p.grad.is_sparse for _, params in moving for p in params):
            raise ValueError("RLO takes dense gradients, got a sparse one; write sparse=False where the layer is made")

        targets = self._all_targets(moving)
        together = [
            d for (group, _), room in zip(moving, targets, strict=True) if group["normalize"] for d in room.blocks
        ]
        if together:
            unit_norm(together)
        seen = []
        for (group, params), room, eta in zip(moving, targets, etas, strict=True):
            velocities = ds = room.tensors
            if group["lifted"]:
                velocities = self._slot("velocity", params)
                lift(velocities, ds, eta)
            group["eta"], group["steps"] = eta, group["steps"] + 1
            seen.append(Lifted(params, velocities, ds, eta, group["lr"], embedded_manifold(group["manifold"])))
        for observer in self.observers:
            observer(seen)
        for (group, _), one in zip(moving, seen, strict=True):
            self._move(one, group["weight_decay"])
        return loss

    def _check_again(self, group: dict) -> None:
        """What was checked at construction, of options set and types changed since; what is still the same costs nothing."""
        group["lr"] = checked_lr(group["lr"])
        now = [group[name] for name in SET_BETWEEN_STEPS], {p.dtype for p in group["params"]}
        if self._checked.get(id(group)) != now:
            checked_rule(group)
            check_params(group["params"], group)
            self._checked[id(group)] = now

    def _all_targets(self, moving: list[tuple[dict, Tensors]]) -> list[Room]:
        if not any(callable(group["direction"]) for group, _ in moving):
            return [self._targets(i, *pair) for i, pair in enumerate(moving)]
        held = {p: _copied(self.state[p]) for _, params in moving for p in params}
        try:
            return [self._targets(i, *pair) for i, pair in enumerate(moving)]
        except BaseException:  # the user's function failed: as if there had been no step
            for p, state in held.items():
                self.state[p] = state
            raise

    def _targets(self, index: int, group: dict, params: Tensors) -> Room:
        """d of one group, each in the tangent space at its parameter; the memory moves on."""
        curved = group["manifold"] != "euclidean"
        P = embedded_manifold(group["manifold"]).tangent
        gradients = [P(p, p.grad) if curved else p.grad for p in params]
        steps = []
        for p in params:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            steps.append(state["step"])
        slots = {name: self._slot(name, params) for name in SLOTS[group["memory"]]}
        # The same memory in every step: to be given new pages takes longer than an operation.
        room = self._rooms.get(index)
        if room is None or not room.fits(params):
            room = self._rooms[index] = Room.like(params)
        phi = group["direction"]
        times = 1.0 if callable(phi) else factor(phi, group["scale"])
        ds = signal(group["memory"], slots, gradients, steps, group["betas"], group["eps"], times=times, room=room)
        if callable(phi):
            ds = own_direction(phi, ds)
        else:
            bend(phi, room.blocks if phi in ENTRYWISE else ds)
        if curved:
            ds = [P(p, d) for p, d in zip(params, ds, strict=True)]
        return room if ds is room.tensors else Room(ds, ds)

    def _slot(self, name: str, params: Tensors) -> Tensors:
        found = []
        for p in params:
            state = self.state[p]
            held = state.get(name)
            if held is None:
                held = state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            elif held.dtype != p.dtype or held.device != p.device:  # of the model as it is now: it may have been cast
                held = state[name] = held.to(p)
            found.append(held)
        return found

    def _move(self, one: Lifted, weight_decay: float) -> None:
        if weight_decay:
            torch._foreach_mul_(one.params, 1 - one.lr * weight_decay)
        if one.manifold.name == "euclidean":
            torch._foreach_add_(one.params, one.velocities, alpha=one.lr)
            return
        for p, v in zip(one.params, one.velocities, strict=True):
            p.copy_(one.manifold.retract(p, one.lr * v))
            for name in TRANSPORTED:
                if name in self.state[p]:
                    self.state[p][name].copy_(one.manifold.tangent(p, self.state[p][name]))

    def state_dict(self) -> dict:
        """As in torch, without the options that are functions."""
        state = super().state_dict()
        for group in state["param_groups"]:
            for name in FUNCTIONS:
                if not isinstance(group[name], str | None):
                    del group[name]
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch; options that ``state_dict`` left out, being functions, stay those of this optimizer.

        Raises ValueError, and loads nothing, where it is of another optimizer or, by its η, of another class of the family.
        """
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            own = [{name: group[name] for name in FUNCTIONS} for group in self.param_groups]
            saved = [{**mine, **group} for mine, group in zip(own, saved, strict=True)]
            for group in saved:
                if "lifted" not in group:
                    raise ValueError(f"expected the state_dict of an RLO, got a group with {', '.join(sorted(group))}")
                self._check_kind(group)
        super().load_state_dict({**state_dict, "param_groups": saved})

    def __setstate__(self, state: dict) -> None:
        self.__dict__.setdefault("observers", [])  # not copied or pickled: they watch the original
        self.__dict__.setdefault("_rooms", {})
        self.__dict__["_checked"] = {}
        super().__setstate__(state)


class RLOLambda(RLO):
    """RLO-Λ: v = d at every step, no velocity is kept (:class:`RLO` with η = 1).

    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> opt = RLOLambda([w], lr=1.0, memory="gradient", direction="identity", normalize=True)
    >>> w.square().sum().backward()
    >>> opt.step()
    >>> w
    Parameter containing:
    tensor([2.4000, 3.2000], requires_grad=True)
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, **options):
        if "eta" in options:
            raise TypeError("RLOLambda has no eta (it is 1); RLOLifted has one")
        super().__init__(params, lr, eta=1.0, **options)

    def _check_kind(self, group: dict) -> None:
        if group["lifted"]:
            raise ValueError(
                f"RLOLambda keeps no velocity, got a group with eta={_said_eta(group)}; expected eta=1, or use RLOLifted"
            )


class RLOLifted(RLO):
    """RLO-Lifted: a velocity of its own, lifted by η < 1 or by a schedule (:class:`RLO`).

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> opt = RLOLifted([w], lr=1.0, eta=lambda t: 1 / (t + 1), memory="gradient", direction="identity")
    >>> w.sum().backward()
    >>> opt.step()
    >>> opt.state[w]["velocity"]
    tensor([-1.])
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, *, eta: Eta = 0.1, **options):
        if not callable(eta) and eta == 1:
            raise ValueError("RLOLifted needs an eta below 1, or a schedule; with eta=1 it is RLOLambda")
        super().__init__(params, lr, eta=eta, **options)

    def _check_kind(self, group: dict) -> None:
        if not group["lifted"]:
            raise ValueError(
                "RLOLifted keeps a velocity in every group, got one made with eta=1; expected an eta below 1 or a schedule, "
                "or use RLOLambda"
            )


def _said_eta(group: dict) -> str:
    return "a schedule" if group.get("eta_schedule") else repr(group["eta"])


def _copied(state: dict) -> dict:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
