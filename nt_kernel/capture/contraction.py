"""Per-sample Jacobians formed at once from the δ of the calls that are smaller so."""

from collections.abc import Sequence
from math import ceil, prod

from torch import Tensor

from nt_kernel.capture.site import Site

# A product for each sample has as many rows as features, times the outputs taken together. With so few features outputs are
# taken together, to so many rows: twice the rate. More features gain less than gathering the outputs costs.
NARROW, ROWS = 16, 64


class Contraction:
    """Per-sample Jacobians of weight and bias out of the δ of the contracted calls ``sites``."""

    def __init__(self, sites: Sequence[Site], features: dict[int, Tensor], N: int):
        self.N, self.sites, self.wanted = N, {}, {}
        for site in sites:
            if site.contracted:
                self.sites[site.index] = site
                sides = self.wanted.setdefault(site.index, set())  # two sites where weight and bias go separate ways
                sides |= {side for side, name in (("weight", site.weight), ("bias", site.bias)) if name}
        self.inputs = {
            i: site.structure.inputs(site.layout.samples_first(features[i], N, 0), 0, site)
            for i, site in self.sites.items()
        }

    def together(self, index: int) -> int:
        """How many outputs a call is best contracted for at a time."""
        site = self.sites[index]
        if site.structure.parts is None:  # no matrix product
            return 1
        features = site.weight_shape[1 if site.options == ("transposed",) else 0]
        columns = prod(site.weight_shape) // features
        return ceil(ROWS / features) if features <= NARROW <= columns else 1

    def of(self, index: int, delta: Tensor) -> dict[str, Tensor]:
        """{"weight": J, "bias": J}, [N, C, P] each, of one call and its δ [C, …]."""
        site = self.sites[index]
        delta = site.layout.samples_first(delta, self.N, 1).movedim(0, 1)
        both = site.structure.contract(self.inputs[index], site.structure.deltas(delta, 0, site), site)
        return {side: J for side, J in zip(("weight", "bias"), both, strict=True) if side in self.wanted[index]}

    def __call__(self, deltas: dict[int, Tensor]) -> dict[int, dict[str, Tensor]]:
        """The same of all calls, by call; takes the δ it uses out of ``deltas``."""
        return {i: self.of(i, deltas.pop(i)) for i in self.sites}
