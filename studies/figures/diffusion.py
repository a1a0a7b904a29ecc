"""Figures of the latent-diffusion testbed: losses along the rounds, and the samples themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from studies.figures.movements import ORDER, look
from studies.figures.style import PAGE, log_limits, log_y, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from studies.results.frames import Frames

QUANTITIES = {"loss": "held-out noise-prediction loss", "inexactness": "δ / exact step"}


def _tuned(frames: Frames):
    from studies.findings.diffusion import best

    return best(frames)[["solver", "budget", "lr", "seed"]]


@styled
def rounds_figure(frames: Frames) -> Figure:
    """Loss and inexactness against the round, a column for each kind of budget."""
    rows = frames.rounds.merge(_tuned(frames), on=["solver", "budget", "lr", "seed"])
    budgets = list(dict.fromkeys(rows["budget"]))
    figure = new_figure(PAGE, 4.4)
    axes = figure.subplots(2, len(budgets), squeeze=False, sharey="row", sharex=True)
    for j, budget in enumerate(budgets):
        for ax, (name, label) in zip(axes[:, j], QUANTITIES.items(), strict=True):
            for solver in [s for s in ORDER if s in set(rows["solver"])]:
                by = rows[(rows["budget"] == budget) & (rows["solver"] == solver)].groupby("round")[name]
                style = {**look(solver), "marker": "none"}
                ax.plot(by.mean().index, by.mean(), label=solver, **style)
                ax.fill_between(by.min().index, by.min(), by.max(), color=style["color"], alpha=0.15, linewidth=0)
            log_y(ax, *log_limits(rows[name]))
            if not j:
                ax.set_ylabel(label)
        axes[0, j].set_title(f"equal {budget}", loc="left")
        axes[1, j].set_xlabel("round (outer step)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


@styled
def samples_figure(frames: Frames) -> Figure:
    """Rows of 8 images: real, reconstructed, and one row for each solver."""
    table = frames.samples.merge(_tuned(frames), on=["solver", "budget", "lr", "seed"])
    budget = "seconds" if "seconds" in set(table["budget"]) else table["budget"].iloc[0]
    table = table[(table["seed"] == table["seed"].min()) & (table["budget"] == budget)]
    pixels = [name for name in table.columns if name.startswith("pixel_")]
    side = round(len(pixels) ** 0.5)
    solvers = [s for s in ORDER if s in set(table["solver"])]
    rows = [("real", table["source"].eq("real") & table["solver"].eq(solvers[0]))]
    rows.append(("reconstructed", table["source"].eq("reconstructed") & table["solver"].eq(solvers[0])))
    rows += [(solver, table["source"].eq("sample") & table["solver"].eq(solver)) for solver in solvers]
    figure = new_figure(PAGE, 0.72 * len(rows))
    axes = figure.subplots(len(rows), 8, squeeze=False)
    for line, (label, which) in zip(axes, rows, strict=True):
        images = table[which].sort_values("image")[pixels].to_numpy(float)
        for ax, image in zip(line, images, strict=True):
            ax.imshow(np.clip(image, 0, None).reshape(side, side), cmap="gray_r", vmin=0, vmax=0.8)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    return figure
