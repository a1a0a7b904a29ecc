"""One table of every optimizer of the project: what the contract tests (test_contract*.py, test_torch_expectations.py) run.

An optimizer joins by one line in ``TABLE``. torch's own SGD and Adam stand in it as controls: a test that they fail asks
for too much.
"""

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from nt_kernel.mass import RowColumnMass
from optim import Woodbury
from optim.options.damping import LevenbergMarquardt
from optim.options.second_moment import SecondMomentMass
from optim.rlo import RLO, RLOLambda, RLOLifted
from tests.reference import F64

LR = 0.05


@dataclass(frozen=True)
class Entry:
    """``factory(model, **options)`` makes the optimizer; ``groups=[{"layers": […], …}]`` is among the options of all.

    traits: "model", it sees the forward passes (and needs them); "layerwise", a layer's step is that of its own gradient,
    samples and hyperparameters; "state", it keeps tensors between steps; "memory", it keeps numbers only; "closure", its
    step needs one. ``hyper``: hyperparameters that a group may have for itself besides lr. ``settles``: the part of the
    initial excess loss that may be left after 60 steps on a quadratic. ``pace``: an lr for Rosenbrock's function.
    ``refuses``: values that construction refuses, by hyperparameter.
    """

    name: str
    factory: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    traits: frozenset[str] = frozenset()
    hyper: Mapping[str, Any] = field(default_factory=dict)
    settles: float = 1e-2
    pace: float = 5e-4
    refuses: Mapping[str, Sequence] = field(default_factory=dict)

    def __call__(self, model: nn.Module, **options) -> Optimizer:
        return self.factory(model, **{"lr": LR, **self.options, **options})


def by_parameters(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """torch's optimizers under the constructor of the project's: the model, groups by layer name."""

    def make(model: nn.Module, *, groups: Sequence[Mapping] = (), **options) -> Optimizer:
        def of(group: Mapping) -> dict:
            return {"params": [], **{key: value for key, value in group.items() if key != "layers"}}

        made = [{"params": []}, *map(of, groups)]
        for name, p in model.named_parameters():
            if p.requires_grad:
                layer = name.rpartition(".")[0]
                where = [any(fnmatchcase(layer, wild) for wild in group["layers"]) for group in groups]
                made[1 + where.index(True) if any(where) else 0]["params"].append(p)
        return kind([group for group in made if group["params"]], **options)

    return make


def row_column_mass(model: nn.Module) -> dict[str, RowColumnMass]:
    """D = row ⊗ column for every trained weight with two dimensions or more, entries in [1, 4]."""
    return {
        name: RowColumnMass(torch.linspace(1, 2, p.shape[0], dtype=F64), torch.linspace(1, 2, p[0].numel(), dtype=F64))
        for name, p in model.named_parameters()
        if p.dim() > 1 and p.requires_grad
    }


def row_column(model: nn.Module, **options) -> Woodbury:
    return Woodbury(model, **{"mass": row_column_mass(model), **options})


def fading_damping(step: int) -> float:
    """2, 3/2, 4/3, … → 1."""
    return 1 + 1 / (1 + step)


def rising_eta(step: int) -> float:
    """¼, 2/5, ½, … → 1."""
    return (1 + step) / (4 + step)


NAN, INF = float("nan"), float("inf")
OURS = frozenset({"model", "layerwise"})
HYPER = {"mass": 0.3, "momentum": 0.7, "weight_decay": 0.2}
BAD = {
    "lr": (0.0, -0.1, NAN, INF, "fast", None, True),
    "mass": (0.0, -1.0, NAN, INF, "heavy", None),
    "momentum": (-0.1, 1.0, 1.5, NAN, "much", None),
    "dampening": (-0.1, 1.0, NAN, "much", None),
    "weight_decay": (-0.1, NAN, INF, "much", None),
    "damping": (0.0, -1.0, NAN, INF, "much", None),
    "scale": ("meam", None),
    "blocks": ("layers", None),
    "solver": ("qr", None),
    "output_metric": ("fisherr", 3),
    "decay": ("coupled", None),
}
BAD_RLO = {
    "lr": (-0.1, NAN, INF, "fast", None, True),
    "eta": (0.0, -0.1, 1.5, NAN, "much", None, True),
    "scale": (0.0, -1.0, NAN, INF, "much", None),
    "weight_decay": (-0.1, NAN, INF, "much", None),
    "memory": ("lions", None),
    "direction": ("tan", None),
    "manifold": ("shpere", None),
}


def woodbury(name: str, *traits: str, **options) -> Entry:
    made = {key: options.pop(key) for key in ("factory", "settles", "pace", "hyper", "refuses") if key in options}
    return Entry(
        name, **{"factory": Woodbury, "hyper": HYPER, "pace": 0.3, **made}, options=options, traits=OURS | {*traits}
    )


TABLE = [
    Entry("SGD", by_parameters(SGD), traits=frozenset({"layerwise"}), hyper={"momentum": 0.7, "weight_decay": 0.2}),
    Entry(
        "SGD with momentum",
        by_parameters(SGD),
        {"momentum": 0.9},
        frozenset({"layerwise", "state"}),
        {"momentum": 0.7, "weight_decay": 0.2},
        refuses={"lr": (-0.1,), "momentum": (-0.1,), "weight_decay": (-0.1,)},
    ),
    Entry(
        "Adam", by_parameters(Adam), traits=frozenset({"layerwise", "state"}), hyper={"weight_decay": 0.2}, pace=0.01
    ),
    woodbury("Woodbury", refuses=BAD),
    woodbury("momentum", "state", momentum=0.9),
    woodbury("nesterov", "state", momentum=0.9, nesterov=True),
    woodbury("dampened", "state", momentum=0.5, dampening=0.3),
    woodbury("decoupled decay", weight_decay=0.02, settles=0.1),
    woodbury("Riemannian decay", weight_decay=0.02, decay="riemannian", settles=0.1),
    woodbury(
        "groups", "state", groups=[{"layers": ["0"], "lr": 0.04, "momentum": 0.9, "weight_decay": 0.01, "mass": 2.0}]
    ),
    woodbury("mean Jacobian", scale="mean-jacobian"),
    Entry("network", Woodbury, {"blocks": "network"}, frozenset({"model"}), HYPER, pace=0.3),
    woodbury("conjugate gradients", solver="cg"),
    woodbury("cross-entropy", output_metric="cross_entropy", pace=2e-3),
    woodbury("row × column", factory=row_column),
    woodbury("second moment", "state", mass=SecondMomentMass(beta2=0.9, eps=0.5)),
    woodbury("damping schedule", "memory", damping=fading_damping),
    Entry(
        "trust region",
        Woodbury,
        {"damping": LevenbergMarquardt(), "lr": 1.0},
        frozenset({"model", "memory", "closure"}),
        pace=1.0,
    ),
]
TABLE += [
    Entry(
        "RLO",
        by_parameters(RLO),
        {"eta": 0.5, "scale": 1.0},
        frozenset({"layerwise", "state"}),
        {"eta": 0.7, "weight_decay": 0.2},
        pace=0.01,
        refuses=BAD_RLO,
    ),
    Entry(
        "RLO-Λ",
        by_parameters(RLOLambda),
        {"memory": "adam", "direction": "identity"},
        frozenset({"layerwise", "state"}),
        {"weight_decay": 0.2},
        pace=0.01,
    ),
    Entry(
        "RLO-Lifted",
        by_parameters(RLOLifted),
        {"eta": rising_eta, "memory": "gradient", "direction": "identity"},
        frozenset({"layerwise", "state"}),
        {"weight_decay": 0.2},
    ),
]
# How a loop knows that an optimizer's step needs the loss as a closure.
BY_CLOSURE = [lambda opt: isinstance(getattr(opt, "damping", None), LevenbergMarquardt)]
NAMES = {entry.name: entry for entry in TABLE}


def entries(*traits: str, lacking: Sequence[str] = (), failing: Mapping[str, str] | None = None, every: int = 3):
    """The decorator that runs a test for every entry with these traits.

    ``failing``: {an entry's name or a trait: why it does not hold yet}. All but every ``every``-th entry are marked slow,
    others for each test: `make test` sees every entry in a third of the tests and every test with a third of the entries.
    """

    def marked(entry: Entry, slow: bool):
        why = [why for which, why in (failing or {}).items() if which == entry.name or which in entry.traits]
        marks = [pytest.mark.xfail(strict=True, reason=why[0])] if why else []
        return pytest.param(entry, id=entry.name, marks=marks + [pytest.mark.slow] * slow)

    chosen = [e for e in TABLE if e.traits >= {*traits} and not e.traits & {*lacking}]

    def decorate(test):
        first = crc32(test.__name__.encode()) % max(1, min(every, len(chosen)))
        return pytest.mark.parametrize("entry", [marked(e, bool((k - first) % every)) for k, e in enumerate(chosen)])(
            test
        )

    return decorate


def network(seed: int = 0, dtype: torch.dtype = F64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    return model.to(dtype)


def data(dtype: torch.dtype = F64, N: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs [N, 3] and targets [N, 2]."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, generator=draw, dtype=F64).to(dtype), torch.randn(N, 2, generator=draw, dtype=F64).to(
        dtype
    )


def squared(y: Tensor, a: Tensor) -> Tensor:
    """(1/N) Σ ½‖y_i − a_i‖²."""
    return 0.5 * (y - a).square().sum() / len(a)


def run(opt: Optimizer, model: nn.Module, steps: int, x: Tensor | None = None, a: Tensor | None = None) -> list[float]:
    """The ordinary loop, or the one with closures for those that need them; the loss before every step."""
    if x is None:
        x, a = data(next(model.parameters()).dtype)

    def evaluate() -> Tensor:
        opt.zero_grad()
        loss = squared(model(x), a)
        loss.backward()
        return loss

    by_closure, losses = any(needs(opt) for needs in BY_CLOSURE), []
    for _ in range(steps):
        loss = opt.step(evaluate) if by_closure else evaluate()
        if not by_closure:
            opt.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@torch.no_grad()
def put(model: nn.Module, theta: Mapping[str, Tensor]) -> None:
    for n, p in model.named_parameters():
        p.copy_(theta[n])


def points(count: int) -> list[dict[str, Tensor]]:
    """Parameters of :func:`network`, drawn."""
    return [values(network(seed)) for seed in range(10, 10 + count)]


def steps_from(opt: Optimizer, model: nn.Module, thetas: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Where one step from each of the points leads, the state of ``opt`` going on from one to the next.

    At points given beforehand the gradients of a layer do not depend on how the other layers were moved.
    """
    reached = []
    for theta in thetas:
        put(model, theta)
        run(opt, model, 1)
        reached.append(values(model))
    return reached


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Bit for bit, types included."""
    return found.keys() == expected.keys() and all(
        found[n].dtype == expected[n].dtype and torch.equal(found[n], expected[n]) for n in expected
    )


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-11) -> None:
    for n in expected:
        torch.testing.assert_close(
            found[n], expected[n], rtol=tolerance, atol=tolerance, msg=lambda text, n=n: f"{n}: {text}"
        )


def state_tensors(opt: Optimizer) -> list[Tensor]:
    """Every tensor among the state of the parameters, in the order of the state_dict."""
    return [v for _, held in sorted(opt.state_dict()["state"].items()) for v in held.values() if isinstance(v, Tensor)]


def resume(path: str, steps: int = 3) -> None:
    """In a fresh process: every checkpoint of the file goes on from where it was, and the parameters it reaches are saved.

    ``path`` holds {entry: {"model": state_dict, "optimizer": state_dict}}; ``path``.done gets {entry: parameters, or the
    traceback}.
    """
    reached: dict[str, Any] = {}
    for name, saved in torch.load(path, weights_only=True).items():
        try:
            model = network(seed=99)
            opt = NAMES[name](model)
            model.load_state_dict(saved["model"])
            opt.load_state_dict(saved["optimizer"])
            run(opt, model, steps)
            reached[name] = values(model)
        except Exception:
            reached[name] = traceback.format_exc()
    torch.save(reached, path + ".done")


if __name__ == "__main__":
    resume(sys.argv[1])
