"""Studies: questions asked of many twin runs.

The names below load on first use (PEP 562), so that the command line answers at once.
"""

try:
    from nt_kernel.house import check_not_shadowed, lazy_names
except ImportError as error:  # somebody else's nt_kernel came first
    import nt_kernel

    place = getattr(nt_kernel, "__file__", None) or next(iter(nt_kernel.__path__))
    raise ImportError(
        f"{place} hides contraction-stability's own nt_kernel: rename it, or take its folder off sys.path",
        name="nt_kernel",
        path=place,
    ) from error

check_not_shadowed(__file__, ["nt_kernel", "optim", "stability"])

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Study": "studies.definition.config",
        "ConfigError": "studies.definition.config",
        "run_study": "studies.running.runner",
        "predict_study": "studies.sensitivity.predict",
        "load_results": "studies.results.store",
    },
)
