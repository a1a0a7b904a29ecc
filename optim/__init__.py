"""Steps and flows: the Woodbury optimizer, its pure functions for stacked networks, gradient flow in continuous time."""

from importlib import import_module

from nt_kernel.house import check_not_shadowed

check_not_shadowed(__file__, ["nt_kernel"])

_HOME = {
    "Woodbury": "woodbury",
    "woodbury_direction": "direction",
    "woodbury_step": "direction",
    "gradient_flow": "flow",
    "StepTooLargeError": "step_limit",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'optim' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return __all__
