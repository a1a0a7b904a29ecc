"""One step of the RLO family against torch's Adam (foreach): the optimizer's own work, gradients standing still."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cpu_time import OnCpu
from benchmarks.timing import Contender, Entry, Settings, compare, table
from optim import RLO, RLOLambda

BASE = "Adam (foreach)"
TITLE = "RLO step"
ABOUT = (
    "`step()` alone on four parameters of s × s, float32, gradients set once. CPU seconds. `error`: largest difference of the "
    "parameters after 3 steps from the same rule written out in float64, relative to the largest move."
)
RATIO = "× Adam"
CASES = [("64²", 64), ("512²", 512)]
QUICK = [("16²", 16)]
TOLERANCE = 1e-4
LR, BETA1, BETA2, EPS, ETA, SCALE = 1e-3, 0.9, 0.999, 1e-8, 0.1, 1e-2

RULES: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    BASE: lambda params: torch.optim.Adam(params, LR, betas=(BETA1, BETA2), eps=EPS, foreach=True),
    "RLO-Λ (ema, tanh)": lambda params: RLOLambda(params, LR),
    "RLO (ema, tanh, η = 0.1)": lambda params: RLO(params, LR, eta=ETA),
    "RLO (ema, sign, η = 0.1)": lambda params: RLO(params, LR, eta=ETA, direction="sign"),
    "RLO (ema, tanh, η = 0.1, normalised)": lambda params: RLO(params, LR, eta=ETA, normalize=True),
    "RLO (adam, identity, η = 0.1)": lambda params: RLO(params, LR, eta=ETA, memory="adam", direction="identity"),
    "RLO (adam, tanh, η = 0.1)": lambda params: RLO(params, LR, eta=ETA, memory="adam"),
    "RLO (adam, tanh, η = 0.1, normalised)": lambda params: RLO(params, LR, eta=ETA, memory="adam", normalize=True),
}


def start(size: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients, drawn once."""
    draw = torch.Generator().manual_seed(0)
    return tuple([torch.randn(size, size, generator=draw).to(device) for _ in range(4)] for _ in range(2))


def reference(name: str, values: list[Tensor], gradients: list[Tensor], steps: int) -> list[Tensor]:
    """The rule by its definition, in float64."""
    p, g = ([t.double() for t in ts] for ts in (values, gradients))
    m, s, v = ([torch.zeros_like(t) for t in p] for _ in range(3))
    for t in range(1, steps + 1):
        m = [BETA1 * a + (1 - BETA1) * b for a, b in zip(m, g, strict=True)]
        s = [BETA2 * a + (1 - BETA2) * b * b for a, b in zip(s, g, strict=True)]
        hat = [(a / (1 - BETA1**t)) / ((b / (1 - BETA2**t)).sqrt() + EPS) for a, b in zip(m, s, strict=True)]
        u = hat if "adam" in name.lower() else m
        d = [-x for x in u]
        if "tanh" in name:
            d = [torch.tanh(x / SCALE) for x in d]
        elif "sign" in name:
            d = [x.sign() for x in d]
        if "normalised" in name:
            norm = torch.stack([x.square().sum() for x in d]).sum().sqrt()
            d = [x / norm for x in d]
        eta = ETA if "η" in name else 1.0
        v = [(1 - eta) * a + eta * b for a, b in zip(v, d, strict=True)]
        p = [a + LR * b for a, b in zip(p, v, strict=True)]
    return p


def contender(name: str, size: int, device: str) -> Contender:
    """The rule on parameters of its own, checked before it is timed."""
    values, gradients = start(size, device)

    def made() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        params = [nn.Parameter(t.clone()) for t in values]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        return params, RULES[name](params)

    params, optimizer = made()
    for _ in range(3):
        optimizer.step()
    expected = reference(name, values, gradients, 3)
    gap = max((p.detach().double() - q).abs().max() for p, q in zip(params, expected, strict=True))
    size_of_move = max((q - t.double()).abs().max() for q, t in zip(expected, values, strict=True))
    # float32 parameters of size 1 are known to 1e-7, which counts beside a move of 1e-4.
    rounding = 4 * torch.finfo(torch.float32).eps * max(t.abs().max() for t in values)
    error = ((gap - rounding).clamp_min(0) / size_of_move).item()
    _, timed = made()
    return Contender(OnCpu(timed.step), error)


def report(settings: Settings, cases: Sequence[tuple[str, int]], stem: Path) -> Iterator[str]:
    """The body of the page after each case."""
    rows: list[Entry] = []
    for name_of_size, size in cases:
        found = {name: contender(name, size, settings.device) for name in RULES}
        rows += compare(f"4 × {name_of_size}", found, BASE, TOLERANCE, settings)
        yield table(rows, RATIO)
