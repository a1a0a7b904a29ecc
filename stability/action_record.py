"""``record_action``: the action principle held against a training loop, whatever its optimizer."""

from collections.abc import Callable
from dataclasses import fields
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nt_kernel.capture.probe import split_state
from nt_kernel.errors import NumericalError
from nt_kernel.mass import Mass
from nt_kernel.metric.model_metric import ModelMetric
from nt_kernel.metric.output_metric import OutputMetric
from optim.steps.risk import risk_at
from stability.action import ActionTerms, action_balance, action_terms

if TYPE_CHECKING:
    import pandas as pd

TERMS = tuple(field.name for field in fields(ActionTerms))


def record_action(
    model: nn.Module,
    x,
    loss: Callable[[Tensor], Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    every: int = 1,
    mass: Mass = 1.0,
    output_metric: "str | OutputMetric | Callable" = "identity",
    scale: str = "mean",
    blocks: str = "layer",
    solver: str = "auto",
    output: Callable | None = None,
) -> "ActionRecord":
    """Record the action along a loop: a context manager that gives the :class:`ActionRecord` it fills.

    Parameters
    ----------
    model: what is trained. x, loss: the data that h, ∇h and G are taken on, all of it, whatever batches the loop uses;
        ``loss`` takes the model's outputs to the losses of the samples [N] or to their mean.
    optimizer: its steps are marked as they come, with the lr of its groups; None: call :meth:`ActionRecord.mark` yourself.
    every: with an optimizer, look at every so many steps, as one step of their summed lr.
    mass, output_metric, scale, blocks, solver, output: the metric in which the run is judged, as for
        :class:`optim.Woodbury`. A run of Woodbury is on the principle only in its own metric.

    A mark costs what a step of Woodbury does on x (one pass with a backward pass per output, one inner system per
    block), two products with J and two with Jᵀ more, one forward pass, and a copy of the parameters. Nothing of the
    model, the optimizer or their gradients is changed. Raises ValueError/TypeError for bad arguments.

    >>> from optim import Woodbury
    >>> model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> x, half_square = torch.tensor([[2.0]], dtype=torch.float64), lambda y: 0.5 * y.square().sum(1)
    >>> opt = Woodbury(model, lr=0.5)
    >>> with record_action(model, x, half_square, optimizer=opt) as action:
    ...     for _ in range(3):
    ...         opt.zero_grad()
    ...         half_square(model(x)).mean().backward()
    ...         opt.step()
    >>> bool(action.steps["hamiltonian_relative"].abs().max() < 1e-12), action.defect < 1e-15, action.action_gap > 0
    (True, True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"record_action takes the model, an nn.Module; got {type(model).__name__}")
    if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of steps, 1 or more; got {every!r}")
    options = {"mass": mass, "output_metric": output_metric, "scale": scale, "blocks": blocks, "solver": solver}
    return ActionRecord(model, x, loss, optimizer, every, {**options, "output": output})


class ActionRecord:
    """The run so far: ``steps``, the series of its steps, and the totals; made by :func:`record_action`.

    Time: the velocity of a step is Δθ/lr, lr what the optimizer calls so (or what is given to ``mark``). That is the
    time of the flow for Euler steps of it, like Woodbury and plain SGD. For Adam or momentum it is a convention on which
    the action, the Hamiltonian and the defect depend; ``length``, ``scale_free_gap``, the direction, curvature and
    alignment of the steps hold no lr and compare optimizers.
    """

    def __init__(self, model: nn.Module, x, loss, optimizer, every: int, options: dict):
        self.model, self._x, self._loss, self._options = model, x, loss, options
        self._optimizer, self._every, self._handle = optimizer, every, None
        if optimizer is not None:
            self._optimizer_lr()
        ModelMetric(model, x, **options)  # what is wrong with the arguments is said here, not in the first step
        self._rows: list[dict[str, float]] = []
        self._params, self._elapsed, self._pending = self._now(), 0.0, 0
        h, self._r = self._risk()
        self._h = [h]

    def __enter__(self) -> "ActionRecord":
        if self._optimizer is not None:
            self._handle = self._optimizer.register_step_post_hook(self._stepped)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._handle is not None:
            self._handle.remove()
        if self._pending and kind is None:
            self.mark(self._elapsed)

    def __len__(self) -> int:
        """T, the number of recorded steps."""
        return len(self._rows)

    def mark(self, lr: float) -> None:
        """The parameters as they are now end a step that began where the last one ended and took the time ``lr``.

        Raises ValueError unless lr is positive and finite, NumericalError, naming the step, where training diverged.
        """
        if isinstance(lr, bool) or not isinstance(lr, int | float | Tensor):
            raise TypeError(f"mark takes lr, the duration of the step, a positive number; got {lr!r}")
        lr = float(lr)
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr, the duration of the step, must be positive and finite; got {lr!r}")
        after, where = self._now(), f"step {len(self)}"
        velocity = {name: (p.double() - self._params[name].double()) / lr for name, p in after.items()}
        try:
            metric = ModelMetric(self.model, self._x, params=self._params, **self._options)
            terms = action_terms(metric, velocity, self._r)
        except NumericalError as error:
            raise NumericalError(str(error), where=where) from error
        h, r = self._risk()
        row = {"lr": lr, **{name: getattr(terms, name).item() for name in TERMS}}
        if not all(map(isfinite, (h, *row.values()))):
            raise NumericalError("the risk or the velocity is not finite (did training diverge?)", where=where)
        self._rows.append(row)
        self._h.append(h)
        self._params, self._r, self._elapsed, self._pending = after, r, 0.0, 0

    @property
    def h(self) -> Tensor:
        """The risk before the first step and after each, [T + 1]."""
        return torch.tensor(self._h, dtype=torch.float64)

    @property
    def steps(self) -> dict[str, Tensor]:
        """Series over the steps, [T] each, float64 on the CPU; G, ∇h at the start of the step, θ̇ = Δθ/lr:

        lr; h, h_next; kinetic, potential, power, mismatch, misdirection (:class:`stability.action.ActionTerms`);
        hamiltonian T − V, and hamiltonian_relative (T − V)/(T + V), in [−1, 1], 0 where both vanish; action, length, speed,
        direction, curvature, defect (:func:`stability.action.action_balance`); alignment
        −∇hᵀΔθ/(‖Δθ‖_G‖∇h‖_{G⁻¹}), the cosine in G between the step and −G⁻¹∇h, NaN where one of them vanishes.
        """
        h, column = self.h, lambda name: torch.tensor([row[name] for row in self._rows], dtype=torch.float64)
        found = {"lr": column("lr"), "h": h[:-1], "h_next": h[1:], **{name: column(name) for name in TERMS}}
        T, V = found["kinetic"], found["potential"]
        found["hamiltonian"] = T - V
        found["hamiltonian_relative"] = (T - V) / torch.where(T + V > 0, T + V, 1)
        found |= action_balance(found["lr"], T, V, found["power"], found["misdirection"], h)
        found["alignment"] = 1 - found["direction"] / found["length"]  # −∇hᵀΔθ = length − direction
        return found

    def total(self, name: str) -> float:
        """The sum over the steps of one of the terms of :func:`stability.action.action_balance`."""
        return self.steps[name].sum().item()

    @property
    def descent(self) -> float:
        """h at the start minus h at the end."""
        return self._h[0] - self._h[-1]

    @property
    def action(self) -> float:
        """S = Σ lr(½θ̇ᵀGθ̇ + ½∇hᵀG⁻¹∇h) ≥ |Σ∇hᵀΔθ|."""
        return self.total("action")

    @property
    def length(self) -> float:
        """Σ‖Δθ‖_G‖∇h‖_{G⁻¹}, between |Σ∇hᵀΔθ| and S: the action with the speed of every step chosen best."""
        return self.total("length")

    @property
    def defect(self) -> float:
        """½Σ lr‖Δθ/lr + G⁻¹∇h‖²_G ≥ 0: zero exactly for steps −lr·G⁻¹∇h."""
        return self.total("defect")

    @property
    def action_gap(self) -> float:
        """S − |Δh|; where h fell, defect + Σcurvature: O(lr) for Euler steps of the flow, ≥ 0 where h is convex."""
        return self.action - abs(self.descent)

    @property
    def scale_free_gap(self) -> float:
        """Σ‖Δθ‖_G‖∇h‖_{G⁻¹} − |Δh|; where h fell, Σ(direction + curvature): no lr in it."""
        return self.length - abs(self.descent)

    def to_frame(self) -> "pd.DataFrame":
        """The steps as a pandas DataFrame, a column per series, the index the number of the step."""
        import pandas as pd

        frame = pd.DataFrame({name: values.numpy() for name, values in self.steps.items()})
        return frame.rename_axis("step")

    def _stepped(self, *_) -> None:
        self._elapsed, self._pending = self._elapsed + self._optimizer_lr(), self._pending + 1
        if self._pending == self._every:
            self.mark(self._elapsed)

    def _now(self) -> dict[str, Tensor]:
        return {name: p.clone() for name, p in split_state(self.model)[0].items()}

    def _risk(self) -> tuple[float, Tensor]:
        h, r = risk_at(self.model, None, self._x, self._loss, output=self._options["output"])
        return h.item(), r

    def _optimizer_lr(self) -> float:
        rates = sorted({float(group["lr"]) for group in self._optimizer.param_groups})
        if len(rates) > 1:
            raise ValueError(
                f"the optimizer's groups have different lr ({', '.join(f'{rate:g}' for rate in rates)}), so a step has no one "
                "duration; leave optimizer out and call mark(lr) with the duration you mean"
            )
        return rates[0]
