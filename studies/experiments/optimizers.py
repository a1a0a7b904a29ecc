"""One training run and its twins under any rule of steps: loss it settles at, accuracy, residual of the velocity, divergence.

Twins see the same mini-batches in the same order; in S' the k-th sample is another one. What is compared are the outputs after
softmax (squared loss: the outputs themselves), so that divergences of different optimizers are in one unit.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor, nn

RULES = ("rlo", "rlo-lambda", "rlo-lifted", "sgd", "momentum", "adam", "adamw", "lion", "woodbury")
LOSSES = ("cross_entropy", "squared")


def make_optimizer(
    model: "nn.Module", rule: str, lr: float, options: Mapping[str, Any], loss: str
) -> "torch.optim.Optimizer":
    """The optimizer ``rule`` on ``model``; ``options``: eta, memory, direction, scale, normalize, weight_decay, mass.

    "rlo-lambda" is RLO with η = 1, "rlo-lifted" with ``eta``, "rlo" either; "lion" is its special case of RLO (Λ, memory lion,
    sign); "woodbury" takes the Gauss–Newton matrix of the loss and ``mass``, unchecked steps (mini-batches).

    >>> import torch
    >>> opt = make_optimizer(torch.nn.Linear(2, 2), "rlo-lifted", 0.1, {"eta": 0.2, "direction": "sign"}, "squared")
    >>> type(opt).__name__, opt.param_groups[0]["eta"]
    ('RLOLifted', 0.2)
    """
    import torch

    from optim import RLO, RLOLambda, RLOLifted, Woodbury

    params, decay = model.parameters(), options.get("weight_decay", 0.0)
    named = {name: options[name] for name in ("memory", "direction", "scale", "normalize") if name in options}
    if rule in ("rlo", "rlo-lambda", "rlo-lifted"):
        eta = {} if rule == "rlo-lambda" else {"eta": options.get("eta", 0.1)}
        kind = {"rlo": RLO, "rlo-lambda": RLOLambda, "rlo-lifted": RLOLifted}[rule]
        return kind(params, lr, weight_decay=decay, **eta, **named)
    if rule == "lion":
        return RLOLambda(params, lr, memory="lion", direction="sign", weight_decay=decay)
    if rule == "woodbury":
        metric = "cross_entropy" if loss == "cross_entropy" else "identity"
        mass = options.get("mass", 1.0)
        return Woodbury(model, lr, mass=mass, output_metric=metric, weight_decay=decay, check_step=False)
    simple = {
        "sgd": lambda: torch.optim.SGD(params, lr, weight_decay=decay),
        "momentum": lambda: torch.optim.SGD(params, lr, momentum=0.9, weight_decay=decay),
        "adam": lambda: torch.optim.Adam(params, lr, weight_decay=decay),
        "adamw": lambda: torch.optim.AdamW(params, lr, weight_decay=decay),
    }
    if rule not in simple:
        raise ValueError(f"unknown rule {rule!r}; known are {', '.join(map(repr, RULES))}")
    return simple[rule]()


def train(
    model: "nn.Module",
    data: "tuple[Tensor, Tensor]",
    probes: "Mapping[str, Tensor]",
    make: "Callable[[nn.Module], torch.optim.Optimizer]",
    *,
    loss: str,
    batch: int,
    steps: int,
    every: int,
    seed: int,
    watch: bool = False,
) -> "tuple[list[dict], list[dict[str, Tensor]], Any]":
    """(a row every ``every`` steps, the outputs at ``probes`` then, the NAIM record or None); ``model`` is trained in place.

    Rows: step, loss on all of ``data``, diverged. After a loss that is not finite nothing is trained any more: the rows go on
    with the last finite outputs, diverged True.
    """
    import math

    from optim import NaimMonitor, index_stream

    x, targets = data
    criterion = _criterion(loss)
    optimizer = make(model)
    monitor = None
    if watch:
        try:
            monitor = NaimMonitor(optimizer)
        except (TypeError, ValueError):  # no velocity to watch: SGD, Woodbury, coupled decay
            monitor = None
    rows, seen, diverged = [], [], False

    def look(step: int) -> None:
        nonlocal diverged
        value = criterion(evaluated(model, x), targets).item()
        outputs = {name: _comparable(evaluated(model, z), loss) for name, z in probes.items()}
        diverged = diverged or not math.isfinite(value)
        if diverged and seen:
            outputs = seen[-1]
        rows.append({"step": step, "loss": value if math.isfinite(value) else math.inf, "diverged": diverged})
        seen.append(outputs)

    look(0)
    for step, picked in enumerate(index_stream(len(x), min(batch, len(x)), seed, steps=steps), 1):
        if not diverged:
            optimizer.zero_grad()
            value = criterion(model(x[picked]), targets[picked])
            value.backward()
            try:
                optimizer.step()
            except ArithmeticError:
                diverged = True
            except RuntimeError:  # nt_kernel's NumericalError: the Gram matrix of a network that has run away
                diverged = True
        if step % every == 0 or step == steps:
            look(step)
    if hasattr(optimizer, "close"):
        optimizer.close()
    if monitor is not None:
        monitor.close()
    return rows, seen, None if monitor is None else monitor.record()


def evaluated(model: "nn.Module", x: "Tensor", rows: int = 1000) -> "Tensor":
    """The outputs in evaluation mode, ``rows`` inputs at a time; the model's mode is what it was."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(part) for part in x.split(rows)])
    finally:
        model.train(training)


def _criterion(loss: str) -> "Callable[[Tensor, Tensor], Tensor]":
    import torch

    if loss == "cross_entropy":
        return lambda y, a: torch.nn.functional.cross_entropy(y, a)
    if loss == "squared":
        return lambda y, a: 0.5 * (y - a).square().sum(1).mean()
    raise ValueError(f"unknown loss {loss!r}; known are {', '.join(map(repr, LOSSES))}")


def _comparable(y: "Tensor", loss: str) -> "Tensor":
    return y.softmax(1) if loss == "cross_entropy" else y


def accuracy(outputs: "Tensor", targets: "Tensor") -> float:
    """The share of rows whose largest output is the class.

    >>> import torch
    >>> accuracy(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    0.5
    """
    return (outputs.argmax(1) == targets.argmax(1)).double().mean().item()


def twin_tables(
    drawn, make, *, loss: str, batch: int, steps: int, every: int, seed: int, level: float
) -> "dict[str, pd.DataFrame]":
    """``summary``: a row for each twin, what the S run did repeated in each; ``trajectories``: the records.

    Of the S run: ``loss_tail``, mean over the last quarter of the records (the steady state), ``accuracy``, ``held_out``
    accuracy, ``diverged``; of its velocity, medians over the second half: ``thickness`` ‖z‖/‖d‖, ``alignment`` cos(v, d),
    ``forcing`` ‖Δd‖/‖d‖, ``factor``, the fitted f of z⁺ = f(z − Δd) (1 − η for an RLO). Of each pair: ``sup``, ``sup_final``,
    largest over the run and final difference at a training sample other than k; ``replaced_sup``, at x_k; ``held_out_sup``;
    ``sup_at_level``, at the first record with loss ≤ ``level`` (nan where that is never reached).
    """
    import math

    import numpy as np
    import pandas as pd

    from optim.naim import fitted_factor

    probes = {"train": drawn.x, "held_out": drawn.held_out}
    options = {"loss": loss, "batch": batch, "steps": steps, "every": every, "seed": seed}
    model = deepcopy(drawn.model)
    rows, seen, record = train(model, (drawn.x, drawn.targets), probes, make, watch=True, **options)
    losses = np.array([row["loss"] for row in rows])
    tail = losses[-max(1, len(losses) // 4) :]
    reached = next((i for i, value in enumerate(losses) if value <= level), None)
    run = {
        "loss_tail": float(tail.mean()),
        "loss_final": float(losses[-1]),
        "accuracy": accuracy(seen[-1]["train"], drawn.targets),
        "held_out": accuracy(seen[-1]["held_out"], drawn.held_out_targets),
        "diverged": rows[-1]["diverged"],
        "steps_to_level": math.nan if reached is None else float(rows[reached]["step"]),
    }
    run |= dict.fromkeys(("thickness", "alignment", "forcing", "factor"), math.nan)
    if record is not None and len(record.residual):
        half = slice(len(record.residual) // 2, None)
        run |= {
            "thickness": float(record.thickness[half].nanmedian()),
            "alignment": float(record.alignment[half].nanmedian()),
            "forcing": float((record.forcing / record.target)[half].nanmedian()),
            "factor": fitted_factor(record)[0],
        }
    trajectories = [pd.DataFrame(rows).assign(replaced=-1, replacement=-1, sup=0.0, held_out_sup=0.0)]
    pairs = []
    for k, row_of, x, target in zip(
        drawn.replaced, drawn.replacement_rows, drawn.replacement_x, drawn.replacement_targets, strict=True
    ):
        other_x, other_targets = drawn.x.clone(), drawn.targets.clone()
        other_x[k], other_targets[k] = x, target
        twin = deepcopy(drawn.model)
        twin_rows, twin_seen, _ = train(twin, (other_x, other_targets), probes, make, **options)
        gaps = [
            {name: (a[name] - b[name]).norm(dim=1) for name in probes} for a, b in zip(seen, twin_seen, strict=True)
        ]
        others = [i for i in range(len(drawn.x)) if i != k]
        sup = [float(gap["train"][others].max()) for gap in gaps]
        held = [float(gap["held_out"].max()) for gap in gaps]
        pairs.append(
            {
                "replaced": k,
                "replacement": row_of,
                **run,
                "sup": max(sup),
                "sup_final": sup[-1],
                "replaced_sup": max(float(gap["train"][k]) for gap in gaps),
                "held_out_sup": max(held),
                "held_out_mean": float(gaps[-1]["held_out"].mean()),
                "sup_at_level": math.nan if reached is None else sup[reached],
            }
        )
        frame = pd.DataFrame(twin_rows).assign(replaced=k, replacement=row_of, sup=sup, held_out_sup=held)
        trajectories.append(frame)
    return {"summary": pd.DataFrame(pairs), "trajectories": pd.concat(trajectories, ignore_index=True)}
