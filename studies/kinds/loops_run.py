"""One point of ``kind = "loops"``: the run on S and its twins as ordinary loops over one stream of mini-batches."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from nt_kernel.errors import NumericalError
from optim import index_stream
from stability import Loss, RunRecord, certify, record
from studies.data.subsets import Draw, draw
from studies.definition.points import Point
from studies.experiments.optimizers import make_optimizer
from studies.experiments.training import evaluated, named_loss, same_draws, training, twin_data
from studies.kinds.loops import LoopStudy, check_batch
from studies.kinds.own_metric import own_metric

# Spawn keys of the mini-batches and of what the forward pass draws; data, initialisation, replacements and noise have 0 to 3.
BATCHES, FORWARD = 5, 6
SCALAR_UP_TO = 256  # states; T4 needs ‖A_t‖₂ of every step


@dataclass(frozen=True)
class Trace:
    """A finished run: outputs at every step on S, the replacements and the held-out points, in one tensor."""

    outputs: Tensor  # [T + 1, n + R + Q, p], in evaluation mode
    parameters: Tensor  # [P], at the end
    record: RunRecord | None


def optimizer_of(study: LoopStudy, mass: float, model: nn.Module | None = None) -> torch.optim.Optimizer:
    """The study's optimizer, of a small model where none is given: made to see whether it can be."""
    model = nn.Linear(2, 2) if model is None else model
    shared = {key: value for key in ("momentum", "weight_decay") if (value := getattr(study, key))}
    metric = {"mass": mass, "output_metric": own_metric(study.output_metric), "scale": study.scale}
    return make_optimizer(
        study.optimizer, model, lr=study.lr, tables=study.optimizers, shared=shared, ours={"Woodbury": metric}
    )


def run(study: LoopStudy, point: Point) -> dict[str, pd.DataFrame]:
    """Train S, its twins and the null twin; tables summary (a row per pair) and trajectories (a row per pair and step)."""
    at = study.at(point)
    drawn, loss = draw(at, point), named_loss(at.loss)
    p = drawn.targets.shape[1]
    targets, new = loss.encoded(drawn.targets, p), loss.encoded(drawn.replacement_targets, p)
    look = torch.cat([drawn.x, drawn.replacement_x, drawn.held_out])
    train = _trainer(at, point, look, loss)

    on_S = train(drawn.model, drawn.x, targets, keep=at.enclosures)
    null = train(_nudged(drawn.model), drawn.x, targets, keep=False)
    key = study.columns(point)
    summary, trajectories = [], []
    for j, k in enumerate(drawn.replaced):
        twin = train(drawn.model, *twin_data(drawn, j, targets, new), keep=at.enclosures)
        pair = key | {"replaced": k, "replacement": drawn.replacement_rows[j]}
        numbers, series = _compare(on_S, twin, null, drawn, targets, new[j], j, loss)
        enclosed = _enclosed(on_S, twin, k, len(drawn.x) * p) if at.enclosures else {}
        fixed = {"parameters": len(on_S.parameters), "batch": at.batch or len(drawn.x), "optimizer": at.optimizer}
        row = {name: value for name, value in (fixed | numbers | enclosed).items() if name not in key}
        summary.append(pair | row)
        trajectories.append(pd.DataFrame(pair | {"step": np.arange(at.steps + 1)} | series))
    return {"summary": pd.DataFrame(summary), "trajectories": pd.concat(trajectories, ignore_index=True)}


def _trainer(at: LoopStudy, point: Point, look: Tensor, loss: Loss) -> Callable[..., Trace]:
    n = point.n
    check_batch(at.batch, n)
    stream = np.random.SeedSequence(point.seed, spawn_key=(BATCHES,))
    masks = int(np.random.SeedSequence(point.seed, spawn_key=(FORWARD,)).generate_state(1)[0])

    def train(start: nn.Module, x: Tensor, a: Tensor, *, keep: bool) -> Trace:
        model = copy.deepcopy(start)
        optimizer = optimizer_of(at, point.mass, model)
        some = at.batch and at.batch < n
        batches = index_stream(n, at.batch, stream, steps=at.steps) if some else [slice(None)] * at.steps
        outputs = []
        watch = record(model, x, optimizer, targets=a, loss=loss) if keep else nullcontext()
        with watch as watched, same_draws(masks, x.device):
            for step in training(model, optimizer, loss, x, a, batches):
                outputs.append(evaluated(model, look))
                if not torch.isfinite(outputs[-1]).all():
                    raise NumericalError(f"{at.optimizer} diverged: outputs are no finite numbers after step {step}")
        flat = torch.cat([value.detach().flatten() for value in model.parameters()])
        return Trace(torch.stack(outputs), flat, watched)

    return train


def _nudged(model: nn.Module) -> nn.Module:
    """The null twin's start: every parameter moved by one ulp."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.nextafter(value, torch.full_like(value, torch.inf)))
    return model


def _compare(
    own: Trace, twin: Trace, null: Trace, drawn: Draw, targets: Tensor, new: Tensor, j: int, loss: Loss
) -> tuple[dict, dict]:
    """Numbers of the pair, and its series over the steps."""
    n, R, k = len(drawn.x), len(drawn.replaced), drawn.replaced[j]
    e = (twin.outputs - own.outputs).double().norm(dim=-1)  # [T + 1, n + R + Q]
    moves = (twin.outputs - own.outputs).double().diff(dim=0)[:, :n]  # [T, n, p]
    on_S, held = e[:, :n], e[:, n + R :]
    others = [i for i in range(n) if i != k]
    series = {
        "measured_sup": on_S.amax(1),
        "measured_l2": on_S.norm(dim=1),
        "measured_replaced": on_S[:, k],
        "measured_others": on_S[:, others].amax(1) if others else torch.zeros(len(e)),
        "measured_heldout": held.amax(1),
        "path_sup": _grown(moves.norm(dim=-1)).amax(1),
        "path_l2": _grown(moves.flatten(1).norm(dim=1)[:, None])[:, 0],
        "train_loss": loss.value(own.outputs[:, :n], targets.expand(len(e), -1, -1)).mean(1),
    }
    series = {name: values.double().cpu().numpy() for name, values in series.items()}
    null_sup = float((null.outputs[:, :n] - own.outputs[:, :n]).double().norm(dim=-1).max())
    numbers = {name: float(values.max()) for name, values in series.items() if name != "train_loss"}
    numbers |= {name.replace("measured", "final"): float(series[name][-1]) for name in series if "measured" in name}
    numbers |= {"null_sup": null_sup, "steps": len(e) - 1, "train_loss": float(series["train_loss"][-1])}
    numbers |= _losses(own.outputs[-1], twin.outputs[-1], drawn, targets, new, j, loss)
    numbers["gap"] = numbers["held_out_loss"] - numbers["train_loss"]
    scale = (own.parameters.double().square().sum() + twin.parameters.double().square().sum()).sqrt()
    # the normalised parameter distance of Hardt, Recht & Singer (arXiv 1509.01240)
    numbers["parameter_distance"] = float((twin.parameters - own.parameters).double().norm() / scale)
    return numbers, series


def _grown(steps: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(steps[:1]), steps.cumsum(0)])


def _losses(
    y: Tensor, y_twin: Tensor, drawn: Draw, targets: Tensor, new: Tensor, j: int, loss: Loss
) -> dict[str, float]:
    """Losses at the end: at the removed sample, at the new one, on the held-out points, of S and of the twin."""
    n, R, k = len(drawn.x), len(drawn.replaced), drawn.replaced[j]
    held = loss.encoded(drawn.held_out_targets, targets.shape[1])

    def at(outputs: Tensor, row: int, target: Tensor) -> float:
        return float(loss.value(outputs[row][None], target[None])[0])

    own_held, twin_held = loss.value(y[n + R :], held), loss.value(y_twin[n + R :], held)
    found = {
        "removed_own": at(y, k, targets[k]),
        "removed_twin": at(y_twin, k, targets[k]),
        "new_own": at(y, n + j, new),
        "new_twin": at(y_twin, n + j, new),
        "held_out_loss": float(own_held.mean()),
        "uniform_stability": float((twin_held - own_held).abs().max()),
    }
    if drawn.classes:
        found["train_accuracy"] = float((y[:n].argmax(1) == targets.argmax(1)).double().mean())
        found["held_out_accuracy"] = float((y[n + R :].argmax(1) == held.argmax(1)).double().mean())
    return found


def _enclosed(own: Trace, twin: Trace, k: int, states: int) -> dict[str, float]:
    """T5 and, where it is cheap, T4; what A_t was taken to be is a function of the S run alone."""
    found = certify(own.record, twin.record, replaced=[k], scalar=states <= SCALAR_UP_TO, ladder=False)
    values = {name: float(found[name].value) for name in ("T5", "T5_others", "T4") if name in found.rungs}
    return values | {"closed_loop": "; ".join(found.description)}
