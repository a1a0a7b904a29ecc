"""One training run and its twins under any optimizer: loss it settles at, accuracy, residual of the velocity, divergence.

Twins see the same mini-batches in the same order, and dropout draws the same masks; in S' the k-th sample is another one. What
is compared are the outputs in evaluation mode, after softmax (other losses: the outputs themselves), so that divergences of
different optimizers are in one unit.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

from studies.experiments.training import accuracy, evaluated, named_loss, same_draws, training, twin_data

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor, nn

    from optim.naim import NaimMonitor, NaimRecord
    from stability import Loss


def recorded_run(
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
) -> "tuple[list[dict], list[dict[str, Tensor]], NaimRecord | None]":
    """(a row every ``every`` steps, the outputs at ``probes`` then, the NAIM record or None); ``model`` is trained in place.

    Rows: step, loss on all of ``data``, diverged. After a loss that is not finite nothing is trained any more: the rows go on
    with the last finite outputs, diverged True.
    """
    from optim import index_stream

    x, targets = data
    optimizer = make(model)
    monitor = _monitor(optimizer) if watch else None
    records = _Records(model, x, targets, probes, named_loss(loss))
    due = [step for step in range(steps + 1) if step % every == 0 or step == steps]
    batches = index_stream(len(x), min(batch, len(x)), seed, steps=steps)
    with same_draws(seed, x.device):
        for step in _until_it_fails(training(model, optimizer, records.loss, x, targets, batches)):
            if step == due[0]:
                records.look(due.pop(0))
            if records.diverged:
                break
    records.diverged |= bool(due)
    for step in due:
        records.look(step)
    if hasattr(optimizer, "close"):
        optimizer.close()
    if monitor is not None:
        monitor.close()
    return records.rows, records.seen, None if monitor is None else monitor.record()


class _Records:
    """What a run looked like whenever it was looked at."""

    def __init__(
        self, model: "nn.Module", x: "Tensor", targets: "Tensor", probes: "Mapping[str, Tensor]", loss: "Loss"
    ):
        self.model, self.x, self.targets, self.probes, self.loss = model, x, targets, probes, loss
        self.rows: list[dict] = []
        self.seen: list[dict[str, Tensor]] = []
        self.diverged = False

    def look(self, step: int) -> None:
        value = self.loss.value(evaluated(self.model, self.x), self.targets).mean().item()
        outputs = {name: self._comparable(evaluated(self.model, z)) for name, z in self.probes.items()}
        self.diverged = self.diverged or not math.isfinite(value)
        if self.diverged and self.seen:
            outputs = self.seen[-1]
        value = value if math.isfinite(value) else math.inf
        self.rows.append({"step": step, "loss": value, "diverged": self.diverged})
        self.seen.append(outputs)

    def _comparable(self, y: "Tensor") -> "Tensor":
        return y.softmax(1) if self.loss.name == "cross_entropy" else y


def _until_it_fails(steps: Iterator[int]) -> Iterator[int]:
    """``steps`` to their end, or to the step whose arithmetic failed: the Gram matrix of a network that has run away."""
    from torch.linalg import LinAlgError

    from nt_kernel.errors import NumericalError

    while True:
        try:
            step = next(steps)
        except (StopIteration, ArithmeticError, NumericalError, LinAlgError):
            return
        yield step


def _monitor(optimizer: "torch.optim.Optimizer") -> "NaimMonitor | None":
    from optim import NaimMonitor

    try:
        return NaimMonitor(optimizer)
    except (TypeError, ValueError):  # no velocity to watch: SGD, Woodbury, coupled decay
        return None


def twin_tables(
    drawn, make, *, loss: str, batch: int, steps: int, every: int, seed: int, level: float
) -> "dict[str, pd.DataFrame]":
    """``summary``: a row for each twin, what the S run did repeated in each; ``trajectories``: the records.

    Of the S run: ``loss_tail``, mean over the last quarter of the records (the steady state), ``accuracy``, ``held_out``
    accuracy (both 1/classes, chance, where the run diverged), ``diverged``; of its velocity, medians over the second half:
    ``thickness`` ‖z‖/‖d‖, ``alignment`` cos(v, d), ``forcing`` ‖Δd‖/‖d‖, ``factor``, the fitted f of z⁺ = f(z − Δd) (1 − η
    for an RLO). Of each pair: ``sup``, ``sup_final``, largest over the run and final difference at a training sample other
    than k; ``replaced_sup``, at x_k; ``held_out_sup``; ``sup_at_level``, at the first record with loss ≤ ``level`` (nan
    where that is never reached); ``twin_diverged``, where its differences are of the last finite outputs.
    """
    import pandas as pd

    probes = {"train": drawn.x, "held_out": drawn.held_out}
    options = {"loss": loss, "batch": batch, "steps": steps, "every": every, "seed": seed}
    model = deepcopy(drawn.model)
    rows, seen, record = recorded_run(model, (drawn.x, drawn.targets), probes, make, watch=True, **options)
    reached = next((i for i, row in enumerate(rows) if row["loss"] <= level), None)
    run = _numbers_of_run(rows, seen, drawn) | _numbers_of_velocity(record)
    run["steps_to_level"] = math.nan if reached is None else float(rows[reached]["step"])
    trajectories = [pd.DataFrame(rows).assign(replaced=-1, replacement=-1, sup=0.0, held_out_sup=0.0)]
    pairs = []
    for j, (k, row_of) in enumerate(zip(drawn.replaced, drawn.replacement_rows, strict=True)):
        data = twin_data(drawn, j, drawn.targets, drawn.replacement_targets)
        twin_rows, twin_seen, _ = recorded_run(deepcopy(drawn.model), data, probes, make, **options)
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
                "twin_diverged": twin_rows[-1]["diverged"],
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


def _numbers_of_run(rows: list[dict], seen: "list[dict[str, Tensor]]", drawn) -> dict:
    import numpy as np

    losses, lost = np.array([row["loss"] for row in rows]), rows[-1]["diverged"]
    # the last finite outputs of a run that diverged are of a network nobody can use: it classifies by chance
    chance = 1 / drawn.targets.shape[1]
    return {
        "loss_tail": float(losses[-max(1, len(losses) // 4) :].mean()),
        "loss_final": float(losses[-1]),
        "accuracy": chance if lost else accuracy(seen[-1]["train"], drawn.targets),
        "held_out": chance if lost else accuracy(seen[-1]["held_out"], drawn.held_out_targets),
        "diverged": lost,
        "steps_to_level": math.nan,
    }


def _numbers_of_velocity(record: "NaimRecord | None") -> dict[str, float]:
    from optim.naim import fitted_factor

    if record is None or not len(record.residual):
        return dict.fromkeys(("thickness", "alignment", "forcing", "factor"), math.nan)
    half = slice(len(record.residual) // 2, None)
    return {
        "thickness": float(record.thickness[half].nanmedian()),
        "alignment": float(record.alignment[half].nanmedian()),
        "forcing": float((record.forcing / record.target)[half].nanmedian()),
        "factor": fitted_factor(record)[0],
    }
