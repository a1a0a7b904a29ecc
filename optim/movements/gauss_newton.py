"""The inner solver that sees the model: Gauss–Newton in function space, damped in the parameters by a mass.

With J the Jacobian of all parameters together, ρ = ∇F, B = ∇²F in function space and w = 1/N of the inner product, the step
minimises the model w(⟨ρ, JΔ⟩ + ½⟨JΔ, B JΔ⟩) + (ε/2)ΔᵀDΔ:

    (w JᵀBJ + εD)Δ = −w Jᵀρ,   Δ = −D⁻¹Jᵀ(K + (ε/w)B⁻¹)⁻¹B⁻¹ρ,   K = J D⁻¹Jᵀ,

kernel ridge regression of the Newton step −B⁻¹ρ of function space: an [NC, NC] system, no m × m matrix. It is the joint system
(``blocks="network"``) of the layer metric with M = B and c = w/ε: blocks of layers overshoot by up to their number.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import call_model
from nt_kernel.capture.plan import trainable_layers
from nt_kernel.capture.probe import split_state
from nt_kernel.errors import NumericalError, unknown_name
from nt_kernel.factors import Factor, join_factors, layer_factors
from nt_kernel.mass import Mass, Masses, resolve_mass
from nt_kernel.metric.cg_system import ConjugateGradientSystem, auto_budget, tolerance_of
from nt_kernel.metric.cost_model import worth_a_try
from nt_kernel.metric.layer_metric import push_through
from nt_kernel.metric.output_metric import resolve_output_metric
from nt_kernel.metric.triangular import solve_factored
from optim.movements.inner import InnerProblem, copy_into, network_outputs
from optim.movements.space import Curvature, definite
from optim.options.damping import Damping, LevenbergMarquardt, damping_at
from optim.options.trust_region import trust_region

IDENTITY = resolve_output_metric("identity")
SOLVERS = ("auto", "cholesky", "cg")


@dataclass(frozen=True)
class GaussNewton:
    """``damping`` ε: Levenberg–Marquardt by default (a move is taken where F falls), a number, or a function of the number of
    iterations. ``lr``: the share of a step that is taken, < 1 follows the metric flow (with a number for ε). ``mass``: D.
    ``solver``: "cholesky" of [NC, NC]; "cg" (preconditioned conjugate gradients, K never formed), for energies whose
    curvature is a number; "auto", there the cheaper one (``nt_kernel.metric.cost_model``), else Cholesky.

    Raises ValueError/TypeError for values out of range, lr ≠ 1 with Levenberg–Marquardt.

    >>> GaussNewton(damping=1e-6, lr=0.5).lr
    0.5
    """

    damping: Damping = field(default_factory=lambda: LevenbergMarquardt(start=1e-3))
    mass: Mass = 1.0
    lr: float = 1.0
    solver: str = "auto"

    def __post_init__(self):
        damping_at(self.damping, 0)
        if self.solver not in SOLVERS:
            raise ValueError(unknown_name("solver of GaussNewton", self.solver, SOLVERS))
        if isinstance(self.lr, bool) or not isinstance(self.lr, int | float) or not 0 < self.lr < inf:
            raise ValueError(f"lr of GaussNewton must be positive and finite, got {self.lr!r}")
        if self.lr != 1 and isinstance(self.damping, LevenbergMarquardt):
            raise ValueError(
                f"lr={self.lr:g} with damping=LevenbergMarquardt(…): the trust region sets the length; write damping=1e-3"
            )

    def session(self, model: nn.Module) -> "GaussNewtonSession":
        """The solver at work on ``model``. Raises ValueError for parameters in half precision, which have no Cholesky."""
        for name, p in model.named_parameters():
            if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"parameter {name!r} is {p.dtype}; Gauss–Newton solves its system in the type of the parameters, which "
                    "has to be torch.float32 or torch.float64; write model.float()"
                )
        layers = {layer: tuple(f) for layer, f in trainable_layers(model).items()}
        resolve_mass(self.mass, layers, {n: p.shape for n, p in model.named_parameters() if p.requires_grad})
        return GaussNewtonSession(self)


@dataclass
class GaussNewtonSession:
    """What Gauss–Newton keeps between outer steps: its damping, Nielsen's ν, and Cholesky once it had to take over."""

    settings: GaussNewton
    damping: float = field(init=False)
    solver: str = field(init=False)
    growth: float = 2.0
    steps: int = 0

    def __post_init__(self):
        self.damping, self.solver = damping_at(self.settings.damping, 0), self.settings.solver

    @torch.no_grad()
    def iterate(self, problem: InnerProblem) -> Iterator[Tensor]:
        while True:
            reached = self._one(problem)
            if reached is None:
                return
            self.steps += 1
            yield reached

    def _one(self, problem: InnerProblem) -> Tensor | None:
        """One iteration; the outputs it led to, None where no move lowers F."""
        view = View.of(problem, self.settings.mass, self.solver)
        found = self._moved(problem, view)
        if self.solver == "auto" and view.gave_up:
            self.solver = "cholesky"
        return found

    def _moved(self, problem: InnerProblem, view: "View") -> Tensor | None:
        trust, model = self.settings.damping, problem.model
        if not isinstance(trust, LevenbergMarquardt):
            epsilon = damping_at(trust, self.steps)
            try:
                move, _ = view.step(epsilon)
            except NumericalError as error:
                problem.reason = (
                    f"no step at damping {epsilon:g}: {error}; a larger one, or LevenbergMarquardt(), may have one"
                )
                return None
            copy_into(problem.params, {n: p + self.settings.lr * move[n] for n, p in problem.params.items()})
            return problem.outputs()
        _, fixed = split_state(model)
        seen: list[Tensor] = []

        def propose(damping: float, first: bool) -> tuple:
            try:
                move, predicted = view.step(damping)
            except NumericalError:  # not positive definite in this precision: more damping
                return None, None, -inf, 0.0
            values = {n: p + move[n] for n, p in problem.params.items()}
            return values, values, predicted, 0.0

        def evaluate(values: dict[str, Tensor] | None) -> Tensor | float:
            if values is None:
                return inf
            problem.evaluations += 1
            u = network_outputs(_At(model, fixed, values), problem.x, problem.output)
            seen[:] = [u]
            return problem.objective(u).to(view.dtype)

        now = problem.objective(view.u).to(view.dtype)
        values, self.damping, self.growth, trials = trust_region(
            trust, self.damping, self.growth, propose, evaluate, now
        )
        if values is None:
            problem.reason = f"no move of {len(trials)} lowered the objective"
            self.damping, self.growth = damping_at(trust, 0), 2.0
            return None
        copy_into(problem.params, values)
        return seen[0]


class _At:
    """The model at given values, as a function of its inputs."""

    def __init__(self, model: nn.Module, fixed: dict, values: dict):
        self.model, self.state = model, {**fixed, **values}

    def __call__(self, *x):
        return call_model(self.model, self.state, x)


@dataclass
class View:
    """The network and F to first and second order at the present θ."""

    factor: Factor
    masses: Masses
    u: Tensor
    slope: Tensor  # ρ, in the model's dtype
    curvature: Curvature
    dtype: torch.dtype
    solver: str  # "cholesky", or "cg" with a budget (in its own steps) after which Cholesky takes over
    budget: float | None = None
    gave_up: bool = False
    gram: Tensor | None = None

    @staticmethod
    def of(problem: InnerProblem, mass: Mass, solver: str) -> "View":
        """One Jacobian pass at the model's parameters."""
        problem.gradients += 1
        y, factors = layer_factors(problem.model, problem.x, output=problem.output)
        joint, u = join_factors(factors), y.double()
        shapes = {n: p.shape for n, p in problem.params.items()}
        masses = resolve_mass(mass, {layer: tuple(f.shapes) for layer, f in factors.items()}, shapes)
        curvature = problem.curvature(u)
        curvature = Curvature(curvature.kind, curvature.hessian.to(y.dtype), curvature.shift)
        if solver == "cg" and curvature.kind != "number":
            raise ValueError(
                f'solver="cg" needs an energy of constant curvature (SquaredEnergy), this one is of kind {curvature.kind!r}; '
                'write solver="cholesky"'
            )
        budget = None
        if solver == "auto":
            budget = auto_budget(joint, len(u), masses, IDENTITY, y) if curvature.kind == "number" else 0.0
            solver = "cg" if worth_a_try(budget, tolerance_of(y.dtype)) else "cholesky"
        return View(joint, masses, u, problem.slope(u).to(y.dtype), curvature, y.dtype, solver, budget)

    def step(self, epsilon: float) -> tuple[dict[str, Tensor], float]:
        """(Δ by parameter name, the decrease of F that the model foretells, ½⟨z, ρ + (ε/w)v⟩ with v the dual and z = K v)."""
        N, C = self.slope.shape
        ratio = epsilon * N  # ε/w
        if self.solver != "cholesky":
            v = self._by_conjugate_gradients(ratio)
        else:
            if self.gram is None:
                self.gram = self.factor.gram(mass=self.masses).reshape(N * C, N * C)
            system = self.curvature.add_to(self.gram, ratio, C)
            target = self.curvature.solve(self.slope).reshape(-1, 1)
            v = solve_factored(definite(system, "K + (ε/w)B⁻¹"), target).reshape(N, C)
        move = push_through(self.factor, -v, self.masses)
        z = -self.factor.jvp(move) if self.gram is None else (self.gram @ v.reshape(-1)).reshape(N, C)
        foretold = (z.double() * (self.slope.double() + ratio * v.double())).sum().item() / (2 * N)
        return move, foretold

    def _by_conjugate_gradients(self, ratio: float) -> Tensor:
        """v = (ratio·I + bK)⁻¹ρ = (I + (b/ratio)K)⁻¹ρ/ratio."""
        b = self.curvature.matrix().item()
        y, where = self.u.to(self.dtype), "minimizing movement: "
        system = ConjugateGradientSystem(
            self.factor, len(y), self.masses, b / ratio, IDENTITY, y, where, budget=self.budget
        )
        v = system.dual(self.slope) / ratio
        if system.last.solver == "cholesky":  # CG made way: the next damping will hardly be kinder to it
            self.solver, self.gave_up = "cholesky", True
        return v
