"""Layer masses that make the bound T1 smallest, on the digits: what they do to the bound, and to the twins.

    python -m examples.optimal_masses [FOLDER] [--quick]

For every n and seed a run with equal masses is recorded, the semidefinite program gives the masses that are best for it, and
S and its twins are trained again with these: T1, and the measured divergence, before and after. Plain gradient descent (scale
"none"), and what the same masses do at scale "mean". Writes optimal-masses.png, .svg and .pdf into FOLDER
(results/optimal-masses) and prints one row per n and seed.
"""

from pathlib import Path

import pandas as pd
import torch

from examples.options import options
from optim import Woodbury
from stability import Replacement, mass_snapshot, optimal_masses, train_twins
from stability.contraction.optimal_mass import OptimalMasses
from studies import Study
from studies.data.subsets import Draw, draw
from studies.figures.lines import hue
from studies.figures.style import PAGE, log_limits, log_y, n_axis, new_figure, save_figure, styled

SIZES, SEEDS, WIDTH, STEPS, LR = (6, 12, 24), 3, 32, 200, {"none": 0.02, "mean": 0.1}
SNAPSHOTS = 5
SCALES = {"none": "gradient descent (scale none)", "mean": "Woodbury (scale mean)"}


def masses_of(d: Draw, candidates: list[Replacement], *, steps: int) -> OptimalMasses:
    """Record the run on S with equal masses, as a user would, and solve for the masses that are best along it."""
    start = {name: value.clone() for name, value in d.model.state_dict().items()}
    opt = Woodbury(d.model, lr=LR["none"], scale="none", check_step=False)
    extra, snapshots = torch.stack([z.x for z in candidates]), []
    for t in range(steps + 1):
        if t % max(1, steps // (SNAPSHOTS - 1)) == 0:
            snapshots.append(mass_snapshot(d.model, d.x, extra))
        opt.zero_grad()
        (0.5 * (d.model(d.x) - d.targets).square().sum(1).mean()).backward()
        opt.step()
    d.model.load_state_dict(start)
    return optimal_masses(snapshots)


def compare(study: Study, *, steps: int) -> pd.DataFrame:
    """One row per n, seed, scale and twin: bound and measurement before and after, and the masses."""
    rows = []
    for point in study.points():
        d = draw(study, point)
        candidates = [
            Replacement(k, x, a) for k, x, a in zip(d.replaced, d.replacement_x, d.replacement_targets, strict=True)
        ]
        found = masses_of(d, candidates, steps=steps)
        for scale, lr in LR.items():
            shared = {"steps": steps, "lr": lr, "scale": scale, "held_out": d.held_out, "null_twin": False}
            equal = train_twins(d.model, d.x, d.targets, candidates, mass=1.0, **shared).pairs
            best = train_twins(d.model, d.x, d.targets, candidates, mass=found.masses, **shared).pairs
            for before, after in zip(equal, best, strict=True):
                row = {"n": point.n, "seed": point.seed, "scale": scale, "replaced": before["replaced"]}
                for name in ("T1", "measured_sup", "measured_heldout", "train_loss"):
                    row[f"{name}_equal"], row[f"{name}_best"] = before[name], after[name]
                rows.append(row | {"improvement": found.improvement, "masses": found.masses})
    return pd.DataFrame(rows)


@styled
def figure(frame: pd.DataFrame):
    """After over before, per twin, against n: T1 and the divergence, one panel per scale."""
    axes = new_figure(PAGE, 2.6).subplots(1, 2, sharey=True)
    names = {"T1": ("T1, the bound", "blue", "^"), "measured_sup": ("divergence on S, measured", "black", "o")}
    names["measured_heldout"] = ("divergence on held-out points, measured", "vermilion", "s")
    values = []
    for ax, (scale, title) in zip(axes, SCALES.items(), strict=True):
        rows = frame[frame["scale"] == scale]
        for j, (name, (label, color, marker)) in enumerate(names.items()):
            ratio = rows[f"{name}_best"] / rows[f"{name}_equal"]
            values += ratio.tolist()
            at = rows["n"] * 1.09 ** (j - 1)
            ax.plot(at, ratio, marker, color=hue(color), markeredgecolor="white", label=label)
        ax.axhline(1, color="black", linewidth=0.8, zorder=1)
        n_axis(ax, sorted(rows["n"].unique()), margin=1.35)
        ax.set_title(title, fontsize=7.5)
    for ax in axes:
        log_y(ax, *log_limits(values))
    axes[0].set_ylabel("optimal masses / equal masses")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return axes[0].figure


def main(folder: Path, *, quick: bool = False) -> pd.DataFrame:
    grid = ["n=4,6", "width=16"] if quick else [f"n={','.join(map(str, SIZES))}", f"width={WIDTH}"]
    study = Study.from_toml("digits", [*grid, "mass=1", f"seeds={1 if quick else SEEDS}", "replacements=2"])
    frame = compare(study, steps=20 if quick else STEPS)
    for (n, seed, scale), rows in frame.groupby(["n", "seed", "scale"], sort=False):
        if scale == "none":
            text = ", ".join(f"{layer}: {mass:.3g}" for layer, mass in rows["masses"].iloc[0].items())
            print(
                f"n = {n}, seed {seed}: masses {text}; h/ξ of the recorded run falls {rows['improvement'].iloc[0]:.2f}×"
            )
        means = rows.mean(numeric_only=True)
        print(
            f"    {scale}: T1 {means['T1_equal']:.3g} -> {means['T1_best']:.3g}; divergence on S "
            f"{means['measured_sup_equal']:.3f} -> {means['measured_sup_best']:.3f}, held-out "
            f"{means['measured_heldout_equal']:.3f} -> {means['measured_heldout_best']:.3f}; training loss "
            f"{means['train_loss_equal']:.3g} -> {means['train_loss_best']:.3g}"
        )
    for scale, rows in frame.groupby("scale", sort=False):
        after = {
            name: rows[f"{name}_best"] / rows[f"{name}_equal"] for name in ("T1", "measured_sup", "measured_heldout")
        }
        text = "; ".join(f"{name} × {v.median():.2f} ({v.min():.2f} to {v.max():.2f})" for name, v in after.items())
        print(f"{scale}, {len(rows)} twins, median (range) of after over before: {text}")
    save_figure(figure(frame), folder / "optimal-masses")
    return frame


if __name__ == "__main__":
    folder, quick = options(__doc__, "optimal-masses")
    main(folder, quick=quick)
