"""Twins as ordinary loops, against the stacked twin study, against formulas, and under every optimizer."""

import numpy as np
import pytest
import torch

from nt_kernel.errors import NumericalError
from studies.definition.config import ConfigError, Study
from studies.kinds import loops, twins
from studies.kinds.loops_run import optimizer_of
from studies.kinds.rlo import RLO

GRID = ["n=5", "mass=0.5", "width=6", "seeds=1", "replacements=2", "steps=8", "held_out=20", "hidden=1"]
SAME = [
    "measured_sup",
    "measured_l2",
    "measured_replaced",
    "measured_others",
    "measured_heldout",
    "path_sup",
    "path_l2",
]


def rows(*overrides, study="optimizers", quick=()):
    found = Study.from_toml(study, [*GRID, *overrides])
    return loops.run_point(found, found.points()[0])


@pytest.mark.parametrize("rule", ["woodbury", "sgd"])
def test_loops_and_stacked_twins_are_the_same_runs(rule):
    """Two implementations: torch's loop over one optimizer per twin, and all of them in one stack."""
    stacked = Study.from_toml("digits", [*GRID, f"optimizer={rule}", "lr=0.05", *(["mass=1"] if rule == "sgd" else [])])
    there = twins.run_point(stacked, stacked.points()[0])
    here = rows(f"optimizer={rule}", "lr=0.05")
    for name in [*SAME, "T5", "T5_others", "T4", "train_loss", "final_sup"]:
        np.testing.assert_allclose(here["summary"][name], there["summary"][name], rtol=1e-7, err_msg=name)
    for name in SAME:
        np.testing.assert_allclose(here["trajectories"][name], there["trajectories"][name], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "nesterov", "rlo", "lion", "Adagrad", "LBFGS", "woodbury-momentum"])
def test_what_holds_for_every_optimizer(optimizer):
    tables = rows(f"optimizer={optimizer}", "batch=2" if optimizer != "LBFGS" else "batch=0")
    table = tables["summary"]
    assert (table["T5"] * (1 + 1e-9) >= table["measured_sup"]).all()
    assert (table["path_sup"] * (1 + 1e-9) >= table["measured_sup"]).all()
    assert (table["measured_l2"] >= table["measured_sup"]).all()
    assert (table["null_sup"] < 1e-6 * table["measured_sup"]).all()
    assert (tables["trajectories"].query("step == 0")[["measured_sup", "path_sup"]] == 0).all().all()
    assert (table["gap"] - (table["held_out_loss"] - table["train_loss"]) == 0).all()


def test_twins_share_their_batches_and_are_one_until_the_sample_is_drawn():
    from optim import index_stream
    from studies.kinds.loops_run import BATCHES

    tables = rows("optimizer=gradient-descent", "batch=1", "enclosures=false")
    stream = np.random.SeedSequence(0, spawn_key=(BATCHES,))
    drawn = [int(batch[0]) for batch in index_stream(5, 1, stream, steps=8)]
    for k, series in tables["trajectories"].groupby("replaced"):
        first = drawn.index(k)
        moved = series.sort_values("step")["measured_sup"].to_numpy()
        assert (moved[: first + 1] == 0).all()
        assert moved[first + 1] > 0
    assert "T5" not in tables["summary"]


def test_losses_at_the_end_are_those_of_the_formula():
    tables = rows("loss=cross_entropy", "output_metric=cross_entropy", "lr=0.3", "optimizer=woodbury")
    row = tables["summary"].iloc[0]
    assert 0 < row["train_loss"] < np.log(10)
    assert row["held_out_accuracy"] <= 1
    assert row["uniform_stability"] > 0
    assert row["parameter_distance"] < 1


def test_weight_decay_momentum_and_metric_reach_the_optimizer():
    study = Study.from_toml("optimizers", [*GRID, "momentum=0.5", "weight_decay=0.01", "optimizer=woodbury"])
    made = optimizer_of(study.at(study.points()[0]), 0.25)
    group = made.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.5, 0.01, 0.1)
    adamw = Study.from_toml("optimizers", [*GRID, "optimizer=adamw"])
    group = optimizer_of(adamw.at(adamw.points()[0]), 1.0).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.003, 0.1)


def test_an_output_metric_of_ones_own_is_imported(tmp_path, monkeypatch):
    (tmp_path / "own_metric_module.py").write_text(
        "import torch\ndef doubled(y):\n    return 2 * torch.eye(y.shape[1], dtype=y.dtype).expand(len(y), -1, -1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plain, own = (
        rows("optimizer=woodbury", f"output_metric={name}", "enclosures=false")["summary"]["measured_sup"].to_numpy()
        for name in ("identity", "own_metric_module:doubled")
    )
    assert (plain != own).all()
    study = Study.from_toml("optimizers", [*GRID, "optimizer=woodbury", "output_metric=own_metric_module:absent"])
    with pytest.raises(ValueError, match="output_metric = own_metric_module:absent cannot be imported"):
        optimizer_of(study, 1.0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer=addam", "did you mean adam?"),
        ("loss=square", "did you mean squared?"),
        ("momentum=1", "less than 1"),
        ("batch=-1", "greater than or equal to 0"),
        ("scale=men", "scale = 'men'"),
    ],
)
def test_config_errors(override, words):
    with pytest.raises(ConfigError) as failure:
        Study.from_toml("optimizers", [override])
    assert words in str(failure.value)


def test_arguments_that_an_optimizer_does_not_take_are_found_before_training():
    study = Study.from_toml("optimizers", [*GRID, "optimizers.adam.beta=0.9", "optimizer=adam"])
    with pytest.raises(ValueError, match=r"optimizer adam \(Adam\) does not take .*beta=0\.9"):
        loops.check(study)
    with pytest.raises(ValueError, match="lr = auto is a step of the metric"):
        loops.check(Study.from_toml("optimizers", [*GRID, "optimizer=rprop", "lr=auto"]))
    loops.check(Study.from_toml("optimizers", GRID))


def test_a_table_without_a_class_adds_to_the_preset_of_its_name():
    study = Study.from_toml("optimizers", [*GRID, "optimizers.momentum.nesterov=true", "optimizer=momentum"])
    group = optimizer_of(study.at(study.points()[0]), 1.0).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    with pytest.raises(ConfigError) as failure:
        Study.from_toml("optimizers", [*GRID, "optimizers.momentum.nesterov=true", "optimizer=addam"])
    offered = str(failure.value).partition("should be one of ")[2].partition(", package.module")[0].split(", ")
    assert len(offered) == len(set(offered))
    assert "momentum" in offered


def test_divergence_of_the_training_is_a_numerical_failure():
    with pytest.raises(NumericalError, match="diverged: outputs are no finite numbers after step"):
        rows("optimizer=SGD", "lr=1e200", "enclosures=false")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grid.batch=2,9"], "batch = 9 is more than the n = 5 samples"),
        (
            ["data.name=diabetes", "loss=logistic"],
            r"targets of data.name = diabetes of loss='logistic' must lie in \[0, 1\]",
        ),
        (["data.name=diabetes", "loss=cross_entropy"], "must be distributions"),
    ],
)
def test_what_can_be_known_before_training_is_said_before_it(overrides, words):
    study = Study.from_toml("optimizers", [*GRID, *overrides])
    with pytest.raises(ValueError, match=words):
        loops.check(study)


def test_the_model_of_a_study_is_not_changed_and_runs_repeat_bit_for_bit():
    one, two = (rows("optimizer=adam", "enclosures=false")["summary"] for _ in range(2))
    assert one.equals(two)
    assert torch.get_default_dtype() == torch.float32


MODULE = """
from torch import nn
def net(inputs, outputs, between): return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), between, nn.Linear(6, outputs))
def drop(inputs, outputs): return net(inputs, outputs, nn.Dropout(0.5))
def norm(inputs, outputs): return net(inputs, outputs, nn.BatchNorm1d(6))
"""


@pytest.mark.parametrize("factory", ["drop", "norm"])
def test_networks_that_draw_or_mix_their_samples_in_training_are_well_defined(factory, tmp_path, monkeypatch):
    """Outputs are those in evaluation mode, masks the same for S and its twins, whatever torch drew before."""
    (tmp_path / "layers_in_training.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    own = (f"architecture=layers_in_training:{factory}", "optimizer=gradient-descent", "batch=3")
    tables = []
    for _ in range(2):
        torch.rand(1)
        before = torch.get_rng_state()
        tables.append(rows(*own))
        assert torch.equal(before, torch.get_rng_state())
    assert tables[0]["summary"].equals(tables[1]["summary"])
    table = tables[0]["summary"]
    assert (table["null_sup"] < 1e-6 * table["measured_sup"]).all()
    assert (table["T5"] * (1 + 1e-9) >= table["measured_sup"]).all()
    study = Study.from_toml("rlo-twins", [*GRID, f"architecture=layers_in_training:{factory}", "batch=3", "every=2"])
    one, two = (RLO.run_point(study, study.points()[0])["summary"] for _ in range(2))
    assert one.equals(two)
