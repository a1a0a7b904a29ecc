"""The figures of a study. The names below load on first use; each figure is also a module of its own."""

from nt_kernel.house import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(["COLUMN", "PAGE", "STYLE", "new_figure", "save_figure"], "studies.figures.style"),
        **dict.fromkeys(["KINDS", "LINES"], "studies.figures.lines"),
        **dict.fromkeys(["bounds_figure", "draw_bounds_vs_n", "draw_exponents"], "studies.figures.bounds"),
        **dict.fromkeys(
            ["confinement_figure", "draw_held_out", "draw_place", "draw_ratios", "ratios_figure"],
            "studies.figures.confinement",
        ),
        **dict.fromkeys(["constants_figure", "draw_constant"], "studies.figures.constants"),
        **dict.fromkeys(
            ["draw_divergence", "draw_spectrum", "spectrum_figure", "training_figure"], "studies.figures.training"
        ),
        **dict.fromkeys(["draw_waterfall", "waterfall_figure"], "studies.figures.waterfall"),
        **dict.fromkeys(["Drawing", "draw_figures", "drawings"], "studies.figures.overview"),
    },
)
