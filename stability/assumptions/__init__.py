"""What theorem 3 and the other systems take for granted, as objects: one verdict each, and the report on all for one run."""

from nt_kernel.house import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Assumption": "stability.assumptions.verdict",
        "AssumptionReport": "stability.assumptions.report",
        "AssumptionViolated": "stability.assumptions.failures",
        "BaselineMissing": "stability.assumptions.failures",
        "CATALOGUE": "stability.assumptions.catalogue",
        "CONTROLS": "stability.assumptions.controls",
        "ConstantMoved": "stability.assumptions.failures",
        "SYSTEMS": "stability.assumptions.catalogue",
        "SYSTEM_CONTROLS": "stability.assumptions.system_controls",
        "movement_assumptions": "stability.assumptions.systems",
        "naim_assumptions": "stability.assumptions.systems",
        "NULL_SHARE": "stability.assumptions.catalogue",
        "Seen": "stability.assumptions.own",
        "Spec": "stability.assumptions.catalogue",
        "add_assumption": "stability.assumptions.own",
        "check_assumptions": "stability.assumptions.check",
        "judge": "stability.assumptions.verdicts",
        "no_kernel_drift": "stability.assumptions.verdicts",
        "positive_rate": "stability.assumptions.verdicts",
        "remove_assumption": "stability.assumptions.own",
        "resolved_by_floats": "stability.assumptions.verdicts",
        "smooth_activations": "stability.assumptions.activations",
    },
)
