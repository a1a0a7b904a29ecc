"""The parameters along a run within a memory budget: all of them, or every 2nd, 4th, 8th, … where they would not fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

FEWEST = 6  # parameter copies that any budget must hold: the first and the last, a predecessor, a diagonal, two to come


@dataclass
class Snapshot:
    """The model at time t: parameters (and buffers) by name, and what the step that starts here divides by (``masses``)."""

    state: Mapping[str, Tensor]
    masses: Mapping[str, object] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.state.values(), *(m for m in self.masses.values() if isinstance(m, Tensor))]
        return sum(t.numel() * t.element_size() for t in tensors)


class Snapshots:
    """Snapshots at t = 0, s, 2s, … and at the last t; the *stride* s doubles when they outgrow ``budget`` bytes.

    With ``pairs`` the predecessor of every anchor is kept beside it: momentum's f_t = e_t − e_{t−1} needs both. The strides
    of two runs are powers of 2, so that one grid holds the other.

    >>> from torch import zeros
    >>> kept = Snapshots(budget=5 * 8)
    >>> for t in range(12):
    ...     kept.add(t, Snapshot({"w": zeros(1).double()}))
    >>> kept.stride, kept.anchors
    (4, [0, 4, 8, 11])
    """

    def __init__(self, budget: int):
        self.budget, self.stride, self.pairs, self.last = budget, 1, False, -1
        self.held: dict[int, Snapshot] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(s.nbytes for s in self.held.values())

    @property
    def anchors(self) -> list[int]:
        """The times t = 0, s, 2s, … and the last."""
        return [t for t in sorted(self.held) if self.is_anchor(t)]

    def is_anchor(self, t: int) -> bool:
        """True for the times that states are compared at."""
        return t % self.stride == 0 or t == self.last

    def add(self, t: int, snapshot: Snapshot) -> None:
        """Take in the model at t, the last time so far."""
        self.last = t
        self.held[t] = snapshot
        self._drop()

    def keep_masses(self, t: int, masses: Mapping[str, object]) -> None:
        """The masses of the step that starts at t, where t is an anchor that is still here."""
        if t in self.held and t % self.stride == 0:
            self.held[t].masses = masses

    def _drop(self) -> None:
        while True:
            wanted = {t for t in self.held if self.is_anchor(t) or (self.pairs and self.is_anchor(t + 1))}
            self.held = {t: s for t, s in self.held.items() if t in wanted}
            if self.nbytes <= self.budget or self.stride > self.last:
                return
            self.stride *= 2
