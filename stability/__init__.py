"""Twins, constants, bounds, enclosures, assumptions: how stable training is, held against contraction theory."""

from importlib import import_module

from nt_kernel.house import check_not_shadowed

check_not_shadowed(__file__, ["nt_kernel", "optim"])

_HOME = {
    "train_twins": "stability.twins",
    "TwinResult": "stability.twins",
    "Replacement": "stability.replacement",
    "bound_ladder": "stability.bounds",
    "scalar_enclosure": "stability.enclosures",
    "ellipsoidal_enclosure": "stability.enclosures",
    "path_length": "stability.enclosures",
    "Woodbury": "optim.woodbury",
    "generalized_ntk": "nt_kernel.ntk",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'stability' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__():
    return __all__
