"""The page of ``stability predict``: the ranking with its pictures, predicted against trained, the guarantee in words."""

import base64
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.style import UNIT
from studies.findings.predicted import agreement
from studies.findings.written import number

if TYPE_CHECKING:
    from markupsafe import Markup

    from studies.definition.config import Study
    from studies.sensitivity.predict import Sensitivity

TITLE = "Which training samples is this model most sensitive to?"
NAMES = {"sup": "largest over S", "others": "the other samples of S", "heldout": "held-out points"}


def page(found: "Sequence[Sensitivity]", study: "Study", command: Sequence[str] | None = None) -> str:
    """The self-contained page as text."""
    from studies.data.datasets import load
    from studies.report.page import environment, shared, when
    from studies.results.provenance import provenance

    loaded = load(study.data)
    facts = provenance(command)
    parts = [_part(one, loaded) for one in found]
    inner = {"calibration": "Trained against predicted", "ranking": "Ranking"}
    contents = [("finding", "What was found", [])]
    contents += [(p["id"], p["name"], [(f"{p['id']}-{id}", title, []) for id, title in inner.items()]) for p in parts]
    return (
        environment("studies.sensitivity")
        .get_template("page.html.j2")
        .render(
            page={"title": TITLE, "question": "", "commit": facts["commit"], "date": when(facts["date"])}
            | {"command": shared(facts["command"])},
            study=study.title or study.data.name,
            unit=UNIT,
            names=NAMES,
            parts=parts,
            contents=[*contents, ("again", "How to reproduce", [])],
        )
    )


def _part(found: "Sensitivity", loaded) -> dict:
    from studies.report.page import anchor

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
    point, own = found.point, agreement(found.calibration)
    id = anchor(f"n{point.n}-width{point.width}-mass{point.mass:g}-seed{point.seed}")
    return {
        "id": id,
        "agreement": f"off by {100 * own['median error']:.2g} % in the median, by {100 * own['largest error']:.2g} % at most",
        "name": f"n = {point.n}, width {point.width}, mass {point.mass:g}, seed {point.seed}",
        "pictures": loaded.image is not None,
        "rows": rows,
        "candidates": len(found.candidates),
        "factors": [(NAMES[of], number(q.factor), q.guarantee) for of, q in found.factors.items()],
        "calibrated": len(found.calibration),
        "figure": drawn(found, f"{id}-figure"),
    }


def drawn(found: "Sensitivity", id: str) -> "Markup":
    """Predicted against trained divergence of the calibration twins, as an element of the page."""
    from studies.figures.predicted import calibration_figure
    from studies.figures.style import save_figure
    from studies.report.page import inline_svg

    figure = calibration_figure(found.calibration, found.factors["sup"].factor)
    with tempfile.TemporaryDirectory() as folder:
        svg = save_figure(figure, Path(folder) / "calibration")[0]
        return inline_svg(svg, id, "Trained against predicted largest divergence of the calibration twins")


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
