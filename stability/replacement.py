"""Twin data sets: S, and S^(k→z') with sample k replaced by z' = (x', a')."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor, nn

from stability.losses import Loss


@dataclass(frozen=True)
class Replacement:
    """Sample ``index`` of S is replaced by the input ``x`` [d, …] with target ``target`` [p] (a class index under
    cross-entropy)."""

    index: int
    x: Tensor
    target: Tensor


def data_for(
    loss: Loss,
    model: nn.Module,
    x: Tensor,
    targets: Tensor,
    replacements: Sequence[Replacement],
    held_out: Tensor | None,
) -> tuple[Tensor, Sequence[Replacement]]:
    """Targets [n, p] and replacements as the loss takes them, checked: class indices [n] of cross-entropy become one-hot.

    Raises what :func:`check_data` and :meth:`stability.losses.Loss.encoded` raise.
    """
    if loss.targets == "distribution" and isinstance(targets, Tensor) and not targets.is_floating_point():
        _check_tensor("x", x, None)
        with torch.no_grad():
            p = model(x[:1]).flatten(1).shape[-1]
        targets = loss.encoded(targets, p, x.dtype)
        replacements = [
            replace(z, target=loss.encoded(z.target, p, x.dtype, f"replacements[{j}].target"))
            if isinstance(z, Replacement)
            else z
            for j, z in enumerate(replacements)
        ]
    check_data(x, targets, replacements, held_out)
    loss.encoded(targets, targets.shape[1])
    for j, z in enumerate(replacements):
        loss.encoded(z.target, targets.shape[1], name=f"replacements[{j}].target")
    return targets, replacements


def check_data(x: Tensor, targets: Tensor, replacements: Sequence[Replacement], held_out: Tensor | None) -> None:
    """Raises ValueError/TypeError for data no twin study can be run on, naming what came and what was expected."""
    _check_tensor("x", x, None)
    for name, value in (("targets", targets), *([] if held_out is None else [("held_out", held_out)])):
        _check_tensor(name, value, x)
    n = len(x)
    if n < 1 or x.dim() < 2:
        raise ValueError(f"x must be [n, d, …] with n >= 1 samples, got shape {tuple(x.shape)}")
    if targets.dim() != 2 or len(targets) != n:
        raise ValueError(f"targets must be [n, p] = [{n}, p], got shape {tuple(targets.shape)}")
    if held_out is not None and (held_out.shape[1:] != x.shape[1:] or len(held_out) == 0):
        raise ValueError(f"held_out must be [Q, {', '.join(map(str, x.shape[1:]))}], got {tuple(held_out.shape)}")
    if isinstance(replacements, Replacement) or not isinstance(replacements, Sequence):
        raise TypeError(f"replacements must be a list of Replacement, got {type(replacements).__name__}")
    if not replacements:
        raise ValueError("replacements is empty: a twin study needs at least one replaced sample")
    for j, z in enumerate(replacements):
        where = f"replacements[{j}]"
        if not isinstance(z, Replacement):
            raise TypeError(f"{where} must be a Replacement(index, x, target), got {type(z).__name__}")
        if isinstance(z.index, bool) or not isinstance(z.index, Integral) or not 0 <= z.index < n:
            raise ValueError(f"{where}.index must be an int in 0..{n - 1} (n = {n}), got {z.index!r}")
        for name, value, shape in (("x", z.x, x.shape[1:]), ("target", z.target, targets.shape[1:])):
            _check_tensor(f"{where}.{name}", value, x)
            if value.shape != shape:
                raise ValueError(f"{where}.{name} has shape {tuple(value.shape)}, expected {tuple(shape)}")


def _check_tensor(name: str, value: Tensor, x: Tensor | None) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if x is not None and (value.dtype, value.device) != (x.dtype, x.device):
        raise TypeError(f"{name} is {value.dtype} on {value.device}, x is {x.dtype} on {x.device}; use one of each")
    bad = (~torch.isfinite(value)).nonzero()
    if len(bad):
        raise ValueError(f"{name} holds NaN or inf, first at index {tuple(bad[0].tolist())}")


def duplicate_rows(x: Tensor) -> tuple[int, int] | None:
    """The first pair of equal inputs (i, j), i < j, or None; equal rows make K, and H, singular.

    >>> duplicate_rows(torch.tensor([[1.0], [2.0], [1.0]]))
    (0, 2)
    """
    seen: dict[bytes, int] = {}
    for j, row in enumerate(x.detach().cpu().flatten(1).contiguous().numpy()):
        i = seen.setdefault((row + 0.0).tobytes(), j)  # −0.0 + 0.0 = 0.0
        if i != j:
            return i, j
    return None


def stack_twins(x: Tensor, targets: Tensor, replacements: Sequence[Replacement]) -> tuple[Tensor, Tensor]:
    """Inputs [R, n + 1, d, …] and targets [R, n + 1, p] of the twins: rows 0…n−1 are S^(k→z'), row n the removed (x_k, a_k).

    The metric of a twin is built on its first n rows; row n lets its kernel be read on the original inputs of S.
    """
    xs = [torch.cat([_replaced(x, z.index, z.x), x[z.index : z.index + 1]]) for z in replacements]
    ts = [torch.cat([_replaced(targets, z.index, z.target), targets[z.index : z.index + 1]]) for z in replacements]
    return torch.stack(xs), torch.stack(ts)


def rows_on_S(n: int, replacements: Sequence[Replacement], device=None) -> Tensor:
    """[R, n]: the row of each twin's stack that holds sample i of S (row n where i = k).

    >>> rows_on_S(3, [Replacement(1, torch.zeros(1), torch.zeros(1))]).tolist()
    [[0, 3, 2]]
    """
    rows = torch.arange(n, device=device).repeat(len(replacements), 1)
    for j, z in enumerate(replacements):
        rows[j, z.index] = n
    return rows


def _replaced(rows: Tensor, k: int, row: Tensor) -> Tensor:
    out = rows.clone()
    out[k] = row
    return out
