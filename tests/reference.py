"""Dense, slow references in float64, straight from the definitions: every Jacobian and every metric as a matrix.

Nothing here uses the packages under test; layers are found, Jacobians formed and systems solved by torch alone.
"""

from copy import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

F64 = torch.float64


def run(model: nn.Module, params: dict[str, Tensor], x, output=None) -> Tensor:
    """Outputs [N, C] at ``params`` (trainable parameters by name)."""
    fixed = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers()) if n not in params}
    x = x if isinstance(x, tuple) else (x,)
    y = functional_call(model, {**fixed, **params}, x)
    return (output(y) if output else y).reshape(len(x[0]), -1)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def layers_of(model: nn.Module) -> dict[str, list[str]]:
    """{layer: names of the parameters its module owns directly}; "." is the root."""
    layers: dict[str, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if p.requires_grad and full in dict(model.named_parameters()):
                layers.setdefault(module_name or ".", []).append(full)
    return layers


def jacobians(model: nn.Module, x, output=None) -> dict[str, Tensor]:
    """{parameter: ∂y/∂θ [N, C, P]}, the whole batch differentiated at once."""
    J = jacrev(lambda params: run(model, params, x, output))(trainable(model))
    return {n: j.reshape(*j.shape[:2], -1) for n, j in J.items()}


def softmax_matrix(y: Tensor) -> Tensor:
    """diag(s) − ssᵀ, [N, C, C]."""
    s = y.softmax(-1)
    return torch.diag_embed(s) - s[..., :, None] * s[..., None, :]


def identity_matrix(y: Tensor) -> Tensor:
    return torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand(*y.shape, y.shape[-1])


def definite_metric(y: Tensor) -> Tensor:
    """A user's metric that depends on the outputs, positive definite."""
    return 0.5 * identity_matrix(y) + y[..., :, None] * y[..., None, :]


def singular_metric(y: Tensor) -> Tensor:
    """A user's metric of rank one (and of rank zero where the sum of the outputs is negative)."""
    v = 1 + y.square()
    return v[..., :, None] * v[..., None, :] * (y.sum(-1) > 0)[..., None, None]


MATRIX = {"identity": identity_matrix, "squared": identity_matrix, "cross_entropy": softmax_matrix}
SCALE = {"mean": lambda n: 1 / n, "sum": lambda n: 1.0, "none": lambda n: 0.0}


class Dense:
    """Metric, direction and kernel of one model on one batch x; ``mass`` is a number or {parameter: number}."""

    def __init__(self, model, x, *, output=None, **options):
        self.model, self.x, self.output = model, x, output
        self.params = trainable(model)
        self.y = run(model, self.params, x, output)
        self.N, self.C = self.y.shape
        self._seen: dict[int, dict[str, Tensor]] = {}
        self._build(**options)

    def with_options(self, **options) -> "Dense":
        """The same model and data under other options; Jacobians are not formed again."""
        other = copy(self)
        other._build(**options)
        return other

    def _build(self, mass=1.0, output_metric="identity", scale="mean", blocks="layer"):
        self._stiffness: float | None = None
        self.c = SCALE[scale](self.N)
        self.M = torch.block_diag(*MATRIX.get(output_metric, output_metric)(self.y))  # [NC, NC]
        self.mass = {n: mass[n] if isinstance(mass, dict) else mass for n in self.params}
        layers = layers_of(self.model)
        self.blocks = layers if blocks == "layer" else {"network": list(self.params)}
        self.J = self.jacobian(self.x)
        self.G = {b: torch.diag(self.D(b)) + self.c * J.T @ self.M @ J for b, J in self.J.items()}

    def D(self, block: str) -> Tensor:
        return torch.cat([torch.full_like(self.params[n].flatten(), self.mass[n]) for n in self.blocks[block]])

    def jacobian(self, x) -> dict[str, Tensor]:
        """{block: J [N·C, P]}."""
        if id(x) not in self._seen:
            self._seen[id(x)] = jacobians(self.model, x, self.output)
        J = self._seen[id(x)]
        return {b: torch.cat([J[n].flatten(0, 1) for n in names], 1) for b, names in self.blocks.items()}

    def gram(self, block: str, A=None, B=None) -> Tensor:
        """J_A D⁻¹J_Bᵀ."""
        JA = self.J[block] if A is None else self.jacobian(A)[block]
        JB = self.J[block] if B is None else self.jacobian(B)[block]
        return JA / self.D(block) @ JB.T

    def kernel(self, block: str, A=None, B=None) -> Tensor:
        """J_A G⁻¹J_Bᵀ."""
        JA = self.J[block] if A is None else self.jacobian(A)[block]
        JB = self.J[block] if B is None else self.jacobian(B)[block]
        return JA @ torch.linalg.solve(self.G[block], JB.T)

    def H(self) -> Tensor:
        return sum(self.kernel(b) for b in self.blocks) / self.N

    def solve(self, g: dict[str, Tensor]) -> dict[str, Tensor]:
        """G⁻¹g by parameter name."""
        out = {}
        for b, names in self.blocks.items():
            flat = torch.linalg.solve(self.G[b], torch.cat([g[n].flatten() for n in names]))
            sizes = [self.params[n].numel() for n in names]
            out |= {n: piece.reshape(self.params[n].shape) for n, piece in zip(names, flat.split(sizes), strict=True)}
        return out

    def pull(self, v: Tensor) -> dict[str, Tensor]:
        """Jᵀv by parameter name, v [N, C]."""
        J = self._seen[id(self.x)]
        return {n: torch.einsum("ncp,nc->p", j, v).reshape(self.params[n].shape) for n, j in J.items()}

    def stiffness(self) -> float:
        """max(1, ‖c·MK‖) over the blocks: by how much the condition of G multiplies rounding."""
        if self._stiffness is None:
            self._stiffness = max(1.0, *((self.c * self.M @ self.gram(b)).norm().item() for b in self.blocks))
        return self._stiffness

    def lambda_max(self) -> float:
        """λ_max(LHLᵀ) = λ_max(HM), the number that limits the step."""
        return torch.linalg.eigvals(self.H() @ self.M).real.max().item()


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest ‖found − expected‖ over the names, relative to the largest ‖expected‖ (1 at least)."""
    size = max(1.0, *(t.norm().item() for t in expected.values()))
    return max((found[n] - expected[n]).norm().item() for n in expected) / size
