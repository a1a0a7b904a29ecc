"""Two panels of one's own choice from a results folder, one column wide, for a paper: python -m examples.paper_figure DIR."""

import sys
from pathlib import Path

from studies import load_results
from studies.figures import COLUMN, draw_bounds, draw_divergence, new_figure, save_figure


def main(results: Path, out: Path) -> list[Path]:
    frames = load_results(results)
    mass, n = frames.summary["mass"].max(), frames.summary["n"].max()
    rows, runs = frames.summary.query("mass == @mass"), frames.trajectories.query("mass == @mass and n == @n")
    figure = new_figure(COLUMN, 4.2)
    above, below = figure.subplots(2, 1)
    draw_bounds(above, rows, ("T0", "T3", "T4", "measured_l2")).legend(fontsize=6.5, ncols=2)
    draw_divergence(below, runs, ("T4", "path_l2", "measured_l2")).set_title(f"n = {n}, mass {mass:g}")
    return save_figure(figure, out)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/digits")
    print(*main(folder, folder / "figures" / "paper"), sep="\n")
