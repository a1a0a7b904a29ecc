"""Axes of a grid: any key of a study by its path."""

import pickle

import pytest

from studies.definition.config import ConfigError, Study
from studies.definition.points import written

BASE = ["n=6", "mass=1", "width=8", "seeds=2"]


def test_any_key_can_be_an_axis_and_points_take_its_values():
    study = Study.from_toml("digits", [*BASE, "grid.lr=0.1,0.2", "grid.model.activation=tanh,relu"])
    assert study.axes() == {
        "n": [6],
        "width": [8],
        "mass": [1.0],
        "lr": [0.1, 0.2],
        "model.activation": ["tanh", "relu"],
    }
    points = study.points()
    assert len(points) == len({point.key for point in points}) == 2 * 2 * 2
    assert [point.seed for point in points[:2]] == [0, 1]  # the seed is the fastest
    at = study.at(points[-1])
    assert (at.lr, at.model.activation, at.model.hidden) == (0.2, "relu", 2)
    assert str(points[-1]) == "n=6, width=8, mass=1, lr=0.2, model.activation=relu, seed=1"
    assert points[-1].key.startswith("n6-width8-mass1-lr0.2-activationrelu-seed1-")
    assert pickle.loads(pickle.dumps(points[-1])) == points[-1]


def test_an_axis_is_written_in_any_of_three_ways(tmp_path):
    text = "[grid]\nn = 6\nmass = 1\n{}\n"
    same = []
    for axis in ('"model.hidden" = [1, 2]', "model.hidden = [1, 2]", "hidden = [1, 2]"):
        (tmp_path / "study.toml").write_text(text.format(axis))
        same.append(Study.from_toml(tmp_path / "study.toml"))
    assert same[0] == same[1] == same[2]
    (tmp_path / "again.toml").write_text(same[0].to_toml())
    assert Study.from_toml(tmp_path / "again.toml") == same[0]


def test_an_override_of_a_key_that_is_an_axis_changes_the_axis():
    study = Study.from_toml("optimizers", ["optimizer=adam,rlo", "n=6"])
    assert study.axes()["optimizer"] == ["adam", "rlo"]
    assert Study.from_toml("optimizers", ["optimizer=adam"]).axes()["optimizer"] == ["adam"]


def test_a_study_without_axes_has_the_keys_of_the_one_it_was_and_other_values_other_keys():
    plain = Study.from_toml("digits", BASE)
    one, two = (Study.from_toml("digits", [*BASE, f"grid.lr={lr}"]) for lr in ("0.1", "0.1,0.3"))
    assert {p.key for p in one.points()} < {p.key for p in two.points()}
    assert not {p.key for p in plain.points()} & {p.key for p in two.points()}  # their tables have no column lr
    assert one.differences(two) == ["grid.lr is [0.1, 0.3] there, [0.1] here"]


def test_columns_of_a_mixed_axis_are_of_one_type():
    study = Study.from_toml("digits", [*BASE, "seeds=1", 'grid.lr=[0.1, "auto"]'])
    assert [study.columns(point)["lr"] for point in study.points()] == ["0.1", "auto"]
    assert [written(value) for value in (0.1, "auto", 3, False)] == ["0.1", "auto", "3", "false"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grid.lr=0.1,-1"], ["grid.lr[1] = -1", "positive number"]),
        (["grid.model.activation=tanh,tan"], ["grid.model.activation[1] = 'tan'", "did you mean tanh?"]),
        (["grid.optimiser=sgd"], ["unknown key grid.optimiser", "optimizer"]),
        (["grid.device=cpu"], ["device is the same for the whole study"]),
        (["grid.lr=0.1,0.1"], ["grid.lr = [0.1, 0.1] should not name a value twice"]),
        (["grid.lr=[]"], ["grid.lr = []"]),
        (["grid.optimizer=woodbury,sgd", "lr=auto"], ["lr = 'auto' does not go with optimizer=sgd"]),
        (["grid.lr=[0.1,0.2"], ["grid.lr[0] = '[0.1,0.2'", "positive number"]),
        (["grid.loss=[squared,huber"], ["grid.loss[0] = '[squared,huber' should be one of"]),
        (["lr=0.1,0.2"], ["lr = '0.1,0.2' should be one value; several make an axis: grid.lr=0.1,0.2"]),
    ],
)
def test_what_is_wrong_with_an_axis_is_said_with_its_path(overrides, words):
    with pytest.raises(ConfigError) as failure:
        Study.from_toml("digits", [*BASE, *overrides])
    assert all(word in str(failure.value) for word in words), str(failure.value)


@pytest.mark.parametrize("override", ["grid.seeds=2,3", "seeds=2,3", "seed=1,2", "workers=1,2"])
def test_no_axis_is_advised_that_would_be_refused(override):
    with pytest.raises(ConfigError, match=r"= '.*,.*' should be one value$") as failure:
        Study.from_toml("digits", [*BASE[:-1], override])
    assert len(failure.value.errors) == 1


def test_every_value_of_every_axis_is_checked_whatever_else_is_wrong(tmp_path):
    text = (
        'kind = "loops"\noptimizer = "adam"\nlr = {lr}\n[grid]\nn = [6]\n"model.activation" = ["tanh", "gelo", "tan"]\n'
    )
    found = {}
    for lr in (-1, 0.1):
        (tmp_path / "bad.toml").write_text(text.format(lr=lr) + "batch = [-1, 0]\nmodel.hidden = [1, 1000]\n")
        with pytest.raises(ConfigError) as failure:
            Study.from_toml(tmp_path / "bad.toml")
        found[lr] = failure.value.errors
    # What is said of an axis is the same, the key beside it wrong or not.
    starts = ["grid.model.activation[1] = 'gelo'", "grid.model.activation[2] = 'tan'", "grid.batch[0] = -1"]
    starts.append("grid.model.hidden[1] = 1000")
    assert [line for line in found[-1] if line.startswith("grid.")] == found[0.1]
    assert all(line.startswith(start) for line, start in zip(sorted(found[0.1]), sorted(starts), strict=True))
    assert [line for line in found[-1] if not line.startswith("grid.")] == [
        'lr = -1 should be a positive number or "auto"'
    ]


def test_errors_of_values_that_do_not_go_together_are_found_beside_others():
    with pytest.raises(ConfigError) as failure:
        Study.from_toml("digits", ["grid.optimizer=woodbury,sgd", "lr=auto", "steps=0"])
    assert len(failure.value.errors) == 2
    assert any(line.startswith("lr = 'auto' does not go with optimizer=sgd") for line in failure.value.errors)


def test_errors_of_axes_and_keys_come_together():
    with pytest.raises(ConfigError) as failure:
        Study.from_toml("digits", ["grid.lr=-1,0.2", "steps=0", "mas=1"])
    assert len(failure.value.errors) == 3
