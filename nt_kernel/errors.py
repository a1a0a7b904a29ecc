"""What can go wrong that is not the caller's fault."""


class NumericalError(RuntimeError):
    """The arithmetic failed although the input was well formed.

    ``where`` names the place (layer, step), ``value`` is the number that tells how badly.

    >>> str(NumericalError("inner system is not positive definite", where="layer '0'", value=-1e-3))
    "layer '0': inner system is not positive definite (-0.001)"
    """

    def __init__(self, message: str, *, where: str = "", value: float | None = None):
        self.where, self.value = where, value
        super().__init__((f"{where}: " if where else "") + message + (f" ({value:.3g})" if value is not None else ""))
