"""``stability predict``: every sample of S replaced, from one run; a few trained twins say how far to trust it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from studies.definition.points import Point

if TYPE_CHECKING:
    import pandas as pd

    from stability.prediction.conformal import ConformalFactor
    from studies.data.subsets import Draw
    from studies.definition.config import Study

QUANTITIES = ("sup", "others", "heldout")
KEYS = ["n", "width", "mass", "seed"]


@dataclass(frozen=True)
class Sensitivity:
    """One run of a study: a row per candidate (k, z'), the calibration twins, and the factor of each quantity.

    ``candidates``: replaced (k), replacement (row of z' in the data set), and for each of sup, others, heldout: predicted_…
    (supremum over the run), final_… and upper_… (q·predicted). ``calibration``: the trained twins, with measured_… as well.
    """

    point: Point
    drawn: "Draw"
    candidates: "pd.DataFrame"
    calibration: "pd.DataFrame"
    factors: "dict[str, ConformalFactor]"

    def ranking(self, quantity: str = "sup") -> "pd.DataFrame":
        """A row per sample k, the most sensitive first: median, smallest and largest prediction over the z' tried, and
        the upper limit of the largest."""
        predicted, upper = f"predicted_{quantity}", f"upper_{quantity}"
        grouped = self.candidates.groupby("replaced")
        table = grouped[predicted].agg(["median", "min", "max"])
        table["upper"] = grouped[upper].max()
        worst = self.candidates.loc[grouped[predicted].idxmax()].set_index("replaced")
        table["worst"] = worst["replacement"]
        return table.sort_values("median", ascending=False, kind="stable").reset_index()


def predict_study(
    study: "Study | str | Path",
    out: str | Path | None = None,
    overrides: Iterable[str] = (),
    *,
    quick: bool = False,
    alpha: float = 0.1,
    each: int = 3,
    command: Sequence[str] | None = None,
) -> list[Sensitivity]:
    """Predict what replacing each training sample does, for the largest n and width of a study of kind "twins", at every
    mass, on its first seed.

    Per sample k, ``each`` replacements z' from rows that are neither trained on nor held out; besides, the fewest twins that
    ``alpha`` allows, drawn at random, are trained, and calibrate the factor q of P(measured ≤ q·predicted) ≥ 1 − α.
    With ``out`` the folder gets sensitivity.parquet, calibration.parquet and report.html (self-contained).

    Raises ConfigError for a study that cannot be run as written, ValueError for one of another kind, loss or number of rows.
    """
    from studies.definition.config import Study

    if not isinstance(study, Study):
        study = Study.from_toml(study, overrides, quick=quick)
    if isinstance(each, bool) or not isinstance(each, int) or each < 1:
        raise ValueError(f"each must be a whole number of at least 1, got {each!r}")
    if study.kind != "twins":
        raise ValueError(f'predictions are made for studies of kind "twins", this one is of kind {study.kind!r}')
    found = [_predict(study, point, alpha, each) for point in chosen(study)]
    if out is not None:
        _write(found, study, Path(out), command)
    return found


def chosen(study: "Study") -> list[Point]:
    """The points that are predicted: the largest n and width, every mass and other axis, the first seed.

    >>> from studies.definition.config import Study
    >>> [(p.n, p.mass, p.seed) for p in chosen(Study.from_toml("digits", ["n=6,12", "mass=1,0.1"]))]
    [(12, 1.0, 0), (12, 0.1, 0)]
    """
    points = study.points()
    n, width, seed = max(p.n for p in points), max(p.width for p in points), min(p.seed for p in points)
    return [p for p in points if (p.n, p.width, p.seed) == (n, width, seed)]


def _predict(study: "Study", point: Point, alpha: float, each: int) -> Sensitivity:
    import pandas as pd

    from stability import Replacement, conformal_factor, predict_twins, trained_divergence
    from stability.prediction.conformal import smallest_calibration

    at, n, m = study.at(point), point.n, smallest_calibration(alpha)
    drawn = _with_replacements(at, point, n * each + m)
    rows = len(drawn.replacement_rows)
    random = np.random.default_rng(np.random.SeedSequence([point.seed, n, each]))
    k = np.concatenate([np.repeat(np.arange(n), each), random.integers(0, n, m)])
    z = np.concatenate([random.permutation(rows) for _ in range(-(-len(k) // rows))])[: len(k)]
    zs = [Replacement(int(i), drawn.replacement_x[j], drawn.replacement_targets[j]) for i, j in zip(k, z, strict=True)]
    run = {
        "steps": at.steps, "lr": at.lr, "mass": point.mass, "output_metric": at.output_metric,
        "scale": at.metric_scale, "loss": at.loss, "held_out": drawn.held_out,
    }  # fmt: skip
    data = (drawn.model, drawn.x, drawn.targets)
    predicted = predict_twins(*data, zs, method="strided-path", **run)
    table = pd.DataFrame({"replaced": k, "replacement": np.array(drawn.replacement_rows)[z]})
    for name in (f"{when}_{of}" for of in QUANTITIES for when in ("predicted", "final")):
        table[name] = predicted.column(name).numpy()
    measured = trained_divergence(*data, zs[n * each :], **run)
    calibration, factors = table[n * each :].reset_index(drop=True), {}
    for of in QUANTITIES:
        calibration[f"measured_{of}"] = measured[f"measured_{of}"].double().cpu().numpy()
        factors[of] = conformal_factor(calibration[f"measured_{of}"], calibration[f"predicted_{of}"], alpha)
        table[f"upper_{of}"] = factors[of].upper(table[f"predicted_{of}"])
    return Sensitivity(point, drawn, table[: n * each].copy(), calibration, factors)


def _with_replacements(study: "Study", point: Point, wanted: int) -> "Draw":
    """The point as the study draws it, with as many rows for z' as there are, ``wanted`` at most."""
    from studies.data.datasets import load
    from studies.data.subsets import draw

    left = len(load(study.data).inputs) - study.data.held_out - max(study.grid.n)
    grid = study.grid.model_copy(update={"replacements": max(1, min(wanted, left))})
    return draw(study.model_copy(update={"grid": grid}), point)


def _write(found: list[Sensitivity], study: "Study", out: Path, command: Sequence[str] | None) -> None:
    import pandas as pd

    from studies.results.whole import usable, write_whole
    from studies.sensitivity.page import page

    with usable(out):
        out.mkdir(parents=True, exist_ok=True)
        for name in ("candidates", "calibration"):
            tables = [getattr(one, name).assign(**{key: getattr(one.point, key) for key in KEYS}) for one in found]
            whole = pd.concat(tables, ignore_index=True)
            whole = whole[[*KEYS, *[column for column in whole if column not in KEYS]]]
            file = out / ("sensitivity.parquet" if name == "candidates" else "calibration.parquet")
            write_whole(file, whole.to_parquet)
        text = page(found, study, command)
        write_whole(out / "report.html", lambda file: file.write_text(text, encoding="utf-8"))
