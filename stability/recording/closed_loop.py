"""The closed loop A_t of a recorded run: a function of the S run and its optimizer alone, fixed before any twin is seen.

One formula for every rule of ``step_rule``, with f_t = e_t − e_{t−1} and B_t of ``force``:

    f_{t+1} = −[Ω_t + ℓ_t(η_t + ζ_tγ_t)B_t] e_t + κ_t[f_t + (Ω_{t−1} + ℓ_{t−1}η_{t−1}B_{t−1}) e_{t−1}],
    e_{t+1} = e_t + f_{t+1}.

**Derived** in docs/recording.md: eliminate v from two steps of the rule. Without memory (κ = 0) the state is e alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stability.recording.force import ForceOperator, decay_matrix, force_matrix, force_operator
from stability.recording.linear import plus, times
from stability.recording.step_rule import StepRule

if TYPE_CHECKING:
    from stability.recording.record import RunRecord


Part = Tensor | ForceOperator | float
LARGEST = 4096  # states in e up to which A_t is made as a matrix: 128 MiB


@dataclass(frozen=True)
class Step:
    """A_t of one step, as a product with states: X [D, R], or [2D, R] with memory. ``push`` = Ω_t + ℓ_t(η + ζγ)B_t.

    ``kick`` = Ω_{t−1} + ℓ_{t−1}η_{t−1}B_{t−1} of the step before. A number stands for its multiple of the identity.
    """

    push: Part
    carried: float = 0.0
    kick: Part = 0.0
    memory: bool = False

    def __matmul__(self, X: Tensor) -> Tensor:
        """A_t X."""
        if not self.memory:
            return X - times(self.push, X)
        e, f = X.tensor_split(2)
        move = -times(self.push, e)
        if self.carried:
            move = move + self.carried * (f + times(self.kick, e - f))
        return torch.cat([e + move, move])


@dataclass(frozen=True)
class Transition:
    """The product of the A_t of the steps from one recorded time to the next."""

    steps: tuple[Step, ...]
    states: int  # D, or 2D

    def __matmul__(self, X: Tensor) -> Tensor:
        """A X for X [states] or [states, R]."""
        for step in self.steps:
            X = step @ X
        return X

    def dense(self, like: Tensor) -> Tensor:
        """A [states, states], in the dtype and on the device of ``like``."""
        return self @ torch.eye(self.states, dtype=like.dtype, device=like.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices it is made of."""
        parts = (m for step in self.steps for m in (step.push, step.kick) if isinstance(m, Tensor))
        return sum({id(m): m.numel() * m.element_size() for m in parts}.values())


class ClosedLoop:
    """A_t of the S run between the times ``grid``; iterate for the :class:`Transition` of each interval.

    ``dense``: A_t as matrices, or (more than 4096 states in e) by products through the layers, where weight decay that
    differs between groups is left to w_t. Nothing is kept: every iteration computes the matrices anew from the snapshots of
    the run, one interval at a time.
    ``kinds`` counts the steps by what is known of them, ``exact`` says that w_t = 0 for a model linear in θ, a quadratic
    loss and two runs on the same data.
    """

    def __init__(self, run: "RunRecord", grid: list[int] | None = None, dense: bool | None = None):
        self.run, self.grid = run, run.times if grid is None else grid
        rules = run.rules
        self.memory = any(rule.beta for rule in rules if rule.known)
        self.outputs = run.outputs(0).numel()
        self.states = self.outputs * (1 + self.memory)
        self.dense = self.outputs <= LARGEST if dense is None else dense

    @property
    def exact(self) -> bool:
        """True where A_t is the closed loop itself for a model linear in θ and a quadratic loss."""
        steps = zip(self.run.rules, self.run.rows, strict=True)
        return all(rule.exact and not isinstance(rows, str) for rule, rows in steps) and self.run.loss.quadratic

    @property
    def description(self) -> tuple[str, ...]:
        """What A_t was taken to be, in words, one line for each kind of step."""
        lines: dict[str, int] = {}
        for rule, rows in zip(self.run.rules, self.run.rows, strict=True):
            text = f"{rule.name}: " + (rule.note or "exact for models linear in their parameters")
            if rule.known and not rule.still and isinstance(rows, str):
                text = f"{rule.name}: A_t = I (path length): {rows}"
            lines[text] = lines.get(text, 0) + 1
        return tuple(f"{text} ({count} steps)" for text, count in lines.items())

    def __len__(self) -> int:
        """The number of intervals."""
        return len(self.grid) - 1

    def __iter__(self) -> Iterator[Transition]:
        last: tuple[StepRule, Part] | None = None  # rule and Ω + ℓηB of the step before
        for start, end in pairwise(self.grid):
            steps, forces = [], {}
            self.run.load(start)
            for t in range(start, end):
                rule, push, kick = self._step(start, t, forces)
                carried = rule.carried(last[0] if last else None)
                steps.append(Step(push, carried, last[1] if last and carried else 0.0, self.memory))
                last = rule, kick
            yield Transition(tuple(steps), self.states)

    def matrices(self) -> list[Tensor]:
        """All of them, [states, states] each: for small systems, and for :func:`stability.contraction_metric`."""
        like = self.run.outputs(0)
        return [transition.dense(like) for transition in self]

    def _step(self, anchor: int, t: int, forces: dict) -> tuple[StepRule, Part, Part]:
        """(rule, Ω + ℓ(η + ζγ)B, Ω + ℓηB) of step t with the parameters of ``anchor``."""
        run = self.run
        rule, rows = run.rules[t], run.rows[t]
        if isinstance(rows, str):
            rule = replace(rule, known=False) if not rule.still else rule
        if not rule.known:
            return rule, 0.0, 0.0
        masses = run.masses(anchor)
        key = None if rows is None else tuple(rows.tolist())
        if rule.still or rule.force_rate == 0:
            B = None
        elif key in forces:
            B = forces[key]
        else:
            make = force_matrix if self.dense else force_operator
            B = forces[key] = make(run.reader, run.loss, rule, masses, rows)
        if self.dense:
            omega = decay_matrix(run.reader, rule, masses)
        else:
            omega = 0.0 if isinstance(rule.decay, Mapping) else rule.decay
        if B is None:
            return rule, omega, omega
        kick = _combined(omega, rule.lr * rule.eta, B) if rule.eta else omega
        return rule, _combined(omega, rule.force_rate, B), kick


def _combined(omega: Tensor | float, rate: float, B: Tensor | ForceOperator) -> Part:
    """Ω + rate·B."""
    if isinstance(B, ForceOperator):
        return replace(B, rate=rate * B.rate, omega=omega + rate * B.omega)
    return plus(omega, rate * B)
