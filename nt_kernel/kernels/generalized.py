"""How the generalized kernel comes about: Gram matrices between the point sets, then the inner system of every block."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nt_kernel.factors import Factor
from nt_kernel.kernels.empirical import footprint
from nt_kernel.kernels.live_bytes import LiveBytes
from nt_kernel.kernels.peak import Forecast, Passage, Watched
from nt_kernel.kernels.points import Points, model_points
from nt_kernel.kernels.sweep import FULL, SAMPLES, Wanted, sweep
from nt_kernel.mass import Mass
from nt_kernel.metric.inner import InnerSystem
from nt_kernel.metric.layer_metric import model_mass, resolve_blocks, scale_factor
from nt_kernel.metric.mean_jacobian import MeanJacobianSystem
from nt_kernel.metric.output_metric import NAMED, OutputMetric

Pair = tuple[str, str]  # of point sets, named "S" (the metric's), "A" (rows), "B" (columns)


def point_sets(
    model: nn.Module,
    x,
    x1=None,
    x2=None,
    *,
    output: Callable | None = None,
    dtype: "torch.dtype | str" = torch.float64,
    whole: bool = True,
) -> dict[str, Points]:
    """The points of the metric "S", the rows "A" (default S) and the columns "B" (default A); equal ones are one object.

    ``whole`` ones are observed once, however many kernels they enter.
    """
    S = model_points(model, x, output=output, dtype=dtype, whole=whole)
    S = replace(S, memo={}) if whole and not (x1 is None and x2 is None) else S

    def at(points) -> Points:
        found = S.at(points, whole=whole)
        return replace(found, memo={}) if whole else found

    A = S if x1 is None or x1 is x else at(x1)
    B = A if x2 is None or x2 is x1 else S if x2 is x else at(x2)
    return {"S": S, "A": A, "B": B}


@dataclass(frozen=True)
class GeneralizedTask:
    """Point sets (equal ones are the same object), and the metric built on ``sets["S"]``."""

    sets: Mapping[str, Points]
    mass: Mass
    metric: OutputMetric
    scale: str
    blocks: str
    check: tuple[int, int] = (0, 0)  # bytes that planning took, and left behind

    @classmethod
    def of(cls, model: nn.Module, x, x1, x2, *, output: Callable | None, whole: bool, **rest) -> "GeneralizedTask":
        if whole:
            return cls(point_sets(model, x, x1, x2, output=output), **rest)
        if rest["scale"] == "mean-jacobian":
            raise ValueError(
                "scale='mean-jacobian' sees all samples of the metric at once; leave chunk_size and memory_limit out"
            )
        with LiveBytes() as seen:
            found = point_sets(model, x, x1, x2, output=output, whole=False)
            check = seen.peak, seen.live
        return cls(found, **rest, check=check)

    @property
    def symmetric(self) -> bool:
        """The rows are the columns."""
        return self.sets["A"] is self.sets["B"]

    def chunked(self, chunk: int) -> "GeneralizedTask":
        """The same in blocks of ``chunk`` samples."""
        once = {id(p): p.chunked(chunk) for p in self.sets.values()}
        return replace(self, sets={name: once[id(p)] for name, p in self.sets.items()})

    def pairs(self) -> list[Pair]:
        """The Gram matrices that are needed, each once: SS, then whichever of AS, SB, AB is not one of the others."""
        found: list[Pair] = []
        for pair in (("S", "S"), ("A", "S"), ("S", "B"), ("A", "B")):
            if self._among(pair, found) is None:
                found.append(pair)
        return found

    def _among(self, pair: Pair, found) -> tuple[Pair, bool] | None:
        """Which of ``found`` is this one, and whether it is its transpose."""
        rows, columns = (self.sets[name] for name in pair)
        for other in found:
            a, b = (self.sets[name] for name in other)
            if (a is rows and b is columns) or (a is columns and b is rows):
                return other, a is not rows
        return None

    def gram(self, grams: Mapping[Pair, Mapping[str, Tensor]], pair: Pair, block: str) -> Tensor:
        """K of a block between two sets, as a matrix."""
        found, transposed = self._among(pair, grams)
        K = grams[found][block]
        K = K.flatten(0, 1).flatten(1) if K.dim() == 4 else K
        return K.mT if transposed else K

    def wanted(self, factors: Mapping[str, Factor]) -> Wanted:
        """Gram matrices of the blocks; those of output layers over samples, where the metric is the identity."""
        masses = model_mass(factors, self.mass)
        blocks = resolve_blocks(factors, self.blocks)
        plain = self.scale == "none" or is_identity(self.metric)
        return Wanted(
            {name: (name,) if self.blocks == "layer" else tuple(factors) for name in blocks},
            {name: SAMPLES if plain and f.decouples(_of(f, masses)) else FULL for name, f in blocks.items()},
            masses,
        )

    def forecast(self, chunk: int) -> Forecast:
        """For blocks of up to ``chunk`` samples."""
        watched = {id(p): Watched.of(p, chunk) for p in self.sets.values()}
        sides = {name: watched[id(p)] for name, p in self.sets.items()}
        job = self.wanted(sides["S"].few.factors)
        passages = [Passage(sides[a], None if sides[a] is sides[b] else sides[b], job) for a, b in self.pairs()]
        n, a, b = (self.sets[name].size for name in "SAB")
        y = sides["S"].few.y
        size = y.shape[1] ** 2 * y.element_size()
        kernel = a * b * size
        within = (7 * n * n if len(passages) == 1 else 3 * n * n + 4 * n * (a + b) + 3 * a * b) * size
        alive = held = sum(p.result() for p in passages)
        most = 0
        for done, name in enumerate(job.layers):  # Gram matrices make way for kernels, one block after the other
            most = max(most, alive + done * kernel + within)
            alive -= sum(replace(p, job=job.only(name)).result() for p in passages)
        returned = (len(job.layers) + (len(job.layers) > 1)) * kernel
        most = max(most, returned)
        return Forecast(tuple(passages), *footprint(self.check, *watched.values()), max(0, most - held), returned)


def is_identity(metric: OutputMetric) -> bool:
    """True for the metrics by name that are M = I.

    >>> is_identity(NAMED["squared"]), is_identity(NAMED["cross_entropy"])
    (True, False)
    """
    return any(metric is named and named.factor(torch.zeros(1, 2)) is None for named in NAMED.values())


def _of(factor: Factor, masses: Mapping) -> dict:
    return {name: masses[name] for name in factor.shapes}


def kernel_layers(task: GeneralizedTask) -> tuple[Tensor, dict[str, Tensor], float]:
    """Outputs [n, C] at the points of the metric; H_α = (1/n) J_A G_α⁻¹J_Bᵀ [AC, BC]; the size whose rounding they carry."""
    if task.scale == "mean-jacobian":
        return _by_mean_jacobian(task)
    y, grams = None, {}
    for a, b in task.pairs():
        A, B = task.sets[a], task.sets[b]
        outputs, grams[a, b] = sweep(A, None if A is B else B, task.wanted)
        y = outputs if y is None else y
    n, C = y.shape
    c = scale_factor(task.scale, n)
    layers, size = {}, 0.0
    for name, gram in list(grams["S", "S"].items()):
        K = {pair: task.gram(grams, pair, name) for pair in (("S", "S"), ("A", "S"), ("S", "B"), ("A", "B"))}
        decoupled = gram.dim() == 2  # over samples
        inner = InnerSystem(K["S", "S"], C, c, task.metric, y, decoupled=decoupled, where=f"layer {name!r}")
        if len(grams) == 1:
            R, scale = inner.self_kernel(), inner.error_scale(n)
        else:
            R, scale = between(inner, K["A", "S"].mT, K["S", "B"], K["A", "B"], task.symmetric)
            scale /= n
        layers[name] = inner.expand(R).div_(n)
        size += scale
        del gram, inner, K, R  # before the next ones are made
        for found in grams.values():
            del found[name]
    return y, layers, size


def between(inner: InnerSystem, K_SA: Tensor, K_SB: Tensor, K_AB: Tensor, symmetric: bool) -> tuple[Tensor, float]:
    """R = K_AB − c·K_AS L_yᵀS⁻¹L_y K_SB as K_AB − c·XᵀY, X = chol⁻¹L_y K_SA, and the size whose rounding it carries.

    That is ‖K_AB‖, and c‖X‖‖Y‖ (for A = B c‖XᵀX‖) times the condition of S, at most 1 + c‖L_y K_SS L_yᵀ‖.
    """
    if inner.c == 0:
        return K_AB.clone(), K_AB.norm().item()
    X = torch.linalg.solve_triangular(inner.chol, inner.weigh(K_SA), upper=False)
    Y = X if symmetric else torch.linalg.solve_triangular(inner.chol, inner.weigh(K_SB), upper=False)
    correction = (X.mT @ Y).mul_(inner.c)
    share = correction.norm().item() if symmetric else inner.c * X.norm().item() * Y.norm().item()
    condition = 1 + inner.c * inner.weigh(inner.weigh(inner.gram).mT).norm().item()
    return K_AB - correction, K_AB.norm().item() + condition * share


def _by_mean_jacobian(task: GeneralizedTask) -> tuple[Tensor, dict[str, Tensor], float]:
    S, A, B = (task.sets[name] for name in "SAB")
    once = {id(p): p.observed(slice(0, p.size)) for p in (S, A, B)}
    y, factors = once[id(S)]
    blocks = {key: resolve_blocks(seen, task.blocks) for key, (_, seen) in once.items()}
    masses = model_mass(factors, task.mass)
    n = len(y)
    layers, size = {}, 0.0
    for name, factor in blocks[id(S)].items():
        system = MeanJacobianSystem(factor, n, _of(factor, masses), task.metric, y)
        size += system.error_scale(n)
        if A is S and B is S:
            layers[name] = system.self_kernel().div_(n)
        else:
            layers[name] = system.kernel(blocks[id(A)][name], blocks[id(B)][name]).div_(n)
            size += layers[name].norm().item()
    return y, layers, size
