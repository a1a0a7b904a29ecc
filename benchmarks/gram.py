"""The empirical NTK of a whole network, [N, C, N, C]: layer factors against torch.func and nngeometry."""

from collections.abc import Callable
from copy import deepcopy
from functools import reduce

import torch
from torch import Tensor, nn

from benchmarks.timing import Contender, Entry, Settings, compare
from benchmarks.workloads import WORKLOADS
from nt_kernel import layer_factors

OURS, REFERENCE = "layer factors", "torch.func jacrev"
TITLE = "Gram matrix"
ABOUT = (
    "Full empirical NTK (np × np), from the model and its inputs. `error`: relative Frobenius distance from torch.func "
    "in the same precision. Our one-time check of a new model against autograd falls into the warm-up, not the times."
)
RATIO = "× layer factors"
CASES = [
    ("W1", 64, "float32"),
    ("W1", 128, "float32"),
    ("W1", 64, "float64"),
    ("W2", 64, "float32"),
    ("W2", 32, "float64"),
    ("W4", 256, "float32"),
    ("W4", 1024, "float32"),
    ("W4", 256, "float64"),
]
QUICK = [("W1", 16, "float32"), ("W1", 16, "float64"), ("W2", 8, "float32"), ("W4", 64, "float32")]
TOLERANCE = {"float32": 1e-4, "float64": 1e-12}


def factors_gram(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Ours: one pass, then two small Gram matrices per layer."""
    return lambda: reduce(torch.add, (factor.gram() for factor in layer_factors(model, x)[1].values()))


def jacrev_gram(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """torch.func: per-sample Jacobians by ``vmap(jacrev)``, contracted by parameter (torch's NTK tutorial)."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, Tensor], xi: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (xi[None],))[0]

    jacobian = torch.func.vmap(torch.func.jacrev(one), (None, 0))

    def run() -> Tensor:
        flat = [J.flatten(2) for J in jacobian(params, x).values()]  # [N, C, P]
        return reduce(torch.add, (torch.einsum("ncp,mdp->ncmd", J, J) for J in flat))

    return run


def nngeometry_gram(model: nn.Module, x: Tensor) -> Callable[[], Tensor] | None:
    """nngeometry's Gram matrix of one full batch; None when it is not installed."""
    try:
        from nngeometry.gram import GramMatrix
        from nngeometry.layercollection import LayerCollection
    except ImportError:
        return None

    layers = LayerCollection.from_model(model)
    # Its axes are [C, N, C, N]. A detached view each time: nngeometry sets requires_grad on what it is given.
    return lambda: GramMatrix(model, (x.detach(),), layer_collection=layers).to_torch().permute(1, 0, 3, 2)


CONTENDERS = {OURS: factors_gram, REFERENCE: jacrev_gram, "nngeometry": nngeometry_gram}


def contenders(workload: str, n: int, dtype: str, device: str) -> dict[str, Contender]:
    """All of them on one network and batch, each with its distance from the reference."""
    model = WORKLOADS[workload].model(dtype, device)
    x, _ = WORKLOADS[workload].batch(n, dtype, device)
    # Each has a copy of its own: hooks that one leaves behind would be timed with the others.
    runs = {name: make(deepcopy(model), x) for name, make in CONTENDERS.items()}
    reference = runs[REFERENCE]()
    size = reference.norm()
    return {
        name: Contender(None) if run is None else Contender(run, ((run() - reference).norm() / size).item())
        for name, run in runs.items()
    }


def entries(settings: Settings, cases: list[tuple[str, int, str]] = CASES) -> list[Entry]:
    """The rows of the table."""
    rows = []
    for workload, n, dtype in cases:
        found = contenders(workload, n, dtype, settings.device)
        rows += compare(f"{workload}, n = {n}, {dtype}", found, OURS, TOLERANCE[dtype], settings)
    return rows
