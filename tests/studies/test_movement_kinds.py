"""Studies of movements and latent diffusion: points, tables, figures and words, on the smallest settings that can go wrong."""

from dataclasses import replace
from time import process_time

import numpy as np
import pandas as pd
import pytest
import torch

from optim.movements.result import INEQUALITIES
from studies import Study
from studies.experiments import diffusion, movements
from studies.experiments.clock import clock_of
from studies.kinds.diffusion import DIFFUSION
from studies.kinds.movements import MOVEMENTS
from studies.results.frames import Frames
from tests.studies.every_kind import KINDS

TINY = [
    "n=8", "width=6", "steps=2", "iterations=1,3", "seconds=0.01", "deltas=0.5", "most=5", "widths=6",
    "grid.problem=wave", "grid.solver=Gauss–Newton,Adam", "grid.seeds=2",
]  # fmt: skip
TINY_DIFFUSION = ["images=300", "rounds=2", "size=12", "width=8", "latent=2", "iterations=2", "seconds=0.005"]


def frames_of(kind, study):
    tables = {}
    for point in study.points():
        for name, table in kind.run_point(study, point).items():
            tables.setdefault(name, []).append(table)
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    empty = pd.DataFrame()
    summary = joined.pop("summary")
    return Frames(summary, empty, empty, empty, config=study.to_dict(), others=joined)


def test_a_study_of_movements():
    frames = frames_of(MOVEMENTS, Study.from_toml("movements", TINY))
    summary = frames.summary
    assert set(summary["solver"]) == {"Gauss–Newton", "Adam"}
    assert (summary["violated"] == "").all()
    assert (summary["tracking"] <= summary["bound"] * (1 + 1e-9) + 1e-12).all()
    assert len(summary) == 2 * (4 + 3 * 4)
    by_iterations = summary[summary["budget"] == "iterations"]
    assert (by_iterations["iterations"] <= 2 * by_iterations["per_step"]).all()
    best = movements.tuned(summary)
    assert len(best) == 2 * 2 * 4  # one learning rate for each solver and budget, two seeds
    adam = by_iterations[(by_iterations["solver"] == "Adam") & (by_iterations["per_step"] == 3)]
    chosen = best[(best["solver"] == "Adam") & (best["budget"] == "iterations") & (best["per_step"] == 3)]["tracking"]
    assert chosen.mean() == pytest.approx(adam.groupby("lr")["tracking"].mean().min())
    steps = frames.steps
    for left, right in (*INEQUALITIES[:1], *INEQUALITIES[2:4], *INEQUALITIES[7:]):
        assert (steps[left] <= steps[right] * (1 + 1e-9) + 1e-12).all()
    assert (steps["exact_path"] > 0).all()
    runs = frames.sigma.groupby(["seed", "case"], sort=False)
    assert runs["step"].apply(list).tolist() == [[0, 1, 2]] * len(frames.degeneracy)
    assert runs["sigma_min"].min().tolist() == frames.degeneracy["sigma_least"].tolist()
    assert runs["sigma_min"].first().tolist() == frames.degeneracy["sigma_start"].tolist()
    assert runs["displacement"].max().tolist() == frames.degeneracy["displacement"].tolist()
    controls = frames.degeneracy.set_index("case")
    assert (controls.loc["an input twice", "non-degenerate"] == "violated").all()
    assert "4 parameters cannot move 8 outputs" not in controls.loc["width 1", "reason"].iloc[0]
    for section in MOVEMENTS.sections(frames):
        assert section.make().axes
    words = " ".join(MOVEMENTS.finding(frames))
    assert "0 runs violate" in words
    assert "{" not in words
    assert all(len(table) for _, table in MOVEMENTS.numbers(frames))


def test_problems_and_solvers_by_name():
    for name in movements.PROBLEMS:
        model, x, a = movements.problem(name, 9, 4, 3)
        again, y, _ = movements.problem(name, 9, 4, 3)
        assert torch.equal(x, y)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
        assert model(x).shape == a.shape
    with pytest.raises(ValueError, match="unknown problem"):
        movements.problem("waves", 9, 4, 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_problems_stand_where_the_study_says(device):
    for name in movements.PROBLEMS:
        model, x, a = movements.problem(name, 9, 4, 3, dtype="float32", device=device)
        assert {(t.dtype, t.device.type) for t in (x, a, *model.parameters())} == {(torch.float32, device)}


@pytest.mark.slow
def test_both_kinds_in_float32_come_near_float64():
    for name, kind, tiny in (("movements", MOVEMENTS, TINY), ("latent-diffusion", DIFFUSION, TINY_DIFFUSION)):
        study = Study.from_toml(name, [*tiny, "grid.solver=Gauss–Newton", "grid.seeds=1"])
        rough = frames_of(kind, study.model_copy(update={"dtype": "float32"})).summary
        exact = frames_of(kind, study).summary
        column = "tracking" if kind is MOVEMENTS else "loss"
        counted = exact["budget"] == "iterations"
        assert counted.any()
        np.testing.assert_allclose(rough[column][counted], exact[column][counted], rtol=0.02)
        assert (rough[column][counted] != exact[column][counted]).all()  # it did run in the other type


def test_seconds_are_those_of_the_study_s_device(monkeypatch):
    """On a GPU the device's queue is drained before the clock is read."""
    drained = []
    monkeypatch.setattr(torch.cuda, "synchronize", drained.append)
    first, second = clock_of("cuda:1")(), clock_of("cuda:1")()
    assert drained == ["cuda:1", "cuda:1"]
    assert 0 <= second - first < 60
    assert clock_of("cpu") is process_time


@pytest.mark.parametrize(("device", "clock"), [("cpu", "CPU"), ("cuda", "wall")])
def test_the_words_say_which_seconds_they_are(device, clock):
    other = {"CPU": "wall", "wall": "CPU"}[clock]
    told = []
    for name, kind in (("movements", MOVEMENTS), ("diffusion", DIFFUSION)):
        frames = replace(KINDS[name](), config={"device": device})
        told += [section.caption for section in kind.sections(frames)] + kind.finding(frames)
        told += [title for title, _ in kind.numbers(frames)]
        if kind is MOVEMENTS:
            told += [ax.get_xlabel() for ax in kind.sections(frames)[0].make().axes]
    words = " ".join(told)
    assert words.count(f"{clock} seconds") == 5  # two captions, a sentence for each problem, a table
    assert words.count(f"{clock} time") == 2
    assert f"{other} seconds" not in words
    assert f"{other} time" not in words


def test_tuning_by_a_target_prefers_whoever_reaches_it():
    rows = [(0.1, 2, 50, 0.9), (0.2, 6, 400, 0.5), (0.3, 6, 300, 0.7)]
    table = pd.DataFrame(
        [
            {
                "problem": "p",
                "solver": "s",
                "budget": "delta",
                "per_step": 0.1,
                "lr": lr,
                "reached": r,
                "outer_steps": 6,
                "iterations": i,
                "tracking": t,
            }
            for lr, r, i, t in rows
        ]
    )
    assert movements.tuned(table)["lr"].tolist() == [0.3]
    assert movements.tuned(table.assign(budget="iterations"))["lr"].tolist() == [0.2]
    nobody = table.assign(reached=[0, 0, 0])  # then nearest, not soonest at an end
    assert movements.tuned(nobody)["lr"].tolist() == [0.2]
    for lost in (np.inf, np.nan):
        assert movements.tuned(nobody.assign(tracking=[lost, lost, 0.99]))["lr"].tolist() == [0.3]
    two = pd.concat([nobody, nobody.assign(tracking=[0.1, np.nan, 0.1])])  # lost on one of two seeds
    assert movements.tuned(two.iloc[[0, 1, 3, 4]])["lr"].tolist() == [0.1, 0.1]


def test_a_rate_that_diverges_at_once_is_not_the_best(monkeypatch):
    monkeypatch.setitem(movements.RATES, "SGD", (0.03, 30.0))
    found = movements.solver_tables(
        lambda: movements.problem("wave", 8, 8, 0),
        "SGD", iterations=(1,), seconds=(), deltas=(0.01,), most=60, tau=0.5, steps=2,
    )["summary"].assign(problem="wave", solver="SGD", seed=0)  # fmt: skip
    rows = found[found["budget"] == "delta"].set_index("lr")
    assert rows["reached"].tolist() == [0, 0]
    assert rows.loc[30.0, "iterations"] < rows.loc[0.03, "iterations"]
    best = movements.tuned(found)
    assert best[best["budget"] == "delta"]["lr"].tolist() == [0.03]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["n=1"], "n = 1: a problem has at least 2 samples"),
        (["n=1000"], "n = 1000: diabetes has 442 rows"),
        (["n=2"], "agree in a column"),
        (["grid.problem=wave", "grid.n=1,8"], "n = 1: "),
    ],
)
def test_samples_that_a_problem_does_not_have_are_refused_before_anything_runs(changes, text):
    with pytest.raises(ValueError, match=text):
        MOVEMENTS.check(Study.from_toml("movements", changes))
    MOVEMENTS.check(Study.from_toml("movements", ["n=442"]))
    MOVEMENTS.check(Study.from_toml("movements", ["n=1000", "grid.problem=wave"]))


def test_noise_and_sampler_agree_on_a_known_distribution():
    """Latents all equal to c: the exact noise prediction is (z_t − cos·c)/sin, and the sampler lands on c."""
    c = torch.tensor([0.7, -1.2], dtype=torch.float64)

    class Exact(torch.nn.Module):
        def forward(self, x):
            angle = torch.pi / 2 * x[:, 2:3]
            return (x[:, :2] - angle.cos() * c) / angle.sin().clamp_min(1e-12)

    drawn = diffusion.sample(Exact(), c[None], 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, c.expand(5, 2), rtol=0, atol=1e-9)
    z0, t = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)
    noise = torch.randn(4, 2, dtype=torch.float64)
    zt = diffusion.noised(z0, t, noise)
    torch.testing.assert_close(zt[0], z0[0])
    torch.testing.assert_close(zt[3], noise[3])
    x, eps = diffusion.batch(z0, 50, torch.Generator().manual_seed(1))
    assert x.shape == (50, 2 + 1 + 2 * diffusion.FREQUENCIES)
    assert eps.shape == (50, 2)
    assert bool((x[:, 2].diff() > -1 / 50).all())  # stratified


def test_the_autoencoder_reconstructs():
    pixels = torch.from_numpy(np.random.default_rng(0).random((80, 64)))
    pixels = pixels @ torch.linalg.qr(torch.randn(64, 3, dtype=torch.float64)).Q  # three dimensions in 64
    images = pixels @ torch.randn(3, 64, dtype=torch.float64) / 8
    encoder, decoder, latents, about = diffusion.autoencoder(images, 3, 0, steps=300)
    back = decoder(latents * about[1] + about[0])
    torch.testing.assert_close(back, decoder(encoder(images)))
    assert (back - images).square().mean() < 0.2 * (images - images.mean(0)).square().mean()
    torch.testing.assert_close(latents.std(0), torch.ones(3, dtype=torch.float64))


def test_a_study_of_latent_diffusion():
    study = Study.from_toml("latent-diffusion", [*TINY_DIFFUSION, "grid.solver=Gauss–Newton,Adam", "grid.seeds=1"])
    frames = frames_of(DIFFUSION, study)
    assert (frames.rounds["inexactness"] <= 1 + 1e-9).all()  # the best iterate is never farther than the start
    own = frames.rounds[(frames.rounds["budget"] == "iterations")]
    assert (own["iterations"] <= 2).all()
    assert set(frames.samples["source"]) == {"sample", "real", "reconstructed"}
    for section in DIFFUSION.sections(frames):
        assert section.make().axes
    assert "equal iterations" in DIFFUSION.finding(frames)[0]
    assert DIFFUSION.numbers(frames)[0][1]["loss"].notna().all()
    assert all(DIFFUSION.work(study, point) > 0 for point in study.points())
