"""Small training runs under ``record``: models, optimizers by name, twins with shared index streams."""

import copy

import torch
from torch import nn

from optim import RLO, LevenbergMarquardt, RLOLambda, RLOLifted, SecondMomentMass, Woodbury
from stability import record

F64 = torch.float64

# name: (optimizer of a model, at a learning rate); those of EXACT leave w_t = 0 for models linear in θ
EXACT = {
    "sgd": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr),
    "sgd-decay": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, weight_decay=0.3),
    "sgd-ascent": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr / 4, maximize=True),
    "heavy-ball": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.8),
    "dampened": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.8, dampening=0.5, weight_decay=0.1),
    "nesterov": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.8, nesterov=True, weight_decay=0.1),
    "asgd": lambda m, lr: torch.optim.ASGD(m.parameters(), lr=lr, lambd=0.05, alpha=0.7),
    "rlo": lambda m, lr: RLO(m.parameters(), lr, eta=0.3, memory="gradient", direction="identity", weight_decay=0.2),
    "rlo-ema": lambda m, lr: RLO(m.parameters(), lr, eta=1.0, memory="ema", direction="identity"),
    "rlo-lion": lambda m, lr: RLO(m.parameters(), lr, eta=1.0, memory="lion", direction="identity"),
    "rlo-lambda": lambda m, lr: RLOLambda(m.parameters(), lr, memory="gradient", direction="identity"),
    "rlo-scheduled": lambda m, lr: RLOLifted(
        m.parameters(), lr, eta=lambda t: 1 / (t + 2), memory="gradient", direction="identity"
    ),
    "woodbury": lambda m, lr: Woodbury(m, lr, mass=0.3, check_step=False),
    "woodbury-none": lambda m, lr: Woodbury(
        m, lr, mass=2.0, scale="none", weight_decay=0.2, decay="riemannian", check_step=False
    ),
    "woodbury-momentum": lambda m, lr: Woodbury(m, lr, momentum=0.7, dampening=0.3, weight_decay=0.2, check_step=False),
    "woodbury-nesterov": lambda m, lr: Woodbury(m, lr, scale="sum", momentum=0.7, nesterov=True, check_step=False),
    "woodbury-network": lambda m, lr: Woodbury(m, lr, mass=0.5, blocks="network", damping=lambda t: 1 + t, check_step=False),
    "woodbury-jacobian": lambda m, lr: Woodbury(m, lr, scale="mean-jacobian", solver="cholesky", check_step=False),
}  # fmt: skip
FROZEN = {
    "adam": lambda m, lr: torch.optim.Adam(m.parameters(), lr=lr, weight_decay=0.1),
    "amsgrad": lambda m, lr: torch.optim.Adam(m.parameters(), lr=lr, amsgrad=True),
    "adamw": lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.1),
    "nadam": lambda m, lr: torch.optim.NAdam(m.parameters(), lr=lr),
    "radam": lambda m, lr: torch.optim.RAdam(m.parameters(), lr=lr, betas=(0.5, 0.8)),
    "adamax": lambda m, lr: torch.optim.Adamax(m.parameters(), lr=lr),
    "rmsprop": lambda m, lr: torch.optim.RMSprop(m.parameters(), lr=lr, momentum=0.5),
    "centered": lambda m, lr: torch.optim.RMSprop(m.parameters(), lr=lr, centered=True, eps=0.01),
    "adagrad": lambda m, lr: torch.optim.Adagrad(m.parameters(), lr=lr, lr_decay=0.1, weight_decay=0.1),
    "adadelta": lambda m, lr: torch.optim.Adadelta(m.parameters(), lr=lr),
    "rprop": lambda m, lr: torch.optim.Rprop(m.parameters(), lr=lr / 10),
    "muon": lambda m, lr: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=lr),
    "rlo-tanh": lambda m, lr: RLO(m.parameters(), lr, eta=1.0, memory="ema", direction="tanh", scale=0.5),
    "rlo-adam": lambda m, lr: RLO(m.parameters(), lr, eta=1.0, memory="adam", direction="identity"),
    "rlo-sign": lambda m, lr: RLO(m.parameters(), lr, eta=0.5, memory="lion", direction="sign", weight_decay=0.1),
    "rlo-two-memories": lambda m, lr: RLO(m.parameters(), lr, eta=0.5, memory="ema", direction="tanh"),
    "second-moment": lambda m, lr: Woodbury(m, lr, mass=SecondMomentMass(eps=0.1), check_step=False),
    "riemannian-decay": lambda m, lr: Woodbury(
        m, lr, mass={"0": 0.5}, weight_decay=0.2, decay="riemannian", check_step=False
    ),
    "trust-region": lambda m, lr: Woodbury(m, lr, damping=LevenbergMarquardt()),
    "groups": lambda m, lr: torch.optim.SGD(
        [{"params": [p], "lr": lr / (1 + i), "weight_decay": 0.1 * i} for i, p in enumerate(m.parameters())],
        momentum=0.5,
    ),
}
OPTIMIZERS = EXACT | FROZEN


def mlp(d: int, p: int, width: int = 5, seed: int = 0, activation=nn.Tanh) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, width), activation(), nn.Linear(width, p)).double()


def linear(d: int, p: int, seed: int = 0) -> nn.Module:
    """Linear in θ, in a Sequential, so that layer names are as in ``mlp``."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, p)).double()


def half_squares(y, a):
    return 0.5 * (y - a).square().sum(1)


def trained(
    model,
    make,
    x,
    a,
    *,
    lr=0.1,
    steps=6,
    batches=None,
    loss=half_squares,
    schedule=None,
    record_loss="squared",
    **options,
):
    """A run of a copy of ``model`` under ``record``; ``batches`` rows per step (None: all), ``schedule`` factors of lr."""
    model = copy.deepcopy(model)
    optimizer = make(model, lr)
    start = [group["lr"] for group in optimizer.param_groups]
    options.setdefault("targets", a)
    with record(model, x, optimizer, loss=record_loss, **options) as run:
        for t in range(steps):
            rows = None if batches is None else batches[t]
            x_t, a_t = (x, a) if rows is None else (x[rows], a[rows])
            for group, lr_0 in zip(optimizer.param_groups, start, strict=True):
                group["lr"] = lr_0 * (1.0 if schedule is None else schedule[t])

            def closure():
                optimizer.zero_grad()
                h = loss(model(x_t), a_t).mean()  # noqa: B023
                h.backward()
                return h

            if isinstance(getattr(optimizer, "damping", None), LevenbergMarquardt):
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    return run


def data(n: int, d: int, p: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw, dtype=F64), torch.randn(n, p, generator=draw, dtype=F64)


def moved(model, size: float = 0.3, seed: int = 5):
    """Another start."""
    draw = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data += size * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return model
