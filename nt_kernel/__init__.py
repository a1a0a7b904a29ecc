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
        "structured": "nt_kernel.structures",
        # kernels
        "empirical_ntk": "nt_kernel.empirical",
        "predict_peak": "nt_kernel.empirical",
        "PeakMemory": "nt_kernel.memory",
        "generalized_ntk": "nt_kernel.ntk",
        "GeneralizedNTK": "nt_kernel.ntk",
        "ntk_operator": "nt_kernel.operators",
        "generalized_ntk_operator": "nt_kernel.operators",
        "KernelOperator": "nt_kernel.operators",
        # masses and metrics
        "LayerMetric": "nt_kernel.metric",
        "RowColumnMass": "nt_kernel.mass",
        "huber": "nt_kernel.output_metric",
        "sampled_fisher": "nt_kernel.output_metric",
        "from_factor": "nt_kernel.output_metric",
        "scaled": "nt_kernel.output_metric",
        # spectra
        "extremal_eigenvalues": "nt_kernel.extremal",
        "certified_lambda_min": "nt_kernel.certified",
        "certified_lambda_max": "nt_kernel.certified",
        "condition_number": "nt_kernel.certified",
        "effective_rank": "nt_kernel.spectrum",
        "effective_dimension": "nt_kernel.spectrum",
        "safe_lambda_min": "nt_kernel.spectrum",
        "NumericalError": "nt_kernel.errors",
    },
)
