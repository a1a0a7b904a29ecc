"""κ and L are suprema over both runs, each on S ∪ S': wherever the largest value sits, it is found."""

from types import SimpleNamespace

import pytest
import torch

from stability.constants import gradient_bound, jacobian_bound


def snapshot(place: str):
    """Two twins, n = 3, p = 2; all norms 1, but 5 for twin 0 at ``place``. Row 3 of the S run is not a sample."""
    norms, probes = torch.ones(3, 4), torch.ones(2)
    norms[0, 3] = 99.0  # the S run's filler row must not count
    if place == "S run on S":
        norms[0, 1] = 5.0
    elif place == "S run at z'":
        probes[0] = 5.0
    elif place == "twin on S'":
        norms[1, 2] = 5.0
    elif place == "twin at x_k":
        norms[1, 3] = 5.0
    direction = torch.tensor([0.6, 0.8])
    return SimpleNamespace(
        jacobian_norms=norms,
        probe_norms=probes,
        residuals=norms[..., None] * direction,
        probe_residuals=probes[:, None] * direction,
    )


@pytest.mark.parametrize("bound", [gradient_bound, jacobian_bound])
@pytest.mark.parametrize(
    ("place", "other_twin"), [("S run on S", 5.0), ("S run at z'", 1.0), ("twin on S'", 1.0), ("twin at x_k", 1.0)]
)
def test_the_largest_is_found_wherever_it_sits(bound, place, other_twin):
    assert bound(snapshot(place)).tolist() == pytest.approx([5.0, other_twin])
