"""A model at a set of points, its factors observed in blocks of samples, in the floating-point type asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nt_kernel.capture.observe import as_inputs, batch_size, check_finite, observe, select_samples
from nt_kernel.capture.plan import fast_formats, make_plan
from nt_kernel.capture.probe import split_state
from nt_kernel.capture.site import Plan, StalePlan
from nt_kernel.factors import Factor, factors_of

# A plan for blocks of samples is made on this many: enough to tell samples from positions.
PLAN_SAMPLES = 2


@dataclass(frozen=True)
class Points:
    """``size`` points ``x`` of a model whose state is in ``dtype``, in blocks of at most ``chunk`` samples."""

    model: nn.Module
    plan: Plan
    plan_size: int  # the number of samples that the plan's shapes are for
    params: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    x: tuple
    size: int
    chunk: int
    dtype: torch.dtype
    memo: dict | None = None  # where given, blocks are observed once and kept

    @property
    def blocks(self) -> list[slice]:
        """The samples of each block."""
        return [slice(start, min(start + self.chunk, self.size)) for start in range(0, self.size, self.chunk)]

    def observed(self, which: slice) -> tuple[Tensor, dict[str, Factor]]:
        """Outputs [n, C] and factors at the samples ``which``; ValueError or NumericalError where they are not finite."""
        if self.memo is None:
            return self._observe(which)
        key = which.indices(self.size)
        if key not in self.memo:
            self.memo[key] = self._observe(which)
        return self.memo[key]

    def _observe(self, which: slice) -> tuple[Tensor, dict[str, Factor]]:
        inputs = select_samples(self.x, which)
        inputs = tuple(t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs)
        plan = plan_for(self.plan, self.plan_size, batch_size(inputs))
        if plan.volatile and self.chunk < self.size:
            raise ValueError(
                "the model sorts or selects by its data, so that its samples cannot be taken in blocks; leave chunk_size and "
                "memory_limit out"
            )
        try:
            try:
                seen = observe(self.model, plan, dict(self.params), dict(self.fixed), inputs)
            except StalePlan:
                if self.chunk < self.size:
                    raise
                plan = make_plan(self.model, self.x, plan.output, anew=True)
                seen = observe(self.model, plan, fast_formats(plan, dict(self.params)), dict(self.fixed), inputs)
        except RuntimeError as error:
            if "dtype" not in str(error) and "same type" not in str(error):
                raise
            raise ValueError(
                "the model's forward makes tensors of a fixed dtype, so it cannot run in "
                f"{str(self.dtype).removeprefix('torch.')}, which this kernel is computed in ({error}); create them with "
                "dtype=x.dtype"
            ) from error
        y = seen.outputs
        if not bool(y.isfinite().all()):
            whole = y.new_zeros(self.size, y.shape[1])  # so that the error names the sample
            whole[which] = y
            check_finite(self.x, whole)
        return y, factors_of(plan, seen, {name: p.shape for name, p in self.params.items()})

    def chunked(self, chunk: int | None) -> "Points":
        """The same in blocks of ``chunk`` samples (None: all at once)."""
        return replace(self, chunk=min(chunk or self.size, self.size))

    def at(self, x, *, whole: bool = True) -> "Points":
        """The same model and state at other points, all at once."""
        return _points(self, x, whole)


def model_points(
    model: nn.Module,
    x,
    *,
    output: Callable | None = None,
    dtype: "torch.dtype | str" = torch.float64,
    whole: bool = True,
) -> Points:
    """The model at ``x``; with ``whole=False`` nothing is run on more than a few samples until blocks are observed.

    Raises what :func:`nt_kernel.capture.plan.make_plan` raises, TypeError for a dtype that is not a
    floating-point one or "model".
    """
    params, fixed = split_state(model)
    dtype = _kernel_dtype(dtype, params)
    params, fixed = (
        {name: t.to(dtype) if t.is_floating_point() else t for name, t in part.items()} for part in (params, fixed)
    )
    blank = Points(model, Plan({}, output=output), 0, params, fixed, (), 0, 1, dtype)
    return _points(blank, x, whole)


def _points(like: Points, x, whole: bool) -> Points:
    N = batch_size(x)
    few = N if whole else min(N, PLAN_SAMPLES)
    plan = make_plan(like.model, x if few == N else select_samples(x, slice(0, few)), like.plan.output)
    params = fast_formats(plan, dict(like.params))
    return replace(like, plan=plan, plan_size=few, params=params, x=as_inputs(x), size=N, chunk=N, memo=None)


def _kernel_dtype(dtype: "torch.dtype | str", params: Mapping[str, Tensor]) -> torch.dtype:
    if dtype == "model":
        found = {p.dtype for p in params.values()}
        if len(found) > 1:
            raise ValueError(
                f"dtype='model', but the parameters are of several, {', '.join(sorted(map(str, found)))}; write the one "
                "to compute in"
            )
        return next(iter(found), torch.float64)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be torch.float64, torch.float32 or 'model', got {dtype!r}")
    return dtype


def plan_for(plan: Plan, made_for: int, n: int) -> Plan:
    """A plan made on ``made_for`` samples, for blocks of ``n``."""
    if n == made_for:
        return plan
    sites = []
    for site in plan.sites:
        shape = list(site.shape)
        shape[site.layout.axis] = shape[site.layout.axis] // made_for * n
        sites.append(replace(site, shape=tuple(shape)))
    return replace(plan, sites=tuple(sites))
