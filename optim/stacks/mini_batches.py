"""Index streams: which rows make up the mini-batch of every step, the same for all networks of a stack.

Twins stay twins under mini-batches only if all of them draw the same rows: a step on which sample k is drawn is then the
step on which S shows x_k and its twin shows x' in the same row, and every other step is one of the same data.
"""

from collections.abc import Iterator
from math import ceil
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from nt_kernel.errors import unknown_name

DRAWS = ("permutation", "subset", "replacement")


def index_stream(
    n: int,
    batch: int,
    seed: "int | np.random.SeedSequence",
    *,
    epochs: int | None = None,
    steps: int | None = None,
    draw: str = "permutation",
    last: str = "keep",
) -> Iterator[Tensor]:
    """Row numbers of the mini-batches, one int64 tensor [b] a step, for ``epochs`` epochs or ``steps`` steps.

    Parameters
    ----------
    n, batch: rows of the data, and of a mini-batch (1 ≤ batch ≤ n).
    seed: decides everything. A generator is refused: whoever draws from it in between would change the rows.
    epochs or steps: exactly one; ⌈n/batch⌉ steps an epoch, or ⌊n/batch⌋ where the short batch is dropped.
    draw: "permutation", every row once an epoch (dropped rows excepted): all batches of full size hold a given row with
        probability batch/n; "subset", a fresh subset every step, batch/n independently of all other steps;
        "replacement", independent draws, 1 − (1 − 1/n)^batch for at least one.
    last: the batch of n mod batch rows that ends an epoch, "keep" or "drop".

    Raises ValueError/TypeError at once, not at the first batch.

    >>> [rows.tolist() for rows in index_stream(5, 2, seed=0, epochs=1)]
    [[2, 4], [3, 0], [1]]
    >>> [len(rows) for rows in index_stream(5, 2, seed=0, steps=4, last="drop")]
    [2, 2, 2, 2]
    """
    for name, value, least in (("n", n, 1), ("batch", batch, 1), ("epochs", epochs, 0), ("steps", steps, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    if batch > n:
        raise ValueError(f"batch must be at most n = {n}, got {batch}")
    if (epochs is None) == (steps is None):
        raise ValueError(f"give epochs or steps, one of them; got epochs={epochs!r}, steps={steps!r}")
    if draw not in DRAWS:
        raise ValueError(unknown_name("draw", draw, DRAWS))
    if last not in ("keep", "drop"):
        raise ValueError(unknown_name("last", last, ("keep", "drop")))
    if isinstance(seed, bool) or not isinstance(seed, Integral | np.random.SeedSequence):
        raise TypeError(f"seed must be an int or a numpy SeedSequence, got {type(seed).__name__}")
    if isinstance(seed, Integral) and seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    in_epoch = n // batch if last == "drop" else ceil(n / batch)
    return _batches(
        n, batch, np.random.default_rng(seed), epochs * in_epoch if steps is None else steps, in_epoch, draw
    )


def _batches(n: int, batch: int, generator, steps: int, in_epoch: int, draw: str) -> Iterator[Tensor]:
    order = np.empty(0, dtype=np.int64)
    for step in range(steps):
        start = step % in_epoch * batch
        size = min(batch, n - start)
        if draw == "permutation":
            order = generator.permutation(n) if start == 0 else order
            rows = order[start : start + size]
        else:
            rows = generator.choice(n, size, replace=draw == "replacement")
        yield torch.from_numpy(np.asarray(rows, dtype=np.int64))


def twin_batch(x: Tensor, rows: Tensor, replaced: Tensor, new: Tensor) -> Tensor:
    """The mini-batch of every twin, [K, b, …], from one data set: x[rows], with ``new[j]`` in the place of row replaced[j].

    Equal to stacking the K data sets S^(k→z') and taking ``rows`` of each, without holding them.

    Parameters
    ----------
    x: [n, …], S; rows: [b] of :func:`index_stream`; replaced: [K], the row that network j has another sample in (−1: none,
    the network trained on S itself); new: [K, …], that sample (any for −1).

    Raises ValueError for shapes that do not go together or a row that x does not have.

    >>> x, new = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 9.0])
    >>> twin_batch(x, torch.tensor([2, 1]), torch.tensor([-1, 1]), new)
    tensor([[2., 1.],
            [2., 9.]])
    """
    if replaced.dim() != 1 or new.shape != (len(replaced), *x.shape[1:]):
        raise ValueError(
            f"expected replaced [K] and new [K, {', '.join(map(str, x.shape[1:]))}]; "
            f"got {tuple(replaced.shape)} and {tuple(new.shape)}"
        )
    if bool(((replaced < -1) | (replaced >= len(x))).any()):
        raise ValueError(f"replaced must be rows 0..{len(x) - 1}, or -1 for none; got {replaced.tolist()}")
    rows, replaced = rows.to(x.device), replaced.to(x.device)
    hit = (rows == replaced[:, None]).reshape(len(replaced), len(rows), *[1] * (x.dim() - 1))
    return torch.where(hit, new[:, None], x[rows])
