"""The page of ``stability predict``: the ranking with its pictures, predicted against trained, the guarantee in words."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.style import COLUMN, UNIT, log_limits, log_y, new_figure, series_style, styled
from studies.findings.written import number

if TYPE_CHECKING:
    from studies.definition.config import Study
    from studies.sensitivity.predict import Sensitivity

TITLE = "Which training samples is this model most sensitive to?"
NAMES = {"sup": "largest over S", "others": "the other samples of S", "heldout": "held-out points"}


def page(found: "Sequence[Sensitivity]", study: "Study", command: Sequence[str] | None = None) -> str:
    """The self-contained page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from studies.data.datasets import load
    from studies.results.provenance import provenance

    loaded = load(study.data)
    environment = Environment(
        loader=PackageLoader("studies.sensitivity", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    facts = provenance(command)
    return environment.get_template("page.html.j2").render(
        title=TITLE,
        study=study.title or study.data.name,
        unit=UNIT,
        names=NAMES,
        parts=[_part(one, loaded) for one in found],
        command=facts["command"],
        commit=facts["commit"],
        date=facts["date"],
    )


def _part(found: "Sensitivity", loaded) -> dict:
    ranking = found.ranking()
    others, heldout = (found.candidates.groupby("replaced")[f"predicted_{of}"].median() for of in ("others", "heldout"))
    answers, x = found.drawn.targets.cpu().numpy(), found.drawn.x.cpu().numpy()
    rows = [
        {
            "k": int(row.replaced),
            "picture": picture(x[int(row.replaced)], loaded.image),
            "answer": answer(answers[int(row.replaced)], loaded.classes),
            "median": number(row.median),
            "range": f"{number(row.min)} – {number(row.max)}",
            "upper": number(row.upper),
            "others": number(others[row.replaced]),
            "heldout": number(heldout[row.replaced]),
            "worst": int(row.worst),
            "worst_picture": picture(loaded.inputs[int(row.worst)], loaded.image),
            "worst_answer": answer(loaded.targets[int(row.worst)], loaded.classes),
        }
        for row in ranking.rename(columns={"median": "median_", "min": "min_", "max": "max_"})
        .rename(columns=lambda name: name.rstrip("_"))
        .itertuples(index=False)
    ]
    point = found.point
    return {
        "name": f"n = {point.n}, width {point.width}, mass {point.mass:g}, seed {point.seed}",
        "pictures": loaded.image is not None,
        "rows": rows,
        "candidates": len(found.candidates),
        "factors": [(NAMES[of], number(q.factor), q.guarantee) for of, q in found.factors.items()],
        "calibrated": len(found.calibration),
        "figure": data_uri(calibration_figure(found)),
    }


@styled
def calibration_figure(found: "Sensitivity") -> bytes:
    """Predicted against trained sup divergence of the calibration twins on log axes, as PNG."""
    from matplotlib.ticker import NullLocator

    sheet = new_figure(COLUMN, COLUMN * 0.9)
    axis = sheet.subplots()
    table, q = found.calibration, found.factors["sup"].factor
    low, high = log_limits([*table["measured_sup"], *table["predicted_sup"]], pad=0.12)
    axis.plot([low, high], [low, high], color="0.55", linewidth=0.8, label="trained = predicted")
    if np.isfinite(q):
        axis.plot([low, high], [q * low, q * high], color="0.2", linewidth=0.9, linestyle="--", label="q · predicted")
    axis.scatter(table["predicted_sup"], table["measured_sup"], s=14, linewidths=0, color=series_style(1, 3)["color"])
    axis.set(
        xscale="log", xlim=(low, high), xlabel=f"predicted sup divergence, {UNIT}", ylabel="trained sup divergence"
    )
    log_y(axis, low, high)
    axis.xaxis.set_major_locator(axis.yaxis.get_major_locator())
    axis.xaxis.set_major_formatter(axis.yaxis.get_major_formatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.legend(loc="upper left")
    file = io.BytesIO()
    sheet.canvas.print_png(file, metadata={"Software": None})
    return file.getvalue()


def picture(row: np.ndarray, shape: tuple[int, ...] | None) -> str:
    """A row as a small PNG, dark on light where it has one channel, as a data URI; "" for rows that are no images.

    >>> picture(np.zeros(4), None), picture(np.arange(4.0), (1, 2, 2))[:22]
    ('', 'data:image/png;base64,')
    """
    if shape is None:
        return ""
    from PIL import Image

    values = np.asarray(row, float).reshape(shape)
    span = values.max() - values.min()
    values = (values - values.min()) / (span if span > 0 else 1)
    pixels = (255 * (1 - values if shape[0] == 1 else values)).round().astype(np.uint8)
    image = Image.fromarray(pixels[0]) if shape[0] == 1 else Image.fromarray(np.moveaxis(pixels, 0, -1))
    file = io.BytesIO()
    image.save(file, "PNG")
    return data_uri(file.getvalue())


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def answer(target: np.ndarray, classes: int) -> str:
    """The target in words: its class, or its numbers.

    >>> answer(np.array([0.0, 1.0]), 2), answer(np.array([0.25]), 0)
    ('1', '0.25')
    """
    return str(int(target.argmax())) if classes else ", ".join(number(float(value)) for value in target)
