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
