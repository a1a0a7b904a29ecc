"""Does it train? Loss and error against steps and seconds, every optimizer with its learning rate tuned at the same cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import numpy as np
import torch

from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.tasks import TASKS, Task
from benchmarks.timing import Settings
from nt_kernel import NumericalError

TITLE = "Training"
ABOUT = (
    "Three small tasks (scikit-learn's own data; MNIST and CIFAR-10 cannot be had without a network, so they are not here). "
    "Each optimizer has seven learning rates, half a decade apart, one run of each with one seed; the rate with the lowest "
    "validation loss at the end (a rate at the edge of its list is marked *) then runs with five other seeds, which draw the "
    "network and the order of the mini-batches; the optimizers take turns within a seed. Numbers are medians, in brackets "
    "smallest and largest. `test error`: share of wrong classes, or root mean squared error over the deviation of the "
    "targets. `to SGD's loss`: steps and seconds until the training loss is that of SGD with momentum at its end. Training "
    "loss is that of the whole training set; seconds are CPU seconds of the steps alone (with "
    "`--threads 1` seconds of one core). K-FAC is curvlinops' for the mini-batch at hand, without running averages."
)
METHOD = ""  # no rounds: the runs are what is timed
CASES = [("digits", 5, 250), ("images", 5, 250), ("diabetes", 5, 250)]  # task, seeds, steps
QUICK = [("diabetes", 2, 20)]
BASE = "SGD, momentum .9"
TUNING_SEED = 1000
EVALUATIONS = 40
DIVERGED = (NumericalError, torch.linalg.LinAlgError)


@dataclass(frozen=True)
class Curve:
    """One run: training loss and validation loss and seconds at ``steps``, the test error at the end. NaN: it diverged."""

    steps: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    validation: np.ndarray
    error: float


def train(task: Task, contestant: Contestant, lr: float, seed: int, steps: int) -> Curve:
    """``steps`` mini-batches from the network of ``seed``."""
    model, batches = task.model(seed), task.batches(seed, steps)
    step = contestant.build(model, task, lr)
    marks = np.unique(np.linspace(0, steps, EVALUATIONS + 1).round().astype(int))
    rows, spent = [], 0.0
    for k in range(steps + 1):
        if k in marks:
            rows.append((k, spent, _loss(task, model, task.training), _loss(task, model, task.validation)))
        if k == steps or not np.isfinite(rows[-1][2]):
            break
        x, targets = task.training.x[batches[k]], task.training.targets[batches[k]]
        start = process_time()
        try:
            step(x, targets)
        except DIVERGED:
            break
        spent += process_time() - start
    found = np.full((len(marks), 4), np.nan)
    found[:, 0] = marks
    found[: len(rows)] = rows
    with torch.no_grad():
        error = task.error_of(model(task.test.x), task.test.targets) if np.isfinite(found[-1, 2]) else np.nan
    return Curve(*found.T, error)


def _loss(task: Task, model: torch.nn.Module, part) -> float:
    with torch.no_grad():
        return task.loss_of(model(part.x), part.targets).item()


def tune(task: Task, contestant: Contestant, steps: int) -> float:
    """The rate whose run ends with the lowest validation loss; NaN where every run diverges."""
    ends = [train(task, contestant, lr, TUNING_SEED, steps).validation[-1] for lr in contestant.rates]
    return contestant.rates[int(np.nanargmin(ends))] if np.isfinite(ends).any() else np.nan


@dataclass(frozen=True)
class Result:
    """What became of one optimizer on one task."""

    name: str
    lr: float
    edge: bool
    curves: list[Curve]
    note: str = ""

    def reach(self, goal: float) -> tuple[float, float]:
        """Medians over runs of the first evaluated step with a loss of ``goal`` or less, and of its seconds; inf for a run
        that does not get there."""
        found = []
        for curve in self.curves:
            there = np.flatnonzero(curve.loss <= goal)
            found.append((curve.steps[there[0]], curve.seconds[there[0]]) if len(there) else (np.inf, np.inf))
        steps, seconds = np.median(found, axis=0)
        return float(steps), float(seconds)


def compete(task: Task, contestants: Mapping[str, Contestant], seeds: int, steps: int) -> list[Result]:
    """Tune everyone, then run everyone on every seed."""
    rates, notes = {}, {}
    for name, contestant in contestants.items():
        try:
            rates[name] = tune(task, contestant, steps)
        except ImportError:
            rates[name], notes[name] = np.nan, "not installed"
        if np.isnan(rates[name]):
            notes.setdefault(name, "diverges at every rate")
    curves: dict[str, list[Curve]] = {name: [] for name in contestants}
    for seed in range(seeds):
        for name, contestant in contestants.items():
            if name not in notes:
                curves[name].append(train(task, contestant, rates[name], seed, steps))
    return [
        Result(
            name, lr, lr in (contestants[name].rates[0], contestants[name].rates[-1]), curves[name], notes.get(name, "")
        )
        for name, lr in rates.items()
    ]


def spread(values: Sequence[float]) -> str:
    """Median, smallest and largest, to three digits.

    >>> spread([0.01234, 0.02, 0.5])
    '0.02 (0.0123 – 0.5)'
    """
    return f"{np.median(values):.3g} ({np.min(values):.3g} – {np.max(values):.3g})"


def table(title: str, results: Sequence[Result]) -> str:
    """One table of a task."""
    base = next(result for result in results if result.name == BASE)
    goal = float(np.median([curve.loss[-1] for curve in base.curves])) if base.curves else np.nan
    lines = [
        f"**{title}**\n",
        "| | lr | ms a step | training loss | validation loss | test error | steps to SGD's loss | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        if result.note:
            lines.append(f"| {result.name} | {result.note} | – | – | – | – | – | – |")
            continue
        pace = np.median([1e3 * np.nanmax(c.seconds) / c.steps[np.nanargmax(c.seconds)] for c in result.curves])
        steps, seconds = result.reach(goal)
        columns = [
            f"{result.lr:g}" + "*" * result.edge,
            f"{pace:.2f}",
            spread([c.loss[-1] for c in result.curves]),
            spread([c.validation[-1] for c in result.curves]),
            spread([c.error for c in result.curves]),
            f"{steps:.0f}" if np.isfinite(steps) else "not reached",
            f"{seconds:.2f}" if np.isfinite(seconds) else "–",
        ]
        lines.append(f"| {result.name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def standing(results: Sequence[Result]) -> str:
    """Where Woodbury, the better of its variants each time, wins and loses: against whoever is best of the others.

    >>> steps = np.array([0, 10])
    >>> curve = lambda loss, error: Curve(steps, steps / 1e3, np.array([1, loss]), np.array([1, loss]), error)
    >>> runs = {BASE: curve(0.5, 0.2), "AdamW": curve(0.1, 0.3), "Woodbury": curve(0.2, 0.1)}
    >>> print(standing([Result(name, 0.1, False, [one]) for name, one in runs.items()]))
    Woodbury, the best of its variants in each number, against the best of the others: training loss 0.2 : 0.1 (AdamW),
    **loses**; validation loss 0.2 : 0.1 (AdamW), **loses**; test error 0.1 : 0.2 (SGD, momentum .9), wins;
    steps to SGD's loss 10 : 10 (SGD, momentum .9), ties; seconds to SGD's loss 0.01 : 0.01 (SGD, momentum .9), ties.
    """
    timed = [result for result in results if result.curves]
    base = next(result for result in timed if result.name == BASE)
    goal = float(np.median([curve.loss[-1] for curve in base.curves]))
    measures = {
        "training loss": lambda result: np.median([c.loss[-1] for c in result.curves]),
        "validation loss": lambda result: np.median([c.validation[-1] for c in result.curves]),
        "test error": lambda result: np.median([c.error for c in result.curves]),
        "steps to SGD's loss": lambda result: result.reach(goal)[0],
        "seconds to SGD's loss": lambda result: result.reach(goal)[1],
    }
    found = []
    for what, measure in measures.items():
        values = {result.name: float(measure(result)) for result in timed}
        values = {name: value if np.isfinite(value) else np.inf for name, value in values.items()}
        ours = min((v for name, v in values.items() if name.startswith("Woodbury")), default=np.inf)
        rival = min((name for name in values if not name.startswith("Woodbury")), key=values.__getitem__)
        how = "ties" if ours == values[rival] else "wins" if ours < values[rival] else "**loses**"
        found.append(f"{what} {ours:.3g} : {values[rival]:.3g} ({rival}), {how}")
    return f"Woodbury, the best of its variants in each number, against the best of the others: {'; '.join(found)}."


def draw(found: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Training loss against steps and against seconds, a row per task; lines are medians, bands the range over seeds."""
    import matplotlib as mpl
    import seaborn as sns
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "training", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.4, 0.5 + 2.5 * len(found)), layout="constrained")
        axes = figure.subplots(len(found), 2, sharey="row", squeeze=False)
        names = list(dict.fromkeys(result.name for results in found.values() for result in results if result.curves))
        looks = dict(zip(names, zip(sns.color_palette("colorblind", len(names)), DASHES, strict=False), strict=True))
        for (left, right), (task, results) in zip(axes, found.items(), strict=True):
            for result in results:
                if not result.curves:
                    continue
                colour, dash = looks[result.name]
                loss = np.array([curve.loss for curve in result.curves])
                seconds = np.median([curve.seconds for curve in result.curves], axis=0)
                for axis, at, first in ((left, result.curves[0].steps, 0), (right, seconds, 1)):  # log 0 has no place
                    shown, at = loss[:, first:], at[first:]
                    axis.plot(at, np.median(shown, axis=0), color=colour, ls=dash, lw=1.3, label=result.name)
                    axis.fill_between(at, shown.min(0), shown.max(0), color=colour, alpha=0.15, lw=0)
            left.set(ylabel=f"{task}: training loss", yscale="log", xlabel="steps")
            right.set(xlabel="CPU seconds (log)", xscale="log")
            for axis in (left, right):
                sns.despine(ax=axis)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None})


DASHES = ("-", "--", "-.", ":", "-", "--", "-.", ":")


def report(settings: Settings, cases: Sequence[tuple[str, int, int]], stem: Path) -> Iterator[str]:
    """The body of the page after each task; the figure is written beside it."""
    found: dict[str, list[Result]] = {}
    tables = []
    for name, seeds, steps in cases:
        task = TASKS[name]()
        found[name] = compete(task, CONTESTANTS, seeds, steps)
        results = found[name]
        tables.append(f"{table(f'{task.title}; {steps} steps of {task.batch}', results)}\n\n{standing(results)}")
        picture = stem.with_suffix(".svg")
        draw(found, picture)
        yield f"![Training loss]({picture.name})\n\n" + "\n\n".join(tables)
