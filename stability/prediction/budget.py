"""How many candidates go through a step together, so that the whole stays within a limit on memory."""

from collections.abc import Mapping
from math import prod

from torch import Tensor

from nt_kernel.factors import Factor
from nt_kernel.mass import Masses

MEMORY_LIMIT = 2**31  # bytes, where none is given


def candidates_at_once(
    factors: Mapping[str, Factor],
    mass: Masses,
    sizes: tuple[int, int, int, int],
    y: Tensor,
    *,
    copies: int,
    limit: int,
) -> int:
    """The largest group of candidates whose step fits into ``limit`` bytes; an estimate from above, from shapes alone.

    ``factors``: the blocks on S, with outputs ``y`` [n, p]; ``sizes`` = (n, R, Q, p). Carried whatever the group: the state
    of all R candidates, K_SS, its Cholesky factor and its inverse of every block, K_QS, the factors on S and Q. Per candidate
    of the group: the factors at z, up to ten copies of a column block [np, p] of the largest block, and for each of the
    ``copies`` of its parameters that are at work (0: outputs only) these, with the first its network's graph and gradients.
    Raises ValueError, naming the bytes needed, where not even one candidate fits.
    """
    n, R, Q, p = sizes
    P = {name: n if f.decouples(mass) else n * p for name, f in factors.items()}
    b = {name: 1 if f.decouples(mass) else p for name, f in factors.items()}
    parameters = [sum(prod(shape) for shape in f.shapes.values()) for f in factors.values()]
    per_sample = sum(_held(f) for f in factors.values()) / n
    shared = (n + Q) * per_sample * 2 + sum(4 * P[name] ** 2 + Q * b[name] * P[name] for name in P)
    shared += R * (sum(parameters) if copies else (n + 1 + Q) * p) + 7 * sum(parameters)
    each = 2 * per_sample + max(10 * P[name] * b[name] + 3 * Q * b[name] ** 2 for name in P) + 12 * (n + 1 + Q) * p
    if copies:
        each += 4 * max(parameters) + copies * sum(parameters) + (n + 1 + Q) * per_sample
    size = y.element_size()
    group = int((limit / size - shared) // each)
    if group < 1:
        raise ValueError(
            f"memory_limit is {limit} bytes, and these {R} candidates on {n} samples with {p} outputs need "
            f"{int((shared + each) * size) + 1}; raise it, or give fewer candidates or held-out points"
        )
    return min(group, R)


def _held(factor: Factor) -> int:
    """Numbers that a factor keeps."""
    return sum(t.numel() for part in factor.parts for t in _tensors(vars(part)))


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [t for one in inside for t in _tensors(one)]
