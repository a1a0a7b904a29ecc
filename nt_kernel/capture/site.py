"""What a pass is told beforehand and what it brings back: a plan of sites, an observation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch  # noqa: F401 (the examples use it)
from torch import Tensor

from nt_kernel.capture.structures import Structure


@dataclass(frozen=True)
class Layout:
    """Where the samples are in a call's arrays: dimension ``axis``, alone or folded with T positions.

    ``fold`` is "" ([…, N, …]), "samples" (N·T, sample by sample) or "positions" (T·N, position by position).
    """

    axis: int
    fold: str = ""

    def samples_first(self, t: Tensor, N: int, lead: int) -> Tensor:
        """[lead…, as called] → [lead…, N, …].

        >>> Layout(0, "positions").samples_first(torch.tensor([0, 1, 0, 1]), 2, 0)
        tensor([[0, 0],
                [1, 1]])
        """
        axis = lead + self.axis
        if self.fold:
            sizes = (N, -1) if self.fold == "samples" else (-1, N)
            t = t.unflatten(axis, sizes)
            axis += self.fold == "positions"
        return t.movedim(axis, lead)


@dataclass(frozen=True)
class Site:
    """One captured call: the ``index``-th call of a registered function on trained parameters.

    ``weight`` and ``bias`` are the full names of the tensors it explains (None: not trained, or explained otherwise);
    ``shape`` is that of the call's output.
    """

    index: int
    structure: Structure
    weight: str | None
    bias: str | None
    weight_shape: tuple[int, ...]
    bias_shape: tuple[int, ...]
    shape: tuple[int, ...]
    layout: Layout
    options: tuple
    is_output: bool = False  # its output is the model's: δ is the identity and need not be computed
    contracted: bool = False  # its per-sample Jacobian is formed at once, δ is not kept


@dataclass(frozen=True)
class Plan:
    """How each trainable parameter is seen: by the calls that use it, by its per-sample Jacobian (``explicit``), not at all.

    ``layers`` maps every layer to its parameters, in ``named_parameters()`` order.
    """

    layers: dict[str, tuple[str, ...]]
    sites: tuple[Site, ...] = ()
    explicit: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    output: Callable | None = None
    calls: tuple[tuple, ...] = ()  # what the forward pass did when the plan was made (``Watch.path``)
    final: int | None = None  # the call whose untouched result the model returned
    volatile: bool = False  # the forward selects or sorts by its data: where the samples are is checked on every use
    chain: bool = False  # a perceptron, when the plan was made (``nt_kernel.capture.chain``)


class StalePlan(ValueError):
    """The forward pass did something else than when its plan was made."""


@dataclass(frozen=True)
class Observation:
    """Outputs [N, C]; by call the features and sensitivities [C, …] as called, or where these are contracted the
    Jacobians of "weight" and "bias" [N, C, P]; by parameter the explicit Jacobian [N, C, P]."""

    outputs: Tensor
    features: dict[int, Tensor]
    deltas: dict[int, Tensor]
    sums: dict[int, dict[str, Tensor]]
    jacobians: dict[str, Tensor]
