"""Studies: questions asked of many twin runs.

The names below load on first use (PEP 562), so that the command line answers at once.
"""

from importlib import import_module

try:
    from nt_kernel.house import check_not_shadowed
except ImportError as error:  # somebody else's nt_kernel came first
    import nt_kernel

    place = getattr(nt_kernel, "__file__", None) or next(iter(nt_kernel.__path__))
    raise ImportError(
        f"{place} hides contraction-stability's own nt_kernel: rename it, or take its folder off sys.path",
        name="nt_kernel",
        path=place,
    ) from error

check_not_shadowed(__file__, ["nt_kernel", "optim", "stability"])

_HOME = {
    "Study": "config",
    "ConfigError": "config",
    "run_study": "runner",
    "load_results": "store",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'studies' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__
