"""Steps and flows: the Woodbury optimizer, its pure functions for stacked networks, gradient flow in continuous time."""

from nt_kernel.house import check_not_shadowed, lazy_names

check_not_shadowed(__file__, ["nt_kernel"])

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Woodbury": "optim.woodbury",
        "woodbury_direction": "optim.direction",
        "woodbury_step": "optim.direction",
        "gradient_flow": "optim.flow",
        "StepTooLargeError": "optim.step_limit",
    },
)
