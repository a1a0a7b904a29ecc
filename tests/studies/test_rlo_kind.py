"""Studies of optimizers and their twins: rules, training under shared batches, divergences, intervals, tuned rates, words."""

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from studies import Study
from studies.definition.config import ConfigError, shipped_studies
from studies.experiments.resnet import resnet18
from studies.experiments.steady_state import recorded_run, twin_tables
from studies.experiments.training import accuracy, evaluated
from studies.figures.rlo import QUANTITIES
from studies.findings.rlo import axes_of, interval, means, per_seed, tuned
from studies.kinds.rlo import RLO, RloStudy, optimizer_of
from studies.results.frames import Frames
from tests.studies.test_movement_kinds import frames_of

F64 = torch.float64


class Drawn:
    """What a point trains on, small."""

    def __init__(self, n=12):
        draw = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).to(F64)
        self.x = torch.randn(n, 3, generator=draw, dtype=F64)
        self.targets = torch.eye(2, dtype=F64)[(self.x[:, 0] > 0).long()]
        self.replaced, self.replacement_rows = [1], [99]
        self.replacement_x, self.replacement_targets = -self.x[1:2], 1 - self.targets[1:2]
        self.held_out = torch.randn(7, 3, generator=draw, dtype=F64)
        self.held_out_targets = torch.eye(2, dtype=F64)[(self.held_out[:, 0] > 0).long()]


OPTIONS = {"loss": "cross_entropy", "batch": 4, "steps": 30, "every": 5, "seed": 3}


RULES = ("rlo", "rlo-lambda", "rlo-lifted", "sgd", "momentum", "adam", "adamw", "lion", "woodbury", "NAdam", "LBFGS")


def made_by(name, lr, loss="cross_entropy", model=None, **rule):
    """The optimizer of a study's rule."""
    study = RloStudy(title="t", question="q", grid={"n": 12}, lr=lr, loss=loss, rule={"name": name, "eta": 0.5, **rule})
    make = lambda model: optimizer_of(study, 1.0, model)  # noqa: E731
    return make if model is None else make(model)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(rule, loss):
    drawn = Drawn()
    lr = {"sgd": 0.5, "momentum": 0.1, "woodbury": 0.1}.get(rule, 0.01)
    rows, seen, _ = recorded_run(
        deepcopy(drawn.model),
        (drawn.x, drawn.targets),
        {"train": drawn.x},
        made_by(rule, lr, loss),
        **{**OPTIONS, "loss": loss},
    )
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20, 25, 30]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert len(seen) == len(rows)


def test_a_rule_is_a_class_with_the_arguments_of_the_study():
    model = Drawn().model
    group = made_by("lion", 0.1, model=model, direction="tanh", memory="adam", normalize=True).param_groups[0]
    assert (group["memory"], group["direction"], group["normalize"], group["eta"]) == ("lion", "sign", False, 1.0)
    group = made_by("rlo-lifted", 0.1, model=model, direction="sign", scale=3.0, weight_decay=0.5).param_groups[0]
    assert (group["direction"], group["scale"], group["eta"], group["weight_decay"]) == ("sign", 3.0, 0.5, 0.5)
    assert made_by("momentum", 0.1, model=model).param_groups[0]["momentum"] == 0.9
    assert made_by("adamw", 0.1, model=model).param_groups[0]["weight_decay"] == 0.01  # torch's own
    assert made_by("adamw", 0.1, model=model, weight_decay=0.0).param_groups[0]["weight_decay"] == 0.0
    made = made_by("woodbury", 0.1, "squared", model)
    assert (made.param_groups[0]["lr"], made.param_groups[0]["mass"]) == (0.1, 1.0)
    with pytest.raises(ConfigError, match=r"adamm.*did you mean adam"):
        Study.from_toml("rlo-twins", ["rule.name=adamm"])
    with pytest.raises(ValueError, match=r"optimizer Rprop \(Rprop\) does not take .*weight_decay=0\.5"):
        made_by("Rprop", 0.1, model=model, weight_decay=0.5)


def test_the_numbers_of_a_pair_are_their_definitions():
    drawn = Drawn()
    make = made_by("rlo-lifted", 0.02, eta=0.25)
    tables = twin_tables(drawn, make, level=0.6, **OPTIONS)
    (pair,) = tables["summary"].to_dict("records")
    other_x, other_a = drawn.x.clone(), drawn.targets.clone()
    other_x[1], other_a[1] = drawn.replacement_x[0], drawn.replacement_targets[0]
    runs = [
        recorded_run(deepcopy(drawn.model), data, {"x": drawn.x, "out": drawn.held_out}, make, **OPTIONS)
        for data in ((drawn.x, drawn.targets), (other_x, other_a))
    ]
    gaps = [(a["x"] - b["x"]).norm(dim=1) for a, b in zip(runs[0][1], runs[1][1], strict=True)]
    keep = [i for i in range(12) if i != 1]
    assert pair["sup"] == pytest.approx(max(g[keep].max().item() for g in gaps))
    assert pair["sup_final"] == pytest.approx(gaps[-1][keep].max().item())
    assert pair["replaced_sup"] == pytest.approx(max(g[1].item() for g in gaps))
    held = [(a["out"] - b["out"]).norm(dim=1).max().item() for a, b in zip(runs[0][1], runs[1][1], strict=True)]
    assert pair["held_out_sup"] == pytest.approx(max(held))
    losses = [row["loss"] for row in runs[0][0]]
    assert pair["loss_tail"] == pytest.approx(np.mean(losses[-1:]))
    first = next(i for i, value in enumerate(losses) if value <= 0.6)
    assert pair["sup_at_level"] == pytest.approx(gaps[first][keep].max().item())
    assert pair["steps_to_level"] == 5 * first
    assert pair["factor"] == pytest.approx(0.75, abs=1e-10)  # 1 − η, found from the run
    summary, empty = pd.DataFrame([pair | {"n": 12, "width": 6, "mass": 1.0, "seed": 0}]), pd.DataFrame()
    table = means(Frames(summary, empty, empty, empty, config={"grid": {"n": [12]}}))
    assert table["factor"].tolist() == [pair["factor"]]
    assert table["forcing"].tolist() == [pair["forcing"]] != [0.0]
    assert pair["thickness"] > 0
    assert pair["held_out"] == accuracy(runs[0][1][-1]["out"], drawn.held_out_targets)


def test_equal_twins_do_not_diverge():
    drawn = Drawn()
    drawn.replacement_x, drawn.replacement_targets = drawn.x[1:2], drawn.targets[1:2]
    make = made_by("adam", 0.02, "squared")
    pair = twin_tables(drawn, make, level=0.1, **{**OPTIONS, "loss": "squared"})["summary"].iloc[0]
    assert pair["sup"] == pair["held_out_sup"] == pair["replaced_sup"] == 0


def test_a_run_that_explodes_says_so():
    drawn = Drawn()
    # every held-out point is of one class: the last finite outputs may be right or wrong about all, never about half
    drawn.held_out_targets = drawn.held_out_targets[:1].expand_as(drawn.held_out_targets)
    drawn.held_out = drawn.held_out[:1].expand_as(drawn.held_out)
    make = made_by("sgd", 1e200, "squared")
    tables = twin_tables(drawn, make, level=0.1, **{**OPTIONS, "loss": "squared"})
    assert tables["summary"]["diverged"].all()
    assert tables["trajectories"]["loss"].iloc[-1] == math.inf
    assert (tables["summary"][["accuracy", "held_out"]] == 0.5).all().all()  # chance, of two classes
    assert np.isfinite(tables["summary"]["sup"]).all()


def test_a_twin_that_explodes_alone_leaves_the_run_its_loss_and_the_pair_no_distance():
    drawn = Drawn()
    drawn.replacement_targets = drawn.replacement_targets * 1e308
    tables = twin_tables(drawn, made_by("sgd", 0.02, "squared"), level=0.1, **{**OPTIONS, "loss": "squared"})
    (pair,) = tables["summary"].to_dict("records")
    lost = tables["trajectories"].groupby("replaced")["diverged"].last()
    assert lost.to_dict() == {-1: False, 1: True}
    assert (pair["diverged"], pair["twin_diverged"]) == (False, True)
    row = per_seed(tables["summary"].assign(seed=0, lr=0.02), ["lr"]).iloc[0]
    assert row["loss_tail"] == pair["loss_tail"] < math.inf
    assert row[["sup", "held_out_sup", "sup_at_level"]].isna().all()


def test_evaluation_does_not_train_the_statistics():
    model = resnet18((3, 8, 8), 4, width=2)
    before = deepcopy(model.state_dict())
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(evaluated(model, x, rows=2), evaluated(model, x))
    assert model.training
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert resnet18(3 * 64, 4, width=2)(x.flatten(1)).shape == (5, 4)
    with pytest.raises(ValueError, match="square"):
        resnet18(100, 4)
    assert sum(p.numel() for p in resnet18((3, 32, 32), 10).parameters()) == 11_173_962  # He et al. on CIFAR


def test_a_study_and_its_words():
    overrides = ["n=20", "width=4", "steps=6", "every=2", "grid.seeds=2", "grid.lr=[0.01, 0.03]", "data.held_out=30"]
    study = Study.from_toml("rlo-directions", overrides)
    frames = frames_of(RLO, study)
    assert len(frames.summary) == 4 * 2 * 2
    assert axes_of(frames) == ["rule.direction", "rule.normalize", "lr"]
    table = means(frames)
    assert len(table) == 8
    own = frames.summary[
        (frames.summary["rule.direction"] == "sign")
        & ~frames.summary["rule.normalize"]
        & (frames.summary["lr"] == 0.01)
    ]
    row = table[(table["rule.direction"] == "sign") & ~table["rule.normalize"] & (table["lr"] == 0.01)].iloc[0]
    assert row["loss_tail"] == pytest.approx(own["loss_tail"].mean())
    assert row["loss_tail ±"] == pytest.approx(
        12.706 * own["loss_tail"].std(ddof=1) / 2**0.5, rel=1e-3
    )  # t of 1 degree
    (section,) = RLO.sections(frames)
    assert len(section.make().axes) == 4
    words = RLO.finding(frames)
    assert words[0].startswith(("Least steady-state loss: sign, ", "Least steady-state loss: tanh, "))
    assert len(RLO.numbers(frames)) == 2


def test_a_study_without_a_number_on_its_axes():
    overrides = ["n=20", "width=4", "steps=4", "every=2", "grid.seeds=2", "grid.lr=[0.01, 0.03]", "data.held_out=30"]
    overrides += ['grid.rule.name=["sgd", "adam"]', 'grid.model.architecture=["mlp", "cnn"]']
    study = Study.from_toml("rlo-twins", overrides)
    frames = frames_of(RLO, study)
    (section,) = RLO.sections(frames)
    figure = section.make()
    named = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert named == {"mlp, sgd", "mlp, adam", "cnn, sgd", "cnn, adam"}


def test_means_leave_diverged_runs_out_and_tuning_avoids_them():
    rows = [
        {"lr": lr, "seed": seed, "replaced": 0, "replacement": 0, "loss_tail": loss, "diverged": lost}
        for lr, seed, loss, lost in [
            (0.1, 0, 1.0, False),
            (0.1, 1, 3.0, False),
            (1.0, 0, 0.1, False),
            (1.0, 1, math.inf, True),
        ]
    ]
    summary = pd.DataFrame(rows).assign(
        held_out=0.5,
        thickness=1.0,
        alignment=1.0,
        sup=1.0,
        held_out_sup=1.0,
        sup_at_level=1.0,
        n=5,
        width=4,
        mass=1.0,
        twin_diverged=False,
    )
    empty = pd.DataFrame()
    frames = Frames(summary, empty, empty, empty, config={"grid": {"lr": [0.1, 1.0]}})
    table = per_seed(summary, ["lr"])
    assert table["loss_tail"].isna().sum() == 1
    assert means(frames)["loss_tail"].tolist() == [2.0, pytest.approx(0.1)]
    assert tuned(frames).summary["lr"].unique().tolist() == [0.1]
    assert math.isnan(interval(np.array([1.0])))


def made_up(rates, level=None):
    """Frames of three rules and two seeds, one twin each: ``rates`` {rule: {lr: loss}}, ``level`` {rule: of both seeds}."""
    rows = []
    for i, (rule, losses) in enumerate(rates.items()):
        for (lr, loss), seed in [(pair, seed) for pair in losses.items() for seed in (0, 1)]:
            at_level = (level or {}).get(rule, (0.3 + i, 0.4 + i))[seed]
            row = {"rule.name": rule, "lr": lr, "seed": seed, "loss_tail": loss, "sup_at_level": at_level}
            row |= {"replaced": 0, "replacement": 9, "diverged": False, "twin_diverged": False}
            rows.append(row | {"n": 5, "width": 4, "mass": 1.0})
    summary = pd.DataFrame(rows).assign(held_out=0.5, thickness=1.0, alignment=1.0, sup=1.0, held_out_sup=1.0)
    empty, grid = pd.DataFrame(), {"lr": sorted({lr for losses in rates.values() for lr in losses})}
    return Frames(summary, empty, empty, empty, config={"grid": grid | {"rule.name": list(rates)}})


INSIDE = {0.1: 2.0, 1.0: 1.0, 10.0: 2.0}


def test_equal_loss_ranks_those_who_reached_it_with_every_seed():
    """sgd would win with the one seed that reached the level."""
    rates = {rule: INSIDE for rule in ("sgd", "adam", "lion")}
    frames = made_up(rates, {"sgd": (0.01, math.nan)})
    table = means(tuned(frames)).set_index("rule.name")
    assert table["reached"].to_dict() == {"sgd": 1, "adam": 2, "lion": 2}
    assert table["sup_at_level"].to_dict() == pytest.approx({"sgd": 0.01, "adam": 1.35, "lion": 2.35})
    (words,) = [line for line in RLO.finding(frames) if "equal training loss" in line]
    assert words.startswith("Most stable at equal training loss: adam, 1.35 ")
    assert words.endswith("; 1 of 3 settings left out, not all of whose seeds reached it.")
    (words,) = [line for line in RLO.finding(made_up(rates)) if "equal training loss" in line]
    assert words.startswith("Most stable at equal training loss: sgd, 0.35 ")
    assert "left out" not in words


def test_a_setting_of_which_a_run_diverged_is_not_the_most_stable():
    frames = made_up({rule: INSIDE for rule in ("sgd", "adam", "lion")})
    frames.summary["held_out_sup"] = frames.summary["rule.name"].map({"sgd": 0.1, "adam": 0.2, "lion": 0.3})
    lucky = (frames.summary["rule.name"] == "sgd") & (frames.summary["seed"] == 1)
    frames.summary.loc[lucky, "twin_diverged"] = True
    assert "Twins that diverged: sgd (50%)." in RLO.finding(frames)
    assert not [line for line in RLO.finding(frames) if "Runs that diverged" in line]
    assert tuned(frames).summary["lr"].unique().tolist() == [1.0]  # the least loss, whatever its twins do
    (words,) = [line for line in RLO.finding(frames) if "held-out points" in line]
    assert words.startswith("Most stable on held-out points (least largest twin divergence): adam, 0.2 ")
    assert words.endswith("; 1 of 3 settings left out, with runs that diverged.")


def test_one_seed_has_no_interval_to_be_apart():
    frames = made_up({rule: INSIDE for rule in ("sgd", "adam")})
    frames.summary["held_out_sup"] = frames.summary["rule.name"].map({"sgd": 0.1, "adam": 0.2})
    alone = replace(frames, summary=frames.summary[frames.summary["seed"] == 0])
    (words,) = [line for line in RLO.finding(alone) if "held-out points" in line]
    assert words.endswith(": sgd, 0.1; next adam, 0.2 (no interval from one seed).")
    (words,) = [line for line in RLO.finding(frames) if "held-out points" in line]
    assert words.endswith(": sgd, 0.1 ± 0; next adam, 0.2 ± 0 (intervals apart).")
    (section,) = RLO.sections(alone)
    assert "Means over 1 seed, no intervals" in section.caption
    section.make().draw_without_rendering()


@pytest.mark.parametrize("along", ["lr", "width"])
def test_the_caption_is_of_what_is_drawn(along):
    frames = made_up({"sgd": INSIDE})
    if along == "width":
        wide = frames.summary.assign(width=8)
        frames = replace(frames, summary=pd.concat([frames.summary, wide], ignore_index=True))
    (section,) = RLO.sections(frames)
    labels = " ".join(ax.get_ylabel() for ax in section.make().axes if ax.get_visible())
    for title, *_ in QUANTITIES.values():
        assert (title in section.caption) == (title in labels)
    assert ("at its best learning rate" in section.caption) == (along == "width")


def test_equal_loss_without_a_ranking():
    rates = {rule: INSIDE for rule in ("sgd", "adam", "lion")}
    nobody = made_up(rates, {rule: (math.nan, 0.1) for rule in ("sgd", "adam")})
    assert (
        "Most stable at equal training loss: no ranking; 2 of 3 settings left out, not all of whose seeds reached it."
        in RLO.finding(nobody)
    )
    assert all("reached" in shown for _, shown in RLO.numbers(nobody))


def test_a_tuned_rate_at_the_edge_is_said():
    frames = made_up({"sgd": {0.1: 2.0, 1.0: 1.5, 10.0: 1.0}, "adam": INSIDE, "lion": {0.1: 0.5, 1.0: 1.0, 10.0: 2.0}})
    assert "At the edge of the learning rates tried: sgd (10); lion (0.1)." in RLO.finding(frames)
    assert "edge" not in " ".join(RLO.finding(made_up({rule: INSIDE for rule in ("sgd", "adam", "lion")})))
    alone = made_up({"sgd": {0.1: 1.0, 1.0: 2.0}})
    assert RLO.finding(alone)[-1] == "At the edge of the learning rates tried: 0.1."
    assert len(RLO.finding(made_up({"sgd": INSIDE}))) == 1
    one_rate = made_up({rule: {1.0: 1.0} for rule in ("sgd", "adam")})
    assert "edge" not in " ".join(RLO.finding(one_rate))


@pytest.mark.parametrize(
    "name", [name for name in shipped_studies() if name.startswith(("rlo", "movements", "latent"))]
)
def test_shipped_studies_are_whole(name):
    """They parse, and so do their quick versions; the digits they need are there before anything is trained."""
    for quick in (False, True):
        study = Study.from_toml(name, quick=quick)
        assert study.points()
        assert all(study.kind_object.work(study, point) > 0 for point in study.points()[:3])
        if name != "rlo-cifar10" or quick:
            study.kind_object.check(study)


@pytest.mark.parametrize("name", [name for name in shipped_studies() if name.startswith("rlo")])
def test_no_shipped_study_repeats_a_run(name):
    """An axis that some of the rules do not read would train them again and again."""
    study = Study.from_toml(name)
    told = [
        (str([(axis, value) for axis, value in point.values if not axis.startswith("rule.")]), made.__class__, settings)
        for point in study.points()
        for made in [optimizer_of(study.at(point), point.mass, torch.nn.Linear(2, 2))]
        for settings in [str([(k, v) for k, v in made.param_groups[0].items() if k != "params"])]
    ]
    assert len(told) == len(set(told))


@pytest.mark.parametrize(
    ("study", "override", "words"),
    [
        ("rlo-eta", "rule.eta=1.5", "less than or equal to 1"),
        ("rlo-eta", "rule.eta=0", "greater than 0"),
        ("rlo-eta", "grid.rule.eta=[0.1, 2.0]", "less than or equal to 1"),
        ("rlo-twins", "rule.memory=lions", "did you mean lion"),
        ("rlo-twins", "rule.direction=tan", "did you mean tanh"),
        ("rlo-twins", "rule.scale=0", "greater than 0"),
        ("rlo-twins", "lr=0", "greater than 0"),
        ("movements", "tau=0", "greater than 0"),
        ("movements", "tau=-1.0", "greater than 0"),
        ("movements", "steps=0", "greater than or equal to 1"),
        ("latent-diffusion", "tau=0", "greater than 0"),
    ],
)
def test_what_no_study_may_ask_for(study, override, words):
    with pytest.raises(ConfigError, match=words):
        Study.from_toml(study, [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.name=diabetes"], "data.name = diabetes has numbers as targets; kind = rlo needs classes"),
        (['grid.data.name=["digits", "diabetes"]', "width=4"], "data.name = diabetes has numbers"),
        (["rule.name=nosuchmod:Opt"], "optimizer = nosuchmod:Opt cannot be imported"),
        (['grid.rule.name=["rlo", "torch.optim:Absent"]'], "torch.optim:Absent cannot be imported"),
        (["rule.name=Rprop", "rule.weight_decay=0.5"], "does not take .*weight_decay=0.5"),
        (["rule.name=rlo-lifted"], "RLOLifted needs an eta below 1"),
        (["rule.name=rlo-lambda"], "rule.eta = 0.02 is an axis, but rlo-lambda is η = 1"),
    ],
)
def test_what_cannot_be_is_found_before_training(overrides, words):
    study = Study.from_toml("rlo-eta", ["data.held_out=50", *overrides])
    with pytest.raises(ValueError, match=words):
        RLO.check(study)


def test_a_check_takes_what_can_be():
    RLO.check(Study.from_toml("rlo-eta", ["rule.name=rlo-lambda", "grid.rule.eta=[1.0]", "data.held_out=50"]))
    RLO.check(Study.from_toml("rlo-twins", ["loss=squared", "data.held_out=50", "dtype=float64"]))
