"""The examples run, in their reduced form, and find what they say they find."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import contraction, enclosure_cost, gene_regulation, on_average, optimal_masses, own_study, routes
from nt_kernel import layer_factors
from optim.riemannian.module_step import metric_factors

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
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


def drawn(folder: Path, name: str) -> bool:
    return all((folder / f"{name}.{kind}").stat().st_size > 1000 for kind in ("png", "svg", "pdf"))


@pytest.mark.slow
def test_on_average(tmp_path, capsys):
    found = on_average.main(tmp_path, quick=True)
    assert drawn(tmp_path, "on-average")
    for n, rows in found.items():
        assert f"n = {n}: gap" in capsys.readouterr().out or n != min(found)
        trained, predicted = rows["trained"], rows["predicted"]
        assert trained.draws == 3
        assert trained.gap == predicted.gap
        assert predicted.stability.value == pytest.approx(trained.stability.value, rel=1e-2)
        assert rows["predicted, kernel path"].stability.value == pytest.approx(trained.stability.value, rel=0.2)


@pytest.mark.slow
def test_contraction(tmp_path, capsys):
    quadratics, (run,) = contraction.main(tmp_path, quick=True)
    assert drawn(tmp_path, "contraction")
    for q in quadratics.values():
        assert q.norm > 1
        assert q.euclidean.max() > 1.3 * q.euclidean[0]  # no contraction in the Euclidean norm
        assert (q.weighted.diff() < 0).all()
        assert q.rate <= q.fastest.rate <= q.rate + 2e-3
        assert q.metric.gain <= q.fastest.gain * 1.01
    assert run.varying.feasible
    assert (run.measured <= run.enclosure * (1 + 1e-9)).all()
    assert (run.measured <= run.euclidean * (1 + 1e-9)).all()
    for found in (run.shared, run.constant):
        assert found.feasible or found.reason in capsys.readouterr().out or "no contraction metric" in str(found)


@pytest.mark.slow
def test_optimal_masses(tmp_path, capsys):
    frame = optimal_masses.main(tmp_path, quick=True)
    assert drawn(tmp_path, "optimal-masses")
    assert (frame["improvement"] > 1).all()
    assert (frame.query("scale == 'none'").eval("T1_best < T1_equal")).all()
    assert "h/ξ of the recorded run falls" in capsys.readouterr().out


@pytest.mark.slow
def test_routes(tmp_path, capsys):
    found = routes.main(tmp_path, quick=True)
    assert drawn(tmp_path, "routes")
    ridge, fits = found["ridge"]
    for route in ("convex", "kozachkov", "strongly_convex", "smooth"):
        assert (ridge["measured"] <= ridge[route]).all()
    assert fits["measured"].slope < -0.5
    assert found["strong"][0]["kozachkov"].notna().all()
    for key in ("kozachkov", "convex"):
        assert key not in found["useful"][1]
    assert (found["woodbury"][0].eval("T0 >= T1 and T1 >= T2 and T2 >= T3 and T5 >= measured")).all()
    assert "not applicable: one constant metric" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["contraction", "on_average", "optimal_masses", "routes"])
def test_studies_say_how_they_are_called(name):
    module = sys.modules[f"examples.{name}"]
    folder, quick = module.options(module.__doc__, name.replace("_", "-"), ["somewhere", "--quick"])
    assert (folder, quick) == (Path("somewhere"), True)
    assert module.options("", "x", [])[0] == Path("results/x")
    assert f"python -m examples.{name} [FOLDER] [--quick]" in module.__doc__


def test_own_study(tmp_path, capsys):
    own_study.main(tmp_path)
    assert "woodbury" in capsys.readouterr().out
    assert (tmp_path / "results" / "summary.parquet").is_file()
