"""Negative controls: for every assumption a model, data or optimizer that violates it and is caught, and one just inside.

``run_controls`` measures all of them; ``examples/mutation_table.py`` writes the table of docs/assumptions.md. Small and
deterministic: together they take a few seconds.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stability.assumptions.check import check_assumptions
from stability.assumptions.report import AssumptionReport
from stability.assumptions.verdict import Assumption
from stability.replacement import Replacement

F64 = torch.float64


@dataclass(frozen=True)
class Control:
    """One assumption put to the test: ``violating`` must be caught, ``inside`` must pass; ``knob`` is all that differs."""

    key: str
    knob: str
    violating: object
    inside: object
    build: Callable[[object], tuple[tuple, dict]]  # knob's value → arguments and options of ``measure``
    measure: Callable[..., AssumptionReport] = check_assumptions

    def verdict(self, value) -> Assumption:
        """The verdict on ``key`` with the knob at ``value``."""
        arguments, options = self.build(value)
        return self.measure(*arguments, **options)[self.key]


def run_controls(controls: Iterable["Control"] | None = None) -> Iterator[tuple[Control, Assumption, Assumption]]:
    """Every control (``CONTROLS`` where none are given) with its verdicts, violating first."""
    for control in CONTROLS if controls is None else controls:
        yield control, control.verdict(control.violating), control.verdict(control.inside)


class Bend(nn.Module):
    """z ↦ tanh(εz)/ε: the identity for small ε, C¹ for every one."""

    def __init__(self, bend: float):
        super().__init__()
        self.bend = bend

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.bend * z) / self.bend


def linear(n: int, dtype=F64) -> nn.Linear:
    """y = wᵀx from w = 0, on n inputs."""
    model = nn.Linear(n, 1, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return model


def network(activation: nn.Module, width: int = 6) -> nn.Sequential:
    """3 - width - 1, drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), activation, nn.Linear(width, 1)).to(F64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=F64) / parameter.shape[-1] ** 0.5)
    return model


def samples(n: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, size, generator=draw, dtype=F64) for size in (3, 1))


def axes(n: int, dtype=F64) -> tuple[Tensor, Tensor, list[Replacement]]:
    """Unit inputs with target 1; the twin has (2e_0, −1) in the place of sample 0."""
    x = torch.eye(n, dtype=dtype)
    return x, torch.ones(n, 1, dtype=dtype), [Replacement(0, 2 * x[0], -torch.ones(1, dtype=dtype))]


def _close_inputs(distance: float, dtype=F64, **options):
    """A linear model, two inputs that far apart: λ_min(JJᵀ) is about half the distance squared."""
    x, targets, twins = axes(3, dtype)
    x[2] = x[1]
    x[2, 2] = distance
    steps = {"lr": 0.1, "scale": "none"}
    return (linear(3, dtype), (x, targets), steps), {"replacements": twins, "steps": 10, **options}


def _deep_linear(target: float):
    """y = w₁w₂x from w = ½: κ grows from √½ to √(2·target)."""
    model = nn.Sequential(linear(1), linear(1))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.5)
    x, a = torch.ones(1, 1, dtype=F64), torch.full((1, 1), target, dtype=F64)
    twins = [Replacement(0, x[0], a[0] / 2)]
    return (model, (x, a), {"lr": 0.1, "scale": "none"}), {"replacements": twins, "steps": 50}


def _pulled_away(stretch: float):
    """The twin fits x_k/stretch to the opposite target: its residual at the x_k it lost goes to 1 + stretch times |a_k|."""
    x, a, _ = axes(2)
    twins = [Replacement(0, x[0] / stretch, -a[0])]
    return (linear(2), (x, a), {"lr": 1.9, "scale": "none"}), {"replacements": twins, "steps": 60}


def _metric(weight: float):
    """M = diag(1, weight)."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(F64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.3)
        model[0].weight[:, 0] = torch.linspace(-1, 1, 6, dtype=F64)
    x, a = samples()
    output_metric = lambda y: torch.diag(y.new_tensor([1.0, weight])).expand(len(y), 2, 2)  # noqa: E731
    steps = {"lr": 0.1, "output_metric": output_metric}
    return (model, (x, a.expand(-1, 2)), steps), {"steps": 3}


def _bent(bend: float):
    """y = tanh(εwᵀx)/ε: linear in w but for ε²."""
    x, a, twins = axes(3)
    return (nn.Sequential(linear(3), Bend(bend)), (x, a), {"lr": 0.1, "scale": "none"}), {
        "replacements": twins,
        "steps": 10,
    }


def _mass(mass: float):
    return (network(nn.Tanh()), samples(), {"lr": 0.1 * mass, "mass": mass}), {"steps": 3}


def _step(lr: float):
    """H = I/3: 2/λ_max = 6 (S), 2/λ_max = 1.5 for the twin with 2e_0."""
    x, a, twins = axes(3)
    return (linear(3), (x, a), {"lr": lr, "scale": "none"}), {"replacements": twins, "steps": 3}


def _flow(lr: float):
    """ẏ = −y/3: an Euler step leaves out up to lr/(6e) of the way."""
    x, a, twins = axes(3)
    return (linear(3), (x, a), {"lr": lr, "scale": "none"}), {"replacements": twins, "steps": 40}


def _quartic(share: float):
    """ℓ = ½r² + share·r⁴."""
    x, a, twins = axes(3)
    loss = lambda y, b: (0.5 * (y - b).square() + share * (y - b) ** 4).sum()  # noqa: E731
    return (linear(3), (x, a), {"lr": 0.1, "scale": "none"}), {"replacements": twins, "steps": 2, "loss": loss}


def _activation(kind: str):
    activation = {"ReLU": nn.ReLU(), "Softplus(beta=50)": nn.Softplus(beta=50)}[kind]
    return (network(activation), samples(), {"lr": 0.05}), {"steps": 3}


def _dropout(share: float):
    return (nn.Sequential(nn.Dropout(share), network(nn.Tanh())).train(), samples(), {"lr": 0.1}), {"steps": 5}


def _replaced_by(distance: float):
    x, a = samples()
    return (network(nn.Tanh()), (x, a), {"lr": 0.1}), {
        "steps": 5,
        "replacements": [Replacement(0, x[0], a[0] + distance)],
    }


CONTROLS: tuple[Control, ...] = (
    Control("positive_rate", "two inputs apart, least ξ 1e-4", 0.02, 0.03,
            lambda d: _close_inputs(d, limits={"positive_rate": 1e-4})),
    Control("full_row_rank", "two inputs apart", 0.0, 1e-6, _close_inputs),
    Control("bounded_jacobian", "target of y = w₁w₂x, w = ½ at first", 4.4, 3.6, _deep_linear),
    Control("bounded_gradients", "x' = x_k/q", 3.3, 2.8, _pulled_away),
    Control("metric_floor", "M = diag(1, q)", -0.01, 0.0, _metric),
    Control("no_kernel_drift", "y = tanh(εwᵀx)/ε, ε", 5e-3, 3e-3, _bent),
    Control("one_metric", "mass", 6e5, 8e5, _mass),
    Control("step_limit", "lr", 1.55, 1.45, _step),
    Control("gradient_flow", "lr", 0.16, 0.12, _flow),
    Control("squared_loss", "share of r⁴", 1e-7, 1e-9, _quartic),
    Control("smooth_activations", "activation", "ReLU", "Softplus(beta=50)", _activation),
    Control("determinism", "dropout in train mode", 0.5, 0.0, _dropout),
    Control("resolved_by_floats", "a' − a_k", 1e-13, 1e-11, _replaced_by),
    Control("float_sufficiency", "two inputs apart, in float32", 0.007, 0.01, lambda d: _close_inputs(d, torch.float32)),
)  # fmt: skip
"""One control for each assumption of the catalogue, in its order."""
