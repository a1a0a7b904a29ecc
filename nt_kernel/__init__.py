"""A network seen to first order: layer factors, Gram matrices, the layer metric, the generalized neural tangent kernel.

The names below load on first use (PEP 562), so that ``import nt_kernel`` costs nothing but itself.
"""

from nt_kernel.house import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "layer_factors": "nt_kernel.factors",
        "stacked_layer_factors": "nt_kernel.factors",
        "Factor": "nt_kernel.factors",
        "LayerMetric": "nt_kernel.metric",
        "generalized_ntk": "nt_kernel.ntk",
        "empirical_ntk": "nt_kernel.ntk",
        "GeneralizedNTK": "nt_kernel.ntk",
        "safe_lambda_min": "nt_kernel.spectrum",
        "NumericalError": "nt_kernel.errors",
    },
)
