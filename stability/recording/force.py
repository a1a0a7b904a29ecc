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
from nt_kernel.mass import RowColumnMass
from stability.recording.batches import Rows
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
    if curvature is None:
        K = K * loss.sigma
    else:
        own = curvature if rows is None else curvature[rows.to(y.device)]
        K = torch.einsum("dbc,bce->dbe", K.unflatten(1, (-1, C)), own).flatten(1)
    if rows is not None:
        rows = rows.to(K.device)
        whole = K.new_zeros(len(K), len(y), C)
        K = whole.index_add_(1, rows, K.unflatten(1, (-1, C))).flatten(1)
    return rule.sign * K + _coupled(reader, rule, masses, rows, options)


def decay_matrix(reader: Reader, rule: StepRule, masses: Mapping) -> Tensor | float:
    """Ω as e sees it: a number where it is the same for all parameters, else J Ω D⁻¹Jᵀ(J D⁻¹Jᵀ)⁺, [D, D]."""
    if not isinstance(rule.decay, Mapping):
        return rule.decay
    masses = all_masses(reader.model, masses)
    return _lifted(reader, masses, {n: _over(m, rule.decay.get(n, 0.0)) for n, m in masses.items()})


def _coupled(reader: Reader, rule: StepRule, masses: Mapping, rows: Rows, options: dict) -> Tensor | float:
    """J_S P W δθ as a matrix on e, or a multiple of the identity."""
    pull = rule.pull
    if not isinstance(pull, Mapping):
        if pull == 0:
            return 0.0
        pull = dict.fromkeys(masses, pull)
    if options["scale"] == "none":
        shares = {n: pull.get(n, 0.0) / m if isinstance(m, float | int) else None for n, m in masses.items()}
        found = set(shares.values())
        if len(found) == 1 and None not in found:
            return found.pop() * torch.eye(_size(reader), dtype=torch.float64, device=_device(reader))
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


def _size(reader: Reader) -> int:
    return reader.outputs({}).numel()


def _device(reader: Reader):
    return next(reader.model.parameters()).device
