"""The examples run, in their reduced form, and find what they say they find."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import enclosure_cost, gene_regulation
from nt_kernel import layer_factors
from optim.module_step import metric_factors

ROOT = Path(__file__).resolve().parent.parent


def test_gene_regulation(capsys, tmp_path):
    state = torch.get_rng_state()
    best = {run["name"]: run for run in gene_regulation.main(quick=True, figure=tmp_path / "genes.png")}
    assert torch.equal(torch.get_rng_state(), state)
    printed = capsys.readouterr().out
    for name, run in best.items():
        assert name in printed
        assert run["risks"][-1] < run["risks"][0] / 2
    for name in ("Woodbury, block per module", "Woodbury, one block"):
        assert best[name]["risks"][-1] < 0.5 * min(best[other]["risks"][-1] for other in ("Adam", "SGD"))
    assert (tmp_path / "genes.png").read_bytes().startswith(b"\x89PNG")


def test_the_gene_network_by_both_routes():
    """The recursion through ODE and readout, and nt_kernel on the torch module: 𝒦_u = 𝒦_p·∂p/∂u = 𝒦_p·p for the rates."""
    module = gene_regulation.system([0.0, 1.0, 2.0], 0.25)
    point, x = gene_regulation.truth(), torch.full((2, 3), 0.7, dtype=torch.float64) + 0.1 * torch.eye(2, 3)
    K, factors = metric_factors(module, x, point), layer_factors(module.as_torch(point), x)[1]
    assert list(K) == list(factors) == ["genes", "readout"]
    rates = torch.cat([point[name] for name in module.blocks["genes"]])
    assert torch.allclose(K["genes"] * rates, factors["genes"].dense(), rtol=1e-10, atol=1e-12)
    assert torch.allclose(K["readout"], factors["readout"].dense(), rtol=1e-10, atol=1e-12)
    assert not hasattr(module.as_torch(point), "rates")


def test_the_true_rates_are_at_distance_zero():
    point = gene_regulation.truth()
    assert gene_regulation.rate_error(point) == 0
    doubled = {n: 2 * p for n, p in point.items()}
    assert gene_regulation.rate_error(doubled) == pytest.approx(math.log(2))


def test_the_integrator_is_as_good_as_it_says():
    x = torch.tensor([[0.5, 2.0, 1.0]], dtype=torch.float64)
    coarse, fine = (gene_regulation.integration_error([0.0, 2.0, 4.0], h, x) for h in (0.2, 0.1))
    assert fine < 1e-5
    assert 8 < coarse / fine < 32


def test_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "examples.gene_regulation", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--figure" in done.stdout


def test_enclosure_cost_compares_like_with_like():
    for name in enclosure_cost.OPTIMIZERS:
        found = enclosure_cost.cost(name, samples=3, steps=3)
        assert found["gap"] < 1e-8
        assert found["matrices"] > 0 < found["products"]
