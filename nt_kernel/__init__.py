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
        "structured": "nt_kernel.capture.structures",
        # kernels
        "empirical_ntk": "nt_kernel.kernels.empirical",
        "predict_peak": "nt_kernel.kernels.empirical",
        "PeakMemory": "nt_kernel.kernels.memory",
        "generalized_ntk": "nt_kernel.kernels.ntk",
        "GeneralizedNTK": "nt_kernel.kernels.ntk",
        "ntk_operator": "nt_kernel.kernels.operators",
        "generalized_ntk_operator": "nt_kernel.kernels.operators",
        "KernelOperator": "nt_kernel.kernels.operators",
        # masses and metrics
        "LayerMetric": "nt_kernel.metric.layer_metric",
        "ModelMetric": "nt_kernel.metric.model_metric",
        "RowColumnMass": "nt_kernel.mass",
        "huber": "nt_kernel.metric.output_metric",
        "sampled_fisher": "nt_kernel.metric.output_metric",
        "from_factor": "nt_kernel.metric.output_metric",
        "scaled": "nt_kernel.metric.output_metric",
        # spectra
        "extremal_eigenvalues": "nt_kernel.spectra.extremal",
        "certified_lambda_min": "nt_kernel.spectra.certified",
        "certified_lambda_max": "nt_kernel.spectra.certified",
        "condition_number": "nt_kernel.spectra.certified",
        "effective_rank": "nt_kernel.spectra.spectrum",
        "effective_dimension": "nt_kernel.spectra.spectrum",
        "safe_lambda_min": "nt_kernel.spectra.spectrum",
        "NumericalError": "nt_kernel.errors",
    },
)
