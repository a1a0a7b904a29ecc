"""The figures of a study: ``draw_…(ax, frame, …)`` draws one panel on any Axes and returns it, ``…_figure(frame, …)`` makes a
whole figure of column or page width, ``save_figure`` writes it as .pdf, .svg and .png. One line for each: docs/figures.md.

The names load on first use; each figure is also a module of its own.
"""

from nt_kernel.house import lazy_names

HOME = {
    "style": ["COLUMN", "PAGE", "STYLE", "new_figure", "save_figure", "styled"],
    "lines": ["KINDS", "LINES"],
    "overview": ["Drawing", "draw_figures", "drawings"],
    "bounds": ["bounds_figure", "draw_bounds", "draw_exponents"],
    "training": ["draw_divergence", "draw_spectrum", "spectrum_figure", "training_figure"],
    "constants": ["constants_figure", "draw_constant"],
    "waterfall": ["draw_waterfall", "waterfall_figure"],
    "confinement": ["confinement_figure", "draw_held_out", "draw_place", "draw_ratios", "ratios_figure"],
    "grid": ["draw_over_axis", "draw_trajectory", "over_axis_figure", "trajectory_figure"],
    "predicted": [
        *("calibration_figure", "draw_calibration", "draw_predicted", "draw_prediction_error"),
        *("error_figure", "predicted_figure"),
    ],
    "movements": ["bound_figure", "budget_figure", "draw_bound", "draw_budget"],
    "diffusion": ["draw_rounds", "draw_samples", "rounds_figure", "samples_figure", "tuned_table"],
    "rlo": ["draw_settings", "draw_sweep", "sweep_figure"],
    "action": ["action_figure", "draw_alignment", "draw_excess"],
    "routes": ["draw_routes", "routes_figure"],
}
__getattr__, __dir__, __all__ = lazy_names(
    __name__, {name: f"studies.figures.{module}" for module, names in HOME.items() for name in names}
)
