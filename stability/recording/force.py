"""B_t: how the divergence e of two runs pushes on itself through one step, as a matrix over (sample, output) pairs.

    B e = (1/b) J_S P J_Bᵀ ∇²ℓ_B E_Bᵀ e + J_S P W δθ,

B the samples of the step, E_Bᵀ e the rows of e at them. For full batches and P = G⁻¹ the first term is H∇²ℓ. The second is
coupled weight decay: W P where that is one number; otherwise δθ is lifted from e, δθ ≈ D⁻¹J_Sᵀ(J_S D⁻¹J_Sᵀ)⁺e.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import as_inputs, run_model
from nt_kernel.kernels.ntk import generalized_ntk
from nt_kernel.kernels.operators import KernelOperator, generalized_ntk_operator
from nt_kernel.mass import RowColumnMass
from stability.recording.batches import Rows
from stability.recording.linear import plus
from stability.recording.loss import OutputLoss
from stability.recording.step_rule import HEAVIEST, StepRule

CUT = 1e-10  # eigenvalues of J D⁻¹Jᵀ below this share of the largest count as zero in the lift


@dataclass(frozen=True)
class Reader:
    """A copy of the model in float64 to look at any parameters with, and the inputs of S."""

    model: nn.Module
    x: "Tensor | tuple"
    output: Callable | None = None

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put parameters and buffers into the copy."""
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def outputs(self, state: Mapping[str, Tensor], x=None) -> Tensor:
        """y [N, C] in float64."""
        self.load(state)
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with torch.no_grad():
            return run_model(self.model, own, self.x if x is None else x, self.output)


def take_rows(x, rows: Rows):
    """The inputs of a batch."""
    if rows is None:
        return x
    picked = tuple(t[rows.to(t.device)] if isinstance(t, Tensor) else t for t in as_inputs(x))
    return picked if isinstance(x, tuple) else picked[0]


@dataclass(frozen=True)
class ForceOperator:
    """ω + rate·B_t by products alone: a pull through J_Bᵀ, an inner solve and a push through J_S for every column."""

    kernel: KernelOperator
    curvature: Tensor | float  # ∇²ℓ on the batch, [b, C, C] or σ
    rows: Rows
    samples: int
    rate: float = 1.0
    omega: float = 0.0

    def __matmul__(self, X: Tensor) -> Tensor:
        """(ω + rate·B_t)X, X [D] or [D, R]."""
        columns = X if X.dim() == 2 else X[:, None]
        e = columns.unflatten(0, (self.samples, -1))
        e = e if self.rows is None else e[self.rows.to(e.device)]
        e = self.curvature @ e if isinstance(self.curvature, Tensor) else self.curvature * e
        found = self.rate * (self.kernel @ e.flatten(0, 1)) + self.omega * columns
        return found if X.dim() == 2 else found[:, 0]


def force_operator(
    reader: Reader, loss: OutputLoss, rule: StepRule, masses: Mapping, rows: Rows
) -> ForceOperator | None:
    """B_t without its matrix, at the parameters in ``reader``. Weight decay that would have to be lifted is left out."""
    if rule.still or not rule.known or rule.force_rate == 0:
        return None
    masses, metric = all_masses(reader.model, masses), rule.metric
    if metric.shares:
        raise ValueError("groups with different lr need the layers of H as matrices: write dense=True")
    batch = take_rows(reader.x, rows)
    points = {} if rows is None else {"x1": reader.x, "x2": batch}
    kernel = generalized_ntk_operator(
        reader.model, batch, mass=masses, output=reader.output, solver="auto", output_metric=metric.output_metric,
        scale=metric.scale, blocks=metric.blocks, **points,
    )  # fmt: skip
    y = reader.outputs({})
    curvature = loss.curvature(y)
    if isinstance(curvature, Tensor) and rows is not None:
        curvature = curvature[rows.to(y.device)]
    coupled = uniform_pull(rule, masses) or 0.0
    return ForceOperator(kernel, curvature, rows, len(y), rule.sign, coupled)


def uniform_pull(rule: StepRule, masses: Mapping) -> float | None:
    """W P where it is one number for all parameters (c = 0, one w/μ), None where it is not."""
    if not isinstance(rule.pull, Mapping) and rule.pull == 0:
        return 0.0
    if rule.metric.scale != "none" or not all(isinstance(m, float | int) for m in masses.values()):
        return None
    pull = rule.pull if isinstance(rule.pull, Mapping) else dict.fromkeys(masses, rule.pull)
    found = {pull.get(n, 0.0) / m for n, m in masses.items()}
    return found.pop() if len(found) == 1 else None


def force_matrix(reader: Reader, loss: OutputLoss, rule: StepRule, masses: Mapping, rows: Rows) -> Tensor | None:
    """B_t [D, D] at the parameters in ``reader``; None where there is no force."""
    if rule.still or not rule.known or rule.force_rate == 0:
        return None
    masses = all_masses(reader.model, masses)
    metric = rule.metric
    options = {"output_metric": metric.output_metric, "scale": metric.scale, "blocks": metric.blocks}
    batch = take_rows(reader.x, rows)
    points = {} if rows is None else {"x1": reader.x, "x2": batch}
    ntk = generalized_ntk(reader.model, batch, mass=masses, output=reader.output, **points, **options)
    K = _weighted(ntk, metric.shares)
    y = reader.outputs({}, None)
    C = y.shape[1]
    curvature = loss.curvature(y)
    if not isinstance(curvature, Tensor):
        K = K * curvature
    else:
        own = curvature if rows is None else curvature[rows.to(y.device)]
        K = torch.einsum("dbc,bce->dbe", K.unflatten(1, (-1, C)), own).flatten(1)
    if rows is not None:
        rows = rows.to(K.device)
        whole = K.new_zeros(len(K), len(y), C)
        K = whole.index_add_(1, rows, K.unflatten(1, (-1, C))).flatten(1)
    coupled = _coupled(reader, rule, masses, rows, options)
    return plus(coupled, rule.sign * K)


def decay_matrix(reader: Reader, rule: StepRule, masses: Mapping) -> Tensor | float:
    """Ω as e sees it: a number where it is the same for all parameters, else J Ω D⁻¹Jᵀ(J D⁻¹Jᵀ)⁺, [D, D]."""
    if not isinstance(rule.decay, Mapping):
        return rule.decay
    masses = all_masses(reader.model, masses)
    return _lifted(reader, masses, {n: _over(m, rule.decay.get(n, 0.0)) for n, m in masses.items()})


def _coupled(reader: Reader, rule: StepRule, masses: Mapping, rows: Rows, options: dict) -> Tensor | float:
    """J_S P W δθ as a matrix on e, or a multiple of the identity."""
    whole = uniform_pull(rule, masses)
    if whole is not None:
        return whole
    pull = rule.pull if isinstance(rule.pull, Mapping) else dict.fromkeys(masses, rule.pull)
    if options["scale"] == "none":
        return _lifted(reader, masses, {n: _over(_squared(m), pull.get(n, 0.0)) for n, m in masses.items()})
    numbers = {m for m in masses.values() if isinstance(m, float | int)}
    if (
        len(numbers) != 1
        or len(set(pull.values())) != 1
        or any(not isinstance(m, float | int) for m in masses.values())
    ):
        return 0.0  # J G⁻¹ W δθ has no short form there: it is left to w_t
    (mu,), (weight,) = numbers, set(pull.values())
    batch = take_rows(reader.x, rows)
    points = {} if rows is None else {"x1": reader.x, "x2": reader.x}
    ntk = generalized_ntk(reader.model, batch, mass=masses, output=reader.output, **points, **options)
    pulled = _weighted(ntk, rule.metric.shares) * (len(as_inputs(batch)[0]) * weight / mu)
    return pulled @ _inverse(_gram(reader, masses))


def _lifted(reader: Reader, masses: Mapping, weights: Mapping) -> Tensor:
    """J V⁻¹Jᵀ(J D⁻¹Jᵀ)⁺ with the masses V = ``weights``."""
    return _gram(reader, weights) @ _inverse(_gram(reader, masses))


def _gram(reader: Reader, masses: Mapping) -> Tensor:
    ntk = generalized_ntk(reader.model, reader.x, mass=dict(masses), scale="none", output=reader.output)
    return ntk.matrix


def _inverse(gram: Tensor) -> Tensor:
    return torch.linalg.pinv((gram + gram.mT) / 2, hermitian=True, rtol=CUT)


def _weighted(ntk, shares: Mapping[str, float]) -> Tensor:
    if not shares:
        return ntk.matrix
    return sum(shares.get(name, 1.0) * layer for name, layer in ntk.layers.items())


def all_masses(model: nn.Module, masses: Mapping) -> dict:
    """The masses of the trainable parameters; one that the step did not move is very heavy."""
    return {n: masses.get(n, HEAVIEST) for n, p in model.named_parameters() if p.requires_grad}


def _over(mass, share: float):
    """mass/share, heavy where the share is 0."""
    if share == 0:
        return HEAVIEST
    if isinstance(mass, RowColumnMass):
        return RowColumnMass(mass.row / share, mass.column)
    return mass / share


def _squared(mass):
    if isinstance(mass, RowColumnMass):
        return RowColumnMass(mass.row.square(), mass.column.square())
    return (mass**2).clamp_max(HEAVIEST) if isinstance(mass, Tensor) else min(mass**2, HEAVIEST)
