"""The peak memory of a kernel, predicted before it is computed.

Passes over the model are watched on a few samples and scaled: what they hold is proportional to the samples, up to a
share that does not grow and makes the prediction an upper bound. Gram products are not proportional to anything (tiles, routes
chosen by cost), so the very code that computes them runs on meta tensors of the predicted shapes, and its allocations
are counted. On top come 2 % and 64 KiB for the allocator's rounding.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from math import ceil, prod

import torch
from torch import Tensor

from nt_kernel.capture.sensitivities import ONE_BY_ONE
from nt_kernel.factors import Factor
from nt_kernel.kernels.live_bytes import LiveBytes
from nt_kernel.kernels.memory import PeakMemory, format_bytes
from nt_kernel.kernels.points import PLAN_SAMPLES, Points
from nt_kernel.kernels.sweep import Wanted

SLACK, FLOOR = 1.02, 64 * 2**10


@dataclass(frozen=True)
class Probe:
    """``samples`` samples observed under watch: bytes per sample of what is kept and of the passes at their peak."""

    factors: Mapping[str, Factor]
    y: Tensor
    kept: float
    peak: float
    samples: int

    @classmethod
    def of(cls, points: Points, n: int) -> "Probe":
        """Observe the first n samples."""
        with LiveBytes() as seen:
            y, factors = points.observed(slice(0, n))
            kept, peak = seen.live / n, seen.peak / n
        return cls(factors, y, kept, peak, n)

    def imagined(self, n: int) -> dict[str, Factor]:
        """The factors of n samples, as meta tensors."""
        return {
            name: replace(f, parts=tuple(_imagined(part, n) for part in f.parts)) for name, f in self.factors.items()
        }


@dataclass(frozen=True)
class Watched:
    """Points with their probes: from ``turn`` samples on, passes go one output at a time and take less memory each."""

    points: Points
    few: Probe
    turn: int
    many: Probe | None = None

    @classmethod
    def of(cls, points: Points, chunk: int) -> "Watched":
        """Watch two samples, and where blocks of ``chunk`` samples are past the turn, as many as make it."""
        few = Probe.of(points, min(points.size, PLAN_SAMPLES))
        per_sample = sum(prod(site.shape) for site in points.plan.sites if not site.is_output) / points.plan_size
        turn = ceil(ONE_BY_ONE / per_sample) if per_sample else points.size + 1
        turns = few.y.shape[1] > 1 and not points.plan.chain  # a chain's sensitivities take no passes
        if turns and few.samples < turn <= min(chunk, points.size):
            return cls(points, few, turn, Probe.of(points, turn))
        return cls(points, few, turn)

    def probe(self, n: int) -> Probe:
        """The one that n samples are like."""
        return self.many if self.many is not None and n >= self.turn else self.few

    def kept(self, chunk: int) -> float:
        """Bytes that the largest block keeps; the last may be a smaller one, before the turn."""
        return max(n * self.probe(n).kept for n in self._sizes(chunk))

    def passes(self, chunk: int) -> float:
        """Bytes of the passes over the costliest block, what it keeps included."""
        return max(n * self.probe(n).peak for n in self._sizes(chunk))

    def _sizes(self, chunk: int) -> set[int]:
        return {min(chunk, self.points.size), self.points.size % chunk} - {0}

    @property
    def watching(self) -> float:
        """Bytes that the probes took, and keep."""
        probes = [p for p in (self.few, self.many) if p is not None]
        return sum(p.kept * p.samples for p in probes) + max((p.peak - p.kept) * p.samples for p in probes)


def _imagined(part, n: int):
    found = {f.name: getattr(part, f.name) for f in fields(part)}
    return replace(part, **{name: _resized(t, n) for name, t in found.items() if isinstance(t, Tensor)})


def _resized(t: Tensor, n: int) -> Tensor:
    """n samples instead of t's, on the meta device, dimensions in the same order in memory."""
    order = sorted(range(t.dim()), key=lambda k: (-t.stride(k), k))
    shape = (n, *t.shape[1:])
    like = torch.empty([shape[k] for k in order], dtype=t.dtype, device="meta")
    return like.permute([order.index(k) for k in range(t.dim())])


@dataclass(frozen=True)
class Passage:
    """One sweep to come: its rows and columns (None: the same points), and what it computes."""

    rows: Watched
    columns: Watched | None
    job: Wanted

    def result(self) -> int:
        """Bytes of the kernels."""
        N, M, y = self.rows.points.size, (self.columns or self.rows).points.size, self.rows.few.y
        return sum(prod(r.shape(N, y.shape[1], M)) for r in self.job.reductions.values()) * y.element_size()

    def items(self, chunk: int) -> dict[str, float]:
        """Bytes of "factors", "observation" and "products", and the "peak" above what was there, for blocks of ``chunk``."""
        rows, columns, result = self.rows, self.columns or self.rows, self.result()
        symmetric = self.columns is None
        b, d = (min(chunk, side.points.size) for side in (rows, columns))
        single = (b, d) == (rows.points.size, columns.points.size)
        products = self._products(b, None if symmetric else d, single)
        if not single and symmetric:
            products = max(products, self._products(b, b, False))
        one, other = rows.kept(chunk), 0 if single and symmetric else columns.kept(chunk)
        # In several blocks one is always held while another is observed; so are the kernels.
        around = [0, 0 if symmetric else one] if single else [result + other, result + one]
        passing = max(around[0] + rows.passes(chunk), around[1] + columns.passes(chunk))
        return {
            "factors": one + other,
            "observation": max(side.passes(chunk) - side.kept(chunk) for side in (rows, columns)),
            "products": products,
            "peak": max(passing, one + other + result + products),
        }

    def _products(self, b: int, d: int | None, single: bool) -> int:
        rows, columns = self.rows, self.columns or self.rows
        first, second = rows.probe(b).imagined(b), None if d is None else columns.probe(d).imagined(d)
        if single:
            with LiveBytes() as seen:
                kernels = self.job.whole(first, second)
                return seen.peak - sum(k.untyped_storage().nbytes() for k in kernels.values())
        across, y = b if d is None else d, rows.few.y
        kernels = self.job.allocate(b, y.shape[1], across, y.to("meta"))
        with LiveBytes() as seen:
            self.job.fill(kernels, slice(0, b), slice(0, across), first, second)
        return seen.peak


@dataclass(frozen=True)
class Forecast:
    """What a run of some sweeps, one after the other with their kernels kept, will take."""

    passages: tuple[Passage, ...]
    parameters: int  # bytes of the copy of the parameters and buffers, and of what planning left behind
    check: int  # bytes that planning and probing took
    solves: int = 0  # bytes beside the kernels, once they are computed
    kept: int = 0  # bytes returned, where it is not the kernels

    @property
    def size(self) -> int:
        """The largest number of samples of a point set."""
        return max(side.points.size for p in self.passages for side in (p.rows, p.columns or p.rows))

    def peak(self, chunk: int) -> PeakMemory:
        """For blocks of ``chunk`` samples."""
        found, before, moments = [], self.parameters, [self.check]
        for passage in self.passages:
            found.append(passage.items(chunk))
            moments.append(before + found[-1]["peak"])
            before += passage.result()
        moments.append(before + self.solves)
        items = {"result": self.kept or before - self.parameters, "parameters": self.parameters, "check": self.check}
        items |= {name: max(f[name] for f in found) for name in ("factors", "observation", "products")}
        items["inner systems"] = self.solves
        chunk = min(chunk, self.size)
        total = ceil(SLACK * max(moments)) + FLOOR
        return PeakMemory(chunk, ceil(self.size / chunk), total, {name: ceil(size) for name, size in items.items()})


def fitting(forecast: Forecast, limit: int, least: int = 1) -> PeakMemory:
    """The peak of the fewest blocks of equal size that stay within ``limit`` bytes, of ``least`` samples at least.

    Raises ValueError, with the smallest peak there is, where even these do not.
    """
    N = forecast.size
    best = forecast.peak(N)
    if best.total <= limit:
        return best
    low, high, best = 1, ceil(N / least), forecast.peak(least)  # blocks: too few, enough
    if best.total > limit:
        raise ValueError(
            f"memory_limit is {format_bytes(limit)}; one sample at a time takes {format_bytes(best.total)}: {best}. "
            "Ask for less (outputs='trace', dtype=torch.float32, fewer points) or allow more"
        )
    while high - low > 1:
        middle = (low + high) // 2
        peak = forecast.peak(ceil(N / middle))
        low, high, best = (low, middle, peak) if peak.total <= limit else (middle, high, best)
    return best


def settle(forecast: Callable[[int], Forecast], chunk_size: int | None, limit: int | None) -> PeakMemory:
    """The blocks of a run: of ``chunk_size`` samples, or as large as ``limit`` bytes allow; both given, both are held to.

    ``forecast`` is asked for the forecast of blocks up to a size. Raises ValueError for a chunk that is not a whole number
    ≥ 1 and for limits that cannot be kept.
    """
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a whole number of samples >= 1, got {chunk_size!r}")
    if limit is None:
        found = forecast(chunk_size or sys.maxsize)
        return found.peak(chunk_size or found.size)
    if chunk_size is None:
        # Small blocks are the costliest a sample: what is found for them is safe to probe with.
        found = fitting(forecast(1), limit)
        return fitting(forecast(found.chunk_size), limit, found.chunk_size)
    peak = forecast(chunk_size).peak(chunk_size)
    if peak.total > limit:
        raise ValueError(
            f"chunk_size={chunk_size} takes {format_bytes(peak.total)}, memory_limit is {format_bytes(limit)}; leave "
            "chunk_size out, and the largest that fits is taken"
        )
    return peak
