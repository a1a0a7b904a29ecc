"""What T5 costs at n·p = 2000: processor seconds by matrices and by products through the layers.

python -m examples.enclosure_cost            # a few minutes on one thread; the table of docs/recording.md
python -m examples.enclosure_cost --samples 20 --steps 4
"""

import argparse
import time

import torch
from torch import nn

from optim import Woodbury
from stability import RunRecord, certify, record

OPTIMIZERS = {
    "SGD": (40, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
    "SGD, momentum": (100, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.8)),
    "Woodbury": (40, lambda m: Woodbury(m, 0.1, mass=0.3)),
}


def trained(make, x: torch.Tensor, a: torch.Tensor, steps: int) -> RunRecord:
    """A recorded full-batch run of a tanh network of width 128."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(x.shape[1], 128), nn.Tanh(), nn.Linear(128, a.shape[1])).double()
    opt = make(model)
    with record(model, x, opt, targets=a) as run:
        for _ in range(steps):
            opt.zero_grad()
            (0.5 * (model(x) - a).square().sum(1).mean()).backward()
            opt.step()
    return run


def cost(name: str, samples: int, steps: int | None = None) -> dict[str, float]:
    """Processor seconds of T5 for one optimizer, {"matrices": …, "products": …}, and the largest relative gap of the two."""
    draw = torch.Generator().manual_seed(0)
    x, a = (torch.randn(samples, size, generator=draw, dtype=torch.float64) for size in (64, 10))
    other_x, other_a = x.clone(), a.clone()
    other_x[0], other_a[0] = x[0] + 1, a[1]
    usual, make = OPTIMIZERS[name]
    run, twin = (trained(make, *pair, steps or usual) for pair in ((x, a), (other_x, other_a)))
    found, values = {}, []
    for how, dense in (("matrices", True), ("products", False)):
        start = time.process_time()
        values.append(certify(run, twin, scalar=False, ladder=False, dense=dense)["T5"].series)
        found[how] = time.process_time() - start
    return found | {"gap": ((values[0] - values[1]).abs() / values[0].clamp_min(1e-300)).max().item()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=None, help="of every run, in place of the usual number")
    options = parser.parse_args()
    print("| optimizer | steps | T5, matrices | T5, products |\n|---|--:|--:|--:|")
    for name, (usual, _) in OPTIMIZERS.items():
        row = cost(name, options.samples, options.steps)
        print(f"| {name} | {options.steps or usual} | {row['matrices']:.1f} | {row['products']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
