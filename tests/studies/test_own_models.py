"""Networks of a study: the user's own factory, convolutions, and what does not fit together."""

import sys

import pytest
import torch

from studies import Study, run_study
from studies.data.subsets import check_data, draw

BASE = ["n=4", "mass=1", "seeds=1", "replacements=1", "width=3", "steps=2", "workers=1"]
MODULE = """
import torch
from torch import nn
def net(inputs, outputs, width, depth=1):
    layers = [nn.Linear(inputs, width), nn.Tanh()]
    for _ in range(depth): layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))
def all_of_it(**offered): net.offered = offered; return nn.Linear(offered["inputs"], offered["outputs"])
def no_module(inputs): return 3
"""


@pytest.fixture
def my_models(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield
    sys.modules.pop("my_models", None)


def test_a_factory_gets_what_it_asks_for_and_leaves_the_global_stream_alone(my_models):
    study = Study.from_toml("digits", [*BASE, "architecture=my_models:net", "model.arguments.depth=2"])
    before = torch.random.get_rng_state()
    one, two = (draw(study, study.points()[0]).model for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [tuple(p.shape) for p in one.parameters()][::2] == [(3, 64), (3, 3), (3, 3), (10, 3)]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert next(one.parameters()).dtype == torch.float64
    other = Study.from_toml("digits", [*BASE, "architecture=my_models:net", "seed=1"])
    assert not torch.equal(next(draw(other, other.points()[0]).model.parameters()), next(one.parameters()))
    import my_models as module

    study = Study.from_toml("digits", [*BASE, "architecture=my_models:all_of_it"])
    draw(study, study.points()[0])
    assert set(module.net.offered) == {"inputs", "outputs", "width", "hidden", "activation", "seed"}


def test_a_model_of_ones_own_is_trained_and_an_axis_of_its_arguments_is_kept_apart(my_models, tmp_path):
    study = Study.from_toml("digits", [*BASE, "architecture=my_models:net"])
    frames = run_study(study, tmp_path / "out", progress=False)
    assert frames.summary["parameters"].tolist() == [64 * 3 + 3 + 3 * 3 + 3 + 3 * 10 + 10]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["architecture=my_models:absent"], "cannot be imported"),
        (["architecture=my_models:no_module"], "returned a int; expected a torch.nn.Module"),
        (["architecture=cnn", "data.name=wine"], "cnn takes images"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_anything_is_trained(my_models, overrides, words):
    with pytest.raises(ValueError, match=words):
        check_data(Study.from_toml("digits", [*BASE, "held_out=20", *overrides]))


def test_a_convolutional_network_sees_images():
    study = Study.from_toml("cnn", ["n=4", "width=2"])
    drawn = draw(study, study.points()[0])
    assert drawn.x.shape == (4, 1, 8, 8)
    assert drawn.model(drawn.x).shape == (4, 10)
    flat = Study.from_toml("digits", ["n=4", "mass=1"])
    assert torch.equal(draw(flat, flat.points()[0]).x, drawn.x.flatten(1))
