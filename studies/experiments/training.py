"""The training loop of every study that compares optimizers, and what is asked of a network along it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from studies.definition.imported import imported

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from stability import Loss
    from studies.data.subsets import Draw


def named_loss(name: str) -> "Loss":
    """One of stability's losses by its name, or the user's function, "package.module:function".

    >>> named_loss("mse").name
    'mse'
    """
    from stability import resolve_loss

    return resolve_loss(imported(name, "loss") if ":" in name else name)


def training(
    model: "nn.Module",
    optimizer: "torch.optim.Optimizer",
    loss: "Loss",
    x: "Tensor",
    targets: "Tensor",
    batches: "Iterable[Tensor | slice]",
) -> Iterator[int]:
    """The ordinary loop on the mean loss of each mini-batch: 0 before the first step, then t after step t, each yielded.

    Between two of them the caller looks at ``model``, or stops. What the optimizer raises comes out of ``next``.

    >>> import torch
    >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> _ = model.weight.data.fill_(1.0)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> [(t, model.weight.item()) for t in training(model, sgd, named_loss("squared"), x, 0 * x, [slice(None)] * 2)]
    [(0, 1.0), (1, 0.5), (2, 0.25)]
    """
    from studies.experiments.optimizers import needs_closure

    by_closure = needs_closure(optimizer)
    yield 0
    for step, rows in enumerate(batches, 1):

        def backward(rows=rows) -> "Tensor":
            optimizer.zero_grad()
            risk = loss.value(model(x[rows]), targets[rows]).mean()
            risk.backward()
            return risk

        if by_closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()
        yield step


@contextmanager
def same_draws(seed: int, device: "torch.device | str" = "cpu") -> Iterator[None]:
    """What torch draws within, such as the masks of dropout, follows from ``seed`` alone: S and its twins see the same.

    Afterwards torch's random state is what it was.

    >>> import torch
    >>> before = torch.get_rng_state()
    >>> with same_draws(3):
    ...     one = torch.rand(2)
    >>> with same_draws(3):
    ...     print(torch.equal(one, torch.rand(2)), torch.equal(before, torch.get_rng_state()))
    True False
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    import torch

    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def twin_data(drawn: "Draw", j: int, targets: "Tensor", new: "Tensor") -> "tuple[Tensor, Tensor]":
    """(x, targets) of S with its j-th replacement in the place of sample k; ``new`` [R, p] are targets of the replacements."""
    x, a, k = drawn.x.clone(), targets.clone(), drawn.replaced[j]
    x[k], a[k] = drawn.replacement_x[j], new[j]
    return x, a


def evaluated(model: "nn.Module", x: "Tensor", rows: int = 1000) -> "Tensor":
    """The outputs in evaluation mode, ``rows`` inputs at a time; the model's mode is what it was."""
    import torch

    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(part) for part in x.split(rows)])
    finally:
        model.train(mode)


def accuracy(outputs: "Tensor", targets: "Tensor") -> float:
    """The share of rows whose largest output is the class.

    >>> import torch
    >>> accuracy(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    0.5
    """
    return (outputs.argmax(1) == targets.argmax(1)).double().mean().item()
