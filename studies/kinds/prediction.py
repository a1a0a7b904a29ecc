"""Prediction without twins: what one run on S says of every twin, held against twins that were trained."""

from typing import TYPE_CHECKING, Literal

from studies.definition.kinds import Kind, Section, TableSpec
from studies.definition.points import Point
from studies.kinds.twins import TwinStudy, check

if TYPE_CHECKING:
    import pandas as pd

PLACES = ("sup", "l2", "replaced", "others", "heldout")


class PredictionStudy(TwinStudy):
    """The keys of ``kind = "twins"``, and ``method`` of ``stability.predict_twins``; the ``replacements`` are the candidates.

    All of them are trained too, to see how right the prediction was; a user who trusts it trains none.
    """

    method: Literal["kernel-path", "parameter-path", "cg"] = "parameter-path"


def run_point(study: PredictionStudy, point: Point) -> "dict[str, pd.DataFrame]":
    """Predicted and measured suprema of every candidate; the seconds of both ways."""
    import time

    import pandas as pd

    import stability
    from studies.data.subsets import draw

    at = study.at(point)
    drawn = draw(at, point)
    candidates = [
        stability.Replacement(index=k, x=x, target=target)
        for k, x, target in zip(drawn.replaced, drawn.replacement_x, drawn.replacement_targets, strict=True)
    ]
    options = {"steps": at.steps, "mass": point.mass, "output_metric": at.output_metric, "scale": at.metric_scale}
    options |= {"loss": at.loss, "held_out": drawn.held_out, "lr": _number(at.lr, drawn)}
    start = time.perf_counter()
    predicted = stability.predict_twins(drawn.model, drawn.x, drawn.targets, candidates, method=at.method, **options)
    between = time.perf_counter()
    measured = stability.trained_divergence(drawn.model, drawn.x, drawn.targets, candidates, **options)
    seconds = {"predict_seconds": between - start, "train_seconds": time.perf_counter() - between}
    rows = []
    for j, (k, row) in enumerate(zip(drawn.replaced, drawn.replacement_rows, strict=True)):
        found = {f"measured_{place}": float(measured[f"measured_{place}"][j]) for place in PLACES}
        found |= {f"predicted_{place}": float(predicted.column(f"predicted_{place}")[j]) for place in PLACES}
        rows.append(study.columns(point) | {"replaced": k, "replacement": row} | found)
    timing = pd.DataFrame([study.columns(point) | seconds])
    return {"summary": pd.DataFrame(rows), "timing": timing}


def _number(lr: float | str, drawn) -> float:
    """lr = "auto" is half the limit of the linearised step, 1/N for N layers (the config has checked that it applies)."""
    if lr != "auto":
        return lr
    from nt_kernel import layer_factors
    from optim.steps.step_limit import auto_lr

    return auto_lr(len(layer_factors(drawn.model, drawn.x)[1]), "mean")


def work(study: PredictionStudy, point: Point) -> int:
    return round(study.grid.replacements * (1 + (point.n / 22) ** 3) * 10) + 1


def sections(frames) -> list[Section]:
    from studies.figures.predicted import prediction_sections

    return prediction_sections(frames)


def finding(frames) -> list[str]:
    from studies.findings.predicted import prediction_finding

    return prediction_finding(frames)


def numbers(frames):
    from studies.findings.predicted import prediction_numbers

    return prediction_numbers(frames)


PREDICTION = Kind(
    name="prediction",
    what="every twin predicted from one run, held against trained ones",
    config=PredictionStudy,
    tables={
        "summary": TableSpec(("replaced", "replacement"), ("measured_sup", "predicted_sup")),
        "timing": TableSpec((), ("predict_seconds", "train_seconds")),
    },
    run_point=run_point,
    work=work,
    check=check,
    sections=sections,
    finding=finding,
    numbers=numbers,
)
