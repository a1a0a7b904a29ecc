"""What the stability theories in parameter space ask for, measured along a run: L_θ, smoothness, curvature, steps.

Steps θ ← θ − lr·D⁻¹∇F with a constant diagonal D are plain gradient descent in the coordinates φ = D^½θ. All
constants are those of φ: gradients D^(−½)∇_θ, Hessians D^(−½)∇²F D^(−½), distances ‖D^½(θ − θ')‖ ≥ √μ‖θ − θ'‖. The
objective is F = h + ½w‖θ‖², w the weight decay; the common term w takes no part in the difference of two twins'
gradients, so L_θ is that of the losses.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, jvp

from nt_kernel.capture.observe import run_model
from nt_kernel.capture.probe import split_state
from nt_kernel.factors import layer_factors
from nt_kernel.mass import Mass
from nt_kernel.metric.layer_metric import model_mass
from nt_kernel.metric.model_metric import mass_entries
from nt_kernel.spectra.extremal import extremal_eigenvalues
from stability.assumptions import Assumption, smooth_activations
from stability.losses import Loss, PerSample, resolve_loss

SAMPLINGS = ("full batch", "one sample")
# Second difference of the outputs, relative to them, up to which a model counts as affine in θ.
AFFINE = 1e-9
# Parameters up to which the Hessian's extreme eigenvalues come from the whole matrix.
DENSE = 512


@dataclass(frozen=True)
class ParameterConstants:
    """Measured along the recorded runs, in the coordinates φ = D^½θ; suprema and infima over what was looked at."""

    n: int
    lrs: tuple[float, ...]  # step sizes in order
    lipschitz: float  # L_θ = sup‖D^(−½)∇_θ ℓ_j‖ over S and the others, all checkpoints of all runs
    smoothness: float  # β = sup λ_max of the Hessian of F ("full batch") or of a sample's ("one sample")
    curvature: float  # γ = inf λ_min of the same
    everywhere: bool  # that Hessian does not depend on θ (squared loss, model affine in θ)
    both_runs: bool  # twins' checkpoints were among those looked at
    sampling: str = "full batch"
    smooth: Assumption | None = None  # verdict on the activations
    constant_metric: bool = True  # scale "none"

    @property
    def steepest(self) -> float:
        """‖∇²‖₂ = max(β, −γ)."""
        return max(self.smoothness, -self.curvature)


class RiskHessian:
    """D^(−½)(∇²h + w I)D^(−½) of the mean loss on (x, a) at θ, as a symmetric operator on flat vectors [m] or blocks [m, k].

    One product is one forward-over-reverse pass; nothing of size m × m is formed.

    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)  # h'' = (1 + 9)/2
    >>> hessian = RiskHessian(model, x, torch.zeros(2, 1, dtype=torch.float64), weight_decay=0.5, mass=2.0)
    >>> (hessian @ torch.ones(1, dtype=torch.float64)).item(), hessian.extremes()
    (2.75, (2.75, 2.75))
    """

    dtype = torch.float64

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        targets: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        weight_decay: float = 0.0,
        mass: Mass = 1.0,
        loss: "str | Loss | PerSample" = "squared",
    ):
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be finite and >= 0, got {weight_decay!r}")
        own, fixed = split_state(model)
        state = {n: t.double() if t.is_floating_point() else t for n, t in fixed.items()}
        self.params = {n: (own if params is None else params)[n].detach().double() for n in own}
        x, targets, of_sample = x.double(), targets.double(), resolve_loss(loss).value

        def risk(values):
            return of_sample(run_model(model, {**state, **values}, x), targets).mean()

        self._gradient = grad(risk)
        self.device = x.device
        self.roots = mass_roots(model, x[:1], mass, self.params)
        self._decay = weight_decay / self.roots.square()
        self.shape = (len(self.roots), len(self.roots))

    def __matmul__(self, v: Tensor) -> Tensor:
        return self._product(v) if v.dim() == 1 else torch.func.vmap(self._product, in_dims=1, out_dims=1)(v)

    def _product(self, v: Tensor) -> Tensor:
        pieces = (v / self.roots).split([p.numel() for p in self.params.values()])
        tangent = {n: piece.view_as(p) for (n, p), piece in zip(self.params.items(), pieces, strict=True)}
        _, moved = jvp(self._gradient, (self.params,), (tangent,))
        return torch.cat([t.flatten() for t in moved.values()]) / self.roots + self._decay * v

    def extremes(self, tolerance: float = 1e-6) -> tuple[float, float]:
        """(λ_min, λ_max): exact to rounding up to m = 512, by Lanczos beyond: then the λ_min found is not below, the λ_max
        found not above the true one."""
        m = len(self.roots)
        if m <= DENSE:
            columns = torch.eye(m, dtype=self.dtype, device=self.device).split(64, 1)
            A = torch.cat([self @ block for block in columns], 1)
            eigenvalues = torch.linalg.eigvalsh((A + A.mT) / 2)
            return eigenvalues[0].item(), eigenvalues[-1].item()
        smallest = extremal_eigenvalues(self, which="smallest", tolerance=tolerance).values[0]
        return smallest.item(), extremal_eigenvalues(self, which="largest", tolerance=tolerance).values[-1].item()


def parameter_constants(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    others: Tensor,
    other_targets: Tensor,
    checkpoints: Iterable[tuple[Mapping[str, Tensor], float]],
    *,
    twins: Sequence[Iterable[tuple[Mapping[str, Tensor], float]]] = (),
    weight_decay: float = 0.0,
    mass: Mass = 1.0,
    scale: str = "none",
    loss: "str | Loss | PerSample" = "squared",
    sampling: str = "full batch",
    curvature_every: int = 1,
) -> ParameterConstants:
    """L_θ, β, γ along a run on S, and along its twins where they are given.

    Parameters
    ----------
    checkpoints: (params, lr) of the run on S, every step of it; ``twins``: the same of the runs on S^(k→z').
    others, other_targets: the z'. mass, weight_decay: D and w of the steps θ ← θ − lr·D⁻¹(∇h + wθ).
    scale: that of the optimizer; anything but "none" is recorded as a metric that is not constant.
    sampling: "full batch" takes the Hessian of the risk on S; "one sample" those of the samples of S and others one by one.
    curvature_every: look at the Hessian at every so many checkpoints, and at the first and last.

    Cost: per checkpoint one pass for L_θ; where the Hessian is looked at, two Lanczos runs (per sample, for "one sample").
    What is measured on points of a path is a lower estimate of L_θ and β and an upper one of γ on any region around it.

    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> x, a = torch.tensor([[1.0], [2.0]]).double(), torch.zeros(2, 1).double()
    >>> run = [({"weight": torch.tensor([[w]]).double()}, 0.1) for w in (1.0, 0.75)]  # h = (1 + 4)w²/4
    >>> found = parameter_constants(model, x, a, x[:1], a[:1], run)
    >>> found.lipschitz, found.smoothness, found.everywhere  # sup |wx²|, the mean of x²
    (4.0, 2.5, True)
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(map(repr, SAMPLINGS))}, got {sampling!r}")
    if isinstance(curvature_every, bool) or not isinstance(curvature_every, int) or curvature_every < 1:
        raise ValueError(f"curvature_every must be an int >= 1, got {curvature_every!r}")
    runs = [list(checkpoints), *map(list, twins)]
    if not all(runs):
        raise ValueError("checkpoints is empty: the constants are measured along recorded runs")
    points, aims = torch.cat([x, others]), torch.cat([targets, other_targets])
    everywhere = resolve_loss(loss).quadratic and is_affine(model, points)
    batches = [(x, targets)] if sampling == "full batch" else list(zip(points.split(1), aims.split(1), strict=True))
    lipschitz, low, high = 0.0, float("inf"), -float("inf")
    for run in runs:
        for t, (params, _) in enumerate(run):
            lipschitz = max(
                lipschitz, gradient_norms(model, points, aims, params=params, mass=mass, loss=loss).max().item()
            )
            if (t % curvature_every and t != len(run) - 1) or (everywhere and high >= 0):
                continue
            for inputs, wanted in batches:
                hessian = RiskHessian(
                    model, inputs, wanted, params=params, weight_decay=weight_decay, mass=mass, loss=loss
                )
                found = hessian.extremes()
                low, high = min(low, found[0]), max(high, found[1])
    return ParameterConstants(
        n=len(x), lrs=tuple(lr for _, lr in runs[0]), lipschitz=lipschitz, smoothness=high, curvature=low,
        everywhere=everywhere, both_runs=len(runs) > 1, sampling=sampling, smooth=smooth_activations(model),
        constant_metric=scale == "none",
    )  # fmt: skip


def gradient_norms(
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    params=None,
    mass: Mass = 1.0,
    loss: "str | Loss | PerSample" = "squared",
) -> Tensor:
    """‖D^(−½)∇_θ ℓ_j‖ of every sample, [N] float64: (r_jᵀ J_jD⁻¹J_jᵀ r_j)^½, summed over the layers, no gradient formed."""
    y, factors = layer_factors(model, x, params=params)
    r = resolve_loss(loss).gradient(y.double(), targets.double())
    masses = model_mass(factors, mass)
    blocks = sum(f.to(torch.float64).block_gram(masses) for f in factors.values())
    return torch.einsum("nc,ncd,nd->n", r, blocks, r).clamp_min(0).sqrt()


def is_affine(model: nn.Module, x: Tensor, *, seed: int = 0) -> bool:
    """True where the outputs are affine in θ: their second differences vanish along random directions, short and long.

    With probability one right for outputs that are analytic in θ.

    >>> x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    >>> is_affine(nn.Linear(2, 1), x), is_affine(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), x)
    (True, False)
    """
    params, fixed = split_state(model)
    params, fixed = (
        {n: t.double() if t.is_floating_point() else t for n, t in part.items()} for part in (params, fixed)
    )
    draw = torch.Generator().manual_seed(seed)
    outputs = lambda values: run_model(model, {**fixed, **values}, x.double())  # noqa: E731
    for size in (1.0, 10.0):
        u = {
            n: size * torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.device) for n, p in params.items()
        }
        ahead, here, behind = (outputs({n: p + s * u[n] for n, p in params.items()}) for s in (1, 0, -1))
        if (ahead - 2 * here + behind).norm() > AFFINE * (ahead.norm() + 2 * here.norm() + behind.norm()):
            return False
    return True


def mass_roots(model: nn.Module, x: Tensor, mass: Mass, params: Mapping[str, Tensor]) -> Tensor:
    """√D as one vector [m]."""
    _, factors = layer_factors(model, x.to(next(iter(model.parameters())).dtype))
    masses = model_mass(factors, mass)
    return torch.cat([mass_entries(masses[n], p).expand_as(p).flatten() for n, p in params.items()]).sqrt()
