"""How the cost of a Gram matrix grows with samples, outputs and width: sweeps around one MLP, fitted exponents, a figure."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.environments import NEURAL_TANGENTS, neural_tangents
from benchmarks.rivals import OURS, REFERENCE, RIVALS
from benchmarks.timing import Run, Settings, interleaved
from benchmarks.worker import WorkerError
from benchmarks.workloads import Workload

TITLE = "Growth of the cost of a Gram matrix"
ABOUT = (
    "Seconds for the full empirical NTK of an MLP 64-w-w-p (tanh, random inputs, float32) around n = 64, p = 10, w = 256, one "
    "of the three varied at a time. Exponents: least squares of log time on log size over the larger half of the sizes, where "
    "fixed costs no longer show; ± its standard error. The products of the structured algorithm alone grow as n², p², w¹; a "
    "Jacobian formed as a matrix costs n²p²w². Contenders whose Jacobian would exceed 0.5 GB leave out that size."
)
MEANING = {"n": "n, samples", "p": "p, outputs", "width": "w, width"}
BASE = {"n": 64, "p": 10, "width": 256}
CASES = [
    ("n", (8, 16, 32, 64, 128, 256, 512), "float32"),
    ("p", (1, 2, 4, 8, 16, 32, 64), "float32"),
    ("width", (32, 64, 128, 256, 512, 1024, 2048), "float32"),
]
QUICK = [("n", (4, 8), "float32")]
STRUCTURED = "neural-tangents, structured"
SHOWN = (OURS, REFERENCE, "nngeometry", STRUCTURED)
LARGEST_JACOBIAN = 5e8  # bytes


@dataclass(frozen=True)
class Fit:
    """time ≈ constant · size^exponent."""

    exponent: float
    error: float  # standard error of the exponent; NaN from two sizes
    constant: float


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """The power law through the larger half of the sizes (at least two).

    Raises ValueError for fewer than two sizes or anything that is not positive.

    >>> fit = fit_exponent([1, 2, 4, 8], [9.0, 9.0, 16.0, 64.0])
    >>> round(fit.exponent, 12), round(fit.constant, 12)
    (2.0, 1.0)
    """
    if len(sizes) != len(seconds) or len(sizes) < 2 or min(*sizes, *seconds) <= 0:
        raise ValueError(
            f"an exponent needs at least two positive sizes with a positive time each, got {list(sizes)} and {list(seconds)}"
        )
    keep = np.argsort(sizes)[-max(2, (len(sizes) + 1) // 2) :]
    x, y = np.log(np.asarray(sizes, float)[keep]), np.log(np.asarray(seconds, float)[keep])
    slope, offset = np.polyfit(x, y, 1)
    spread = ((x - x.mean()) ** 2).sum()
    freedom = len(x) - 2
    error = np.sqrt(((y - offset - slope * x) ** 2).sum() / freedom / spread) if freedom and spread else np.nan
    return Fit(float(slope), float(error), float(np.exp(offset)))


@dataclass(frozen=True)
class Sweep:
    """Median seconds by contender and size of one varied quantity."""

    varied: str
    dtype: str
    seconds: dict[str, dict[int, float]]


def sweep(varied: str, sizes: Sequence[int], dtype: str, settings: Settings) -> Sweep:
    """Time every contender at every size, interleaved within a size."""
    found: dict[str, dict[int, float]] = {}
    for size in sizes:
        at = {**BASE, varied: size}
        workload = Workload((64, at["width"], at["width"], at["p"]), "tanh", "random")
        with ExitStack() as stack:
            runs = contenders(stack, workload, at["n"], dtype, settings)
            for name, times in interleaved(runs, settings).items():
                found.setdefault(name, {})[size] = float(np.median(times))
    return Sweep(varied, dtype, found)


def contenders(stack: ExitStack, workload: Workload, n: int, dtype: str, settings: Settings) -> dict[str, Run]:
    """What is installed and fits in memory."""
    model, (x, _) = workload.model(dtype, settings.device), workload.batch(n, dtype, settings.device)
    jacobian = n * workload.outputs * sum(p.numel() for p in model.parameters()) * x.element_size()
    runs: dict[str, Run] = {}
    for name in SHOWN:
        if name == REFERENCE and jacobian > LARGEST_JACOBIAN:
            continue
        try:
            if name in RIVALS:
                runs[name] = RIVALS[name](workload.model(dtype, settings.device), x)
            elif settings.workers:
                runs[name] = stack.enter_context(neural_tangents(workload, n, dtype, NEURAL_TANGENTS[name]))
        except (ImportError, WorkerError):
            continue
    return runs


def table(sweeps: Sequence[Sweep]) -> str:
    """Times and exponents.

    >>> print(table([Sweep("n", "float32", {OURS: {2: 0.001, 4: 0.004}})]))
    | varied | | exponent | 2 | 4 |
    |---|---|--:|--:|--:|
    | n | layer factors | 2.00 | 1.00 | 4.00 |
    <BLANKLINE>
    Columns: milliseconds at each size.
    """
    blocks = []
    for found in sweeps:
        sizes = sizes_of(found)
        lines = [f"| varied | | exponent | {' | '.join(map(str, sizes))} |", "|---|---|" + "--:|" * (len(sizes) + 1)]
        for name, times in found.seconds.items():
            cells = [f"{times[size] * 1e3:.2f}" if size in times else "–" for size in sizes]
            lines.append(f"| {found.varied} | {name} | {exponent(times)} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n\nColumns: milliseconds at each size."


def sizes_of(found: Sweep) -> list[int]:
    """Every size that anyone was timed at, ascending."""
    return sorted({size for times in found.seconds.values() for size in times})


def exponent(times: dict[int, float]) -> str:
    """The fitted exponent as text; a dash from fewer than two sizes."""
    if len(times) < 2:
        return "–"
    fit = fit_exponent(list(times), list(times.values()))
    return f"{fit.exponent:.2f}" + ("" if np.isnan(fit.error) else f" ± {fit.error:.2f}")


def draw(sweeps: Sequence[Sweep], path: Path) -> None:
    """One panel per varied quantity, both axes logarithmic, the fits as dashed lines over the sizes they used."""
    import matplotlib as mpl
    import seaborn as sns
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(3.4 * len(sweeps), 3.9), layout="constrained")
        axes = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
        colours = dict(zip(SHOWN, sns.color_palette("colorblind", len(SHOWN)), strict=True))
        for axis, found in zip(axes, sweeps, strict=True):
            for name, times in found.seconds.items():
                sizes = np.array(sorted(times), float)
                seconds = np.array([times[int(s)] for s in sizes])
                axis.loglog(
                    sizes, 1e3 * seconds, "o-", ms=3, lw=1, color=colours[name], label=f"{name}: {exponent(times)}"
                )
                if len(sizes) > 1:
                    fit = fit_exponent(sizes, seconds)
                    used = sizes[-max(2, (len(sizes) + 1) // 2) :]
                    axis.loglog(
                        used, 1e3 * fit.constant * used**fit.exponent, "--", lw=2, alpha=0.5, color=colours[name]
                    )
            others = ", ".join(f"{key} = {value}" for key, value in BASE.items() if key != found.varied)
            axis.set(xlabel=MEANING.get(found.varied, found.varied), title=others)
            axis.set_xticks(sizes_of(found), map(str, sizes_of(found)), minor=False)
            axis.minorticks_off()
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
            axis.legend(title="exponent (dashed: the fit)", frameon=False, fontsize=7, title_fontsize=7, **below)
            sns.despine(ax=axis)
        axes[0].set_ylabel("milliseconds")
        figure.savefig(path, metadata={"Date": None})


def report(settings: Settings, cases: Sequence[tuple[str, Sequence[int], str]], stem: Path) -> Iterator[str]:
    """The body of the page after each sweep; the figure is written beside it."""
    sweeps: list[Sweep] = []
    for varied, sizes, dtype in cases:
        sweeps.append(sweep(varied, sizes, dtype, settings))
        picture = stem.with_suffix(".svg")
        draw(sweeps, picture)
        yield f"![{TITLE}]({picture.name})\n\n{table(sweeps)}"
