"""A network seen to first order: layer factors, Gram matrices, the layer metric, the generalized neural tangent kernel.

The names below load on first use (PEP 562), so that ``import nt_kernel`` costs nothing but itself.
"""

from importlib import import_module

_HOME = {
    "layer_factors": "factors",
    "stacked_layer_factors": "factors",
    "Factor": "factors",
    "LayerMetric": "metric",
    "generalized_ntk": "ntk",
    "empirical_ntk": "ntk",
    "GeneralizedNTK": "ntk",
    "safe_lambda_min": "spectrum",
    "NumericalError": "errors",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'nt_kernel' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__
