"""Parameter groups, at construction, by hand and added later, for every entry of the table."""

import pytest
import torch
from torch import nn

from tests.optim.contract import (
    F64,
    LR,
    assert_close,
    entries,
    network,
    points,
    row_column_mass,
    run,
    same,
    steps_from,
    values,
)


@entries()
def test_every_trained_parameter_is_in_one_group(entry):
    model = network()
    held = [p for group in entry(model).param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}


GROUPED = [("lr", 0.01), ("momentum", 0.7), ("weight_decay", 0.2), ("mass", 0.3)]


@pytest.mark.parametrize(("key", "value"), GROUPED, ids=[key for key, _ in GROUPED])
@entries("layerwise")
def test_a_group_has_its_own_hyperparameters(entry, key, value):
    """Its layers move as under an optimizer with these everywhere, the others as under one without."""
    if "groups" in entry.options or (key != "lr" and key not in entry.hyper) or (key == "mass" and "row" in entry.name):
        pytest.skip("takes no such entry")
    thetas, moved = points(3), {}
    for name, options in {
        "grouped": {"groups": [{"layers": ["[02]"], key: value}]},
        "everywhere": {key: value},
        "nowhere": {},
    }.items():
        model = network()
        moved[name] = steps_from(entry(model, **options), model, thetas)
    for grouped, everywhere, nowhere in zip(*moved.values(), strict=True):
        expected = {n: (nowhere if n.startswith("4.") else everywhere)[n] for n in grouped}
        assert_close(grouped, expected, 1e-13)
    assert not same(moved["grouped"][-1], moved["nowhere"][-1])


@entries("layerwise")
def test_the_entry_of_a_group_is_read_at_every_step(entry):
    """What schedulers and users do: group["lr"] = …; a group at lr 0 stays (but for its state)."""
    if "groups" in entry.options:
        pytest.skip("has groups of its own")
    model, other = network(), network()
    groups = {"groups": [{"layers": ["0"], "lr": LR}]}
    opt, still = entry(model, **groups), entry(other, **groups)
    (index,) = [i for i, group in enumerate(still.param_groups) if any(p is other[0].weight for p in group["params"])]
    theta = points(1)
    still.param_groups[index]["lr"] = 0.0
    (moved,), (kept,) = steps_from(opt, model, theta), steps_from(still, other, theta)
    for n in moved:
        assert torch.equal(kept[n], theta[0][n] if n.startswith("0.") else moved[n])
        assert not torch.equal(moved[n], theta[0][n])


BAD_GROUPS = {
    "no dict": ([nn.Parameter(torch.zeros(1))], TypeError, "dict"),
    "already there": (None, ValueError, r"more than one parameter group|already"),
    "a set": ({"params": {nn.Parameter(torch.zeros(1))}}, (TypeError, ValueError), "set|ordered"),
    "no tensor": ({"params": [1.0]}, (TypeError, ValueError), "float|Tensor"),
    "no leaf": ({"params": [nn.Parameter(torch.zeros(1)) * 2]}, ValueError, "leaf|parameter"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
@entries()
def test_groups_that_cannot_be_added(entry, case):
    group, error, message = BAD_GROUPS[case]
    model = network()
    opt = entry(model)
    before = len(opt.param_groups)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": [model[0].weight]} if group is None else group)
    assert len(opt.param_groups) == before
    run(opt, model, 1)


@entries("model")
def test_a_strangers_parameter_is_refused_by_the_latest_at_the_step(entry):
    """It has no place in the metric; silence would be a group that never moves."""
    model, stranger = network(), nn.Linear(3, 2).to(F64)
    opt = entry(model)
    with pytest.raises(ValueError, match="not a parameter of"):
        opt.add_param_group({"params": list(stranger.parameters())})
    assert not any(p is stranger.weight for group in opt.param_groups for p in group["params"])


@entries()
def test_a_layer_that_became_trainable_is_added_as_a_group(entry):
    """torch's way of unfreezing: its own hyperparameters and the defaults for the rest; the state begins anew."""
    model, other = network(), network()
    model[4].requires_grad_(False)
    opt = entry(model)
    model[4].requires_grad_(True)
    before = len(opt.param_groups)
    opt.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
    assert len(opt.param_groups) == before + 1
    assert opt.param_groups[-1]["lr"] == 0.01
    assert opt.param_groups[-1].keys() == opt.param_groups[0].keys()
    mass = {"mass": row_column_mass(nn.Sequential(*model[:4]))} if entry.name == "row × column" else {}
    second = entry(other, groups=[*entry.options.get("groups", ()), {"layers": ["4"], "lr": 0.01}], **mass)
    run(opt, model, 3)
    run(second, other, 3)
    assert_close(values(model), values(other), 1e-13)


@entries("model")
def test_an_unfrozen_layer_that_no_group_holds_is_an_error(entry):
    if "groups" in entry.options or "row" in entry.name:
        pytest.skip("its groups and masses name layers")
    model = network()
    model[0].requires_grad_(False)
    opt = entry(model)
    model[0].requires_grad_(True)
    before = values(model)
    with pytest.raises(ValueError, match=r"'0\.(weight|bias)' became trainable after"):
        run(opt, model, 1)
    assert same(values(model), before)
