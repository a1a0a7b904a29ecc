"""Twins, constants, bounds, enclosures, assumptions: how stable training is, held against contraction theory."""

from nt_kernel.house import check_not_shadowed, lazy_names

check_not_shadowed(__file__, ["nt_kernel", "optim"])

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "train_twins": "stability.twins",
        "TwinResult": "stability.twins",
        "Replacement": "stability.replacement",
        "bound_ladder": "stability.bounds",
        "scalar_enclosure": "stability.enclosures",
        "ellipsoidal_enclosure": "stability.enclosures",
        "path_length": "stability.enclosures",
        # losses
        "Loss": "stability.losses",
        "huber_loss": "stability.losses",
        "resolve_loss": "stability.losses",
        "squared_loss": "stability.losses",
        # what a result is worth
        "Statement": "stability.statement",
        "statements": "stability.statement",
        # what the theorem takes for granted
        "Assumption": "stability.assumptions.verdict",
        "AssumptionReport": "stability.assumptions.report",
        "check_assumptions": "stability.assumptions.check",
        "movement_assumptions": "stability.assumptions.systems",
        "naim_assumptions": "stability.assumptions.systems",
        # recorded runs
        "Certificate": "stability.recording.rung",
        "ClosedLoop": "stability.recording.closed_loop",
        "RunRecord": "stability.recording.record",
        "Rung": "stability.recording.rung",
        "StepRule": "stability.recording.step_rule",
        "certify": "stability.recording.certify",
        "record": "stability.recording.record",
        # prediction from one run
        "ConformalFactor": "stability.prediction.conformal",
        "Prediction": "stability.prediction.predict",
        "TwinPredictor": "stability.prediction.run",
        "conformal_factor": "stability.prediction.conformal",
        "coverage_study": "stability.prediction.coverage",
        "predict_twins": "stability.prediction.predict",
        "trained_divergence": "stability.prediction.trained",
        "uniform_estimate": "stability.prediction.uniform",
        "uniform_per_sample": "stability.prediction.per_sample",
        # contraction metrics
        "ContractionMetric": "stability.contraction.result",
        "certified_metric": "stability.contraction.metric",
        "contraction_metric": "stability.contraction.metric",
        "metric_enclosure": "stability.contraction.result",
        "momentum_matrices": "stability.contraction.momentum",
        "momentum_metric": "stability.contraction.momentum",
        "momentum_rate": "stability.contraction.momentum",
        "momentum_step_limit": "stability.contraction.momentum",
        "parallel": "stability.contraction.composition",
        "cascade": "stability.contraction.composition",
        "feedback": "stability.contraction.composition",
        "mass_snapshot": "stability.contraction.optimal_mass",
        "optimal_masses": "stability.contraction.optimal_mass",
        # what the field would use in their place
        "Effects": "stability.influence_functions",
        "bousquet_elisseeff": "stability.routes",
        "convex_constants": "stability.convex_losses",
        "influence": "stability.influence_functions",
        "metric_change": "stability.moving_metric",
        "on_average_gap": "stability.on_average",
        "parameter_constants": "stability.risk_constants",
        "parameter_routes": "stability.routes",
        "replace_one_losses": "stability.on_average",
        "tracin": "stability.tracing",
        "tracin_path": "stability.tracing",
        # action
        "ActionRecord": "stability.action_record",
        "action_balance": "stability.action",
        "action_terms": "stability.action",
        "adjoint_states": "stability.adjoint",
        "lagrangian": "stability.adjoint",
        "record_action": "stability.action_record",
        "Woodbury": "optim.woodbury",
        "generalized_ntk": "nt_kernel.kernels.ntk",
    },
)
