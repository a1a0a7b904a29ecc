"""Continuous time: θ̇ = −G⁻¹∇h with tolerance-controlled steps, so that flow bounds meet the flow they speak of."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nt_kernel.errors import NumericalError


def gradient_flow(
    velocity: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    params: dict[str, Tensor],
    times: Sequence[float],
    *,
    rtol: float = 1e-9,
    atol: float = 1e-11,
    method: str = "DOP853",
) -> list[dict[str, Tensor]]:
    """Solutions of θ̇ = velocity(θ) from ``params`` at ``times`` (ascending; times[0] is the start), by scipy's solve_ivp.

    Parameters are dicts of tensors (stacked networks included); the ODE runs on them as one float64 vector.
    Raises NumericalError when the solver gives up (a stiff flow: lower the tolerance or write method="LSODA").

    >>> path = gradient_flow(lambda p: {"w": -p["w"]}, {"w": torch.ones(1, dtype=torch.float64)}, [0.0, 1.0])
    >>> round(path[-1]["w"].item(), 6)  # exp(−1)
    0.367879
    """
    from scipy.integrate import solve_ivp

    names = list(params)
    sizes = [params[n].numel() for n in names]

    def unflatten(vector) -> dict[str, Tensor]:
        pieces = torch.as_tensor(vector, dtype=torch.float64).split(sizes)
        return {n: piece.reshape(params[n].shape).to(params[n]) for n, piece in zip(names, pieces, strict=True)}

    def flatten(values: dict[str, Tensor]):
        return torch.cat([values[n].detach().reshape(-1).double().cpu() for n in names]).numpy()

    solution = solve_ivp(
        lambda _, vector: flatten(velocity(unflatten(vector))),
        (times[0], times[-1]),
        flatten(params),
        method=method,
        t_eval=times,
        rtol=rtol,
        atol=atol,
    )
    if not solution.success:
        raise NumericalError(f"the flow could not be integrated ({solution.message})", where="gradient flow")
    return [unflatten(column) for column in solution.y.T]
