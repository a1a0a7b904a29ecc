"""Amounts of memory: how they are written, and what a run is predicted to take."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**k
    for k, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1024))
}


def parse_bytes(amount: "int | float | str") -> int:
    """Bytes, from a number or from text such as "2 GiB", "500 MB", "1.5G" (G is GiB).

    Raises TypeError for anything else, ValueError for text of another form and for amounts that are not positive.

    >>> parse_bytes("2 GiB"), parse_bytes("1.5 kB"), parse_bytes(1e6)
    (2147483648, 1500, 1000000)
    """
    if isinstance(amount, bool) or not isinstance(amount, Real | str):
        raise TypeError(f"memory_limit must be a number of bytes or text such as '2 GiB', got {amount!r}")
    scale, number = 1, amount
    if isinstance(amount, str):
        parts = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", amount)
        unit = None if parts is None else {u.lower(): s for u, s in _UNITS.items()}.get(parts[2].lower())
        if unit is None:
            raise ValueError(f"memory_limit is {amount!r}; write bytes, or a number with kB, MB, GB, KiB, MiB or GiB")
        number, scale = float(parts[1]), unit
    if not 0 < number < float("inf"):
        raise ValueError(f"memory_limit must be positive and finite, got {amount!r}")
    return int(number * scale)


def format_bytes(amount: float) -> str:
    """
    >>> format_bytes(1.3 * 2**30), format_bytes(512)
    ('1.3 GiB', '512 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"


@dataclass(frozen=True)
class PeakMemory:
    """The predicted peak of one run: bytes of tensors alive at once, above those alive before it began.

    ``total`` is the largest sum over the moments of the run, not the sum of the ``items``, of which not all are alive at
    once:

    - "result": what is returned; "parameters": their copy in the dtype of the kernel, where the model has another, and
      what planning leaves to the garbage collector;
    - "check": the model's first pass, on a few samples, that finds its structure (once per model and shape);
    - "factors": features and sensitivities of the blocks held at a time; "observation": what one block's forward and
      backward passes take beyond them (activations, intermediate Jacobians);
    - "products": temporaries of Gram products (tiles, small per-sample Jacobians, copies);
    - "inner systems": Cholesky factors and solves, of the generalized kernel alone.
    """

    chunk_size: int  # samples in a block
    blocks: int
    total: int
    items: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.items.items() if size)
        many = "1 block" if self.blocks == 1 else f"{self.blocks} blocks"
        return f"{many} of {self.chunk_size} samples, predicted peak {format_bytes(self.total)} ({parts})"


def announce(what: str, peak: PeakMemory, limit: int | None) -> None:
    """One line on standard error, before the run: blocks, predicted peak and limit."""
    many = "1 block" if peak.blocks == 1 else f"{peak.blocks} blocks"
    allowed = "" if limit is None else f" of {format_bytes(limit)} allowed"
    sys.stderr.write(
        f"{what}: {many} of {peak.chunk_size} samples, predicted peak {format_bytes(peak.total)}{allowed}\n"
    )
