"""Groups by layer: what their patterns match, how their layers move, what a checkpoint keeps, what is refused."""

import copy
import io

import pytest
import torch
from torch import nn

from nt_kernel.mass import RowColumnMass
from optim import Woodbury
from optim.options.damping import LevenbergMarquardt
from optim.options.group_mass import damped, loaded_mass, mass_of_layers, saved_mass
from optim.options.groups import layer_groups
from optim.options.second_moment import SecondMomentMass
from tests.nt_kernel.cases import F64, mlp
from tests.optim.problems import problem
from tests.reference import Dense, distance, trainable


def step(model, x, loss, opt):
    """(G⁻¹-free) moves of one step by name."""
    opt.zero_grad()
    loss(model(x)).backward()
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    opt.step()
    return {n: before[n] - p for n, p in trainable(model).items()}


def through_a_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def names_of(opt):
    by_id = {id(p): n for n, p in opt.model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in opt.param_groups]


LAYERS = ["in", "blocks.0.mix", "blocks.0.out", "blocks.1.mix", "head"]
MATCHED = {
    "none": (None, [LAYERS]),
    "empty": ([], [LAYERS]),
    "one": ([["head"]], [LAYERS[:-1], ["head"]]),
    "star": ([["blocks.*"]], [["in", "head"], LAYERS[1:4]]),
    "inner star": ([["blocks.*.mix"]], [["in", "blocks.0.out", "head"], ["blocks.0.mix", "blocks.1.mix"]]),
    "set": ([["blocks.[1]*", "in"]], [["blocks.0.mix", "blocks.0.out", "head"], ["in", "blocks.1.mix"]]),
    "all": ([["*"]], [LAYERS]),
    "two": ([["head"], ["in"]], [LAYERS[1:4], ["head"], ["in"]]),
}


@pytest.mark.parametrize("case", MATCHED)
def test_patterns(case):
    patterns, expected = MATCHED[case]
    groups = None if patterns is None else [{"layers": own, "lr": i + 1.0} for i, own in enumerate(patterns)]
    found = layer_groups(groups, LAYERS)
    assert [layers for layers, _, _ in found] == expected
    given = found[-len(patterns) :] if patterns else []
    assert [(own, where) for _, own, where in given] == [({"lr": i + 1.0}, f"groups[{i}]: ") for i in range(len(given))]


def test_every_layer_moves_by_its_own_hyperparameters():
    """lr, mass, weight decay and damping by layer, against one dense solve with these masses."""
    model, x, loss = problem()
    groups = [
        {"layers": ["2"], "lr": 0.1, "mass": 0.5, "weight_decay": 0.2},
        {"layers": ["4"], "mass": 2.0, "damping": 3.0},
    ]
    opt = Woodbury(model, 0.3, mass=0.7, check_step=False, groups=groups)
    assert [group["layers"] for group in opt.param_groups] == [["0"], ["2"], ["4"]]
    assert names_of(opt) == [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]]
    masses = {n: {"0": 0.7, "2": 0.5, "4": 6.0}[n[0]] for n in trainable(model)}
    dense, before = Dense(model, x, mass=masses), {n: p.clone() for n, p in trainable(model).items()}
    found = step(model, x, loss, opt)
    solved = dense.solve({n: p.grad for n, p in model.named_parameters()})
    lr = {"0": 0.3, "2": 0.1, "4": 0.3}
    expected = {n: lr[n[0]] * (d + (0.2 * before[n] if n[0] == "2" else 0)) for n, d in solved.items()}
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("mass", [[0.1, 0.2, 0.3], torch.tensor([0.1, 0.2, 0.3]), {"0": 0.1, "2": 0.2, "4": 0.3}])
def test_a_mass_for_all_layers_goes_to_the_groups(mass):
    model, x, loss = problem()
    other = copy.deepcopy(model)
    opt = Woodbury(model, 0.1, mass=mass, groups=[{"layers": ["2"], "lr": 0.1}])
    assert distance(step(model, x, loss, opt), step(other, x, loss, Woodbury(other, 0.1, mass=mass))) == 0
    assert isinstance(opt.param_groups[1]["mass"], dict | list)


def test_a_groups_mass_speaks_of_its_layers_only():
    model, x, loss = problem()
    opt = Woodbury(model, 0.1, mass=[1.0, 5.0, 1.0], groups=[{"layers": ["0", "4"], "mass": [0.5, 0.25]}])
    masses = {n: {"0": 0.5, "2": 5.0, "4": 0.25}[n[0]] for n in trainable(model)}
    dense = Dense(model, x, mass=masses)
    found = step(model, x, loss, opt)
    assert distance(found, {n: 0.1 * d for n, d in dense.solve(gradients_of(model)).items()}) < 1e-12
    with pytest.raises(ValueError, match=r"groups\[0\]: mass names '2', which is no layer or parameter"):
        Woodbury(model, groups=[{"layers": ["0"], "mass": {"2": 1.0}}])


def gradients_of(model):
    return {n: p.grad for n, p in model.named_parameters()}


def test_one_block_for_groups_of_different_masses():
    model, x, loss = problem()
    opt = Woodbury(model, 0.1, blocks="network", mass=0.7, groups=[{"layers": ["2"], "lr": 0.2, "mass": 0.3}])
    masses = {n: 0.3 if n[0] == "2" else 0.7 for n in trainable(model)}
    dense = Dense(model, x, mass=masses, blocks="network")
    found = step(model, x, loss, opt)
    solved = dense.solve(gradients_of(model))
    assert distance(found, {n: (0.2 if n[0] == "2" else 0.1) * d for n, d in solved.items()}) < 1e-12


def test_entries_are_read_at_every_step_and_schedulers_work_on_each_group():
    model, x, loss = problem()
    opt = Woodbury(model, 0.2, mass=0.7, groups=[{"layers": ["2"], "lr": 0.1, "mass": 0.3}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, [lambda t: 1 / (1 + t), lambda t: 1.0 + t])
    for t in range(3):
        opt.param_groups[1]["mass"] = 0.3 + t
        masses = {n: 0.3 + t if n[0] == "2" else 0.7 for n in trainable(model)}
        dense = Dense(model, x, mass=masses)
        found = step(model, x, loss, opt)
        solved = dense.solve(gradients_of(model))
        lr = (0.2 / (1 + t), 0.1 * (1 + t))
        assert distance(found, {n: lr[n[0] == "2"] * d for n, d in solved.items()}) < 1e-12
        scheduler.step()


def test_auto_in_a_group():
    model, _, _ = problem()
    opt = Woodbury(model, 0.2, groups=[{"layers": ["0"], "lr": "auto"}])
    assert [group["lr"] for group in opt.param_groups] == [0.2, 1 / 3]
    assert not opt.lr_is_auto
    with pytest.raises(ValueError, match=r'groups\[0\]: lr="auto" rests on λ_max ≤ N'):
        Woodbury(model, 0.2, scale="sum", groups=[{"layers": ["0"], "lr": "auto"}])


KEPT = {
    "numbers": {"mass": 0.3, "momentum": 0.5, "weight_decay": 0.1, "damping": 2.0},
    "list": {"mass": [0.3, 0.4]},
    "tensors": {"mass": {"0.weight": torch.rand(5, 3, dtype=F64) + 0.5, "2": 0.1}},
    "rows and columns": {
        "mass": {"0.weight": RowColumnMass(torch.rand(5, dtype=F64) + 0.5, torch.rand(3, dtype=F64) + 0.5)}
    },
    "second moments": {"mass": SecondMomentMass(beta2=0.9, eps=0.1, scale=0.7), "momentum": 0.5},
}


@pytest.mark.parametrize("case", KEPT)
def test_a_checkpoint_keeps_the_hyperparameters_of_every_group(case):
    model, x, loss = problem()
    own = {"layers": ["0", "2"], "lr": 0.05, **KEPT[case]}
    opt = Woodbury(model, 0.1, groups=[own], mass=0.9)
    for _ in range(2):
        step(model, x, loss, opt)
    other = copy.deepcopy(model)
    second = Woodbury(other, 0.3, groups=[{"layers": ["0", "2"]}])
    second.load_state_dict(through_a_file(opt.state_dict()))
    assert [g["lr"] for g in second.param_groups] == [0.1, 0.05]
    assert second.param_groups[0]["mass"] == 0.9
    for _ in range(3):
        a, b = step(model, x, loss, opt), step(other, x, loss, second)
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_checkpoint_from_before_these_hyperparameters_still_loads():
    model, x, loss = problem()
    opt = Woodbury(model, 0.1, mass=0.5, momentum=0.5)
    old = {"state": {}, "param_groups": [{"lr": 0.2, "params": list(range(6)), "layers": ["of", "another", "name"]}]}
    opt.load_state_dict(old)
    (group,) = opt.param_groups
    assert (group["lr"], group["mass"], group["momentum"], group["layers"]) == (0.2, 0.5, 0.5, ["0", "2", "4"])
    step(model, x, loss, opt)


def test_masses_on_paper():
    mass = {"w": RowColumnMass(torch.tensor([1.0, 2.0]), torch.ones(2, 2)), "b": torch.ones(3), "0": 0.5}
    saved = saved_mass(mass)
    assert saved["w"] == {"row": [1.0, 2.0], "column": [[1.0, 1.0], [1.0, 1.0]]}
    back = loaded_mass(through_a_file(saved))
    assert torch.equal(back["w"].full((2, 2, 2)), mass["w"].full((2, 2, 2)).double())
    assert torch.equal(back["b"], mass["b"])
    assert back["0"] == 0.5
    assert loaded_mass(saved_mass(SecondMomentMass(0.5, 0.1, 2.0))) == SecondMomentMass(0.5, 0.1, 2.0)
    assert [loaded_mass(saved_mass(m)) for m in (0.5, [1.0, 2.0])] == [0.5, [1.0, 2.0]]


def test_damped_masses():
    row_column = RowColumnMass(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0]))
    assert torch.equal(damped(row_column, 3.0).full((2, 2)), 3 * row_column.full((2, 2)))
    assert torch.equal(damped(torch.ones(2), 3.0), torch.full((2,), 3.0))
    assert damped(row_column, 1.0) is row_column


def test_a_mass_is_copied():
    layers = {"0": ("0.weight",)}
    given = {"0.weight": torch.ones(2)}
    kept = mass_of_layers(given, layers, ["0"])
    given["0.weight"].fill_(5.0)
    assert torch.equal(kept["0.weight"], torch.ones(2))


BAD = {
    "nothing": (
        [{"layers": ["1"]}],
        ValueError,
        r"groups\[0\]: '1' matches no trainable layer of the model; its layers are",
    ),
    "close": ([{"layers": ["head"]}, {"layers": ["haed"]}], ValueError, r"groups\[1\]: 'haed' .*did you mean 'head'\?"),
    "container": ([{"layers": ["blocks"]}], ValueError, r"for all layers below it write 'blocks\.\*'"),
    "parameter": ([{"layers": ["in.weight"]}], ValueError, "groups go by layer: did you mean 'in'?"),
    "twice": (
        [{"layers": ["in"]}, {"layers": ["i*"]}],
        ValueError,
        r"layer 'in' is in two groups, groups\[0\] and .*\[1\]",
    ),
    "key": (
        [{"layers": ["in"], "weight_deacy": 0.1}],
        ValueError,
        "unknown key 'weight_deacy'.*did you mean 'weight_decay'",
    ),
    "params": ([{"params": []}], ValueError, "unknown key 'params'; known are 'layers', 'lr'"),
    "no layers": ([{"lr": 0.1}], TypeError, 'needs its layers, a list of names or patterns under "layers", got None'),
    "empty layers": ([{"layers": []}], TypeError, r"needs its layers.*got \[\]"),
    "string": ([{"layers": "in"}], TypeError, "needs its layers.*got 'in'"),
    "number": ([{"layers": [0]}], TypeError, "layers are named by strings, got 0"),
    "dict": ({"layers": ["in"]}, TypeError, "groups must be a list of dicts"),
    "no dict": (["in"], TypeError, r"groups\[0\] must be a dict like .*, got 'in'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_groups(case):
    groups, error, message = BAD[case]
    with pytest.raises(error, match=message):
        layer_groups(groups, LAYERS)


BAD_VALUES = {
    "lr": (-1.0, ValueError),
    "mass": (0.0, ValueError),
    "momentum": (1.0, ValueError),
    "dampening": (2.0, ValueError),
    "weight_decay": (-0.1, ValueError),
    "decay": ("riemanian", ValueError),
    "damping": (0.0, ValueError),
    "nesterov": ("yes", TypeError),
}


@pytest.mark.parametrize("key", BAD_VALUES)
def test_bad_values_name_their_group(key):
    value, error = BAD_VALUES[key]
    model = mlp(3, 4, 4, 2)
    with pytest.raises(error, match=rf"^groups\[1\]: .*{key}.*{value}"):
        Woodbury(model, groups=[{"layers": ["0"]}, {"layers": ["2"], key: value}])
    assert not model._forward_hooks


@pytest.mark.parametrize("damping", [LevenbergMarquardt(), lambda t: 1.0], ids=["trust region", "schedule"])
def test_a_damping_of_its_own_needs_a_number_elsewhere(damping):
    with pytest.raises(
        ValueError, match=r"a group has a damping of its own, 2\.0, which needs a number for the others"
    ):
        Woodbury(mlp(3, 2), damping=damping, groups=[{"layers": ["."], "damping": 2.0}])


def half_frozen(**options):
    model, x, loss = problem()
    model[0].requires_grad_(False)
    opt = Woodbury(model, 0.2, **options)
    model[0].requires_grad_(True)
    return model, x, loss, opt


@pytest.mark.parametrize(
    "group",
    [{"layers": ["0"]}, {"layers": ["*"]}, lambda m: {"params": m[0].parameters()}],
    ids=["name", "star", "params"],
)
def test_a_layer_that_became_trainable_joins(group):
    model, x, loss, opt = half_frozen(mass={"2": 0.3}, momentum=0.5)
    group = group(model) if callable(group) else group
    opt.add_param_group({**group, "lr": 0.05, "mass": 0.6})
    assert opt.param_groups[1]["layers"] == ["0"]
    assert opt.param_groups[1].keys() == opt.param_groups[0].keys()
    assert opt.param_groups[1]["momentum"] == 0.5
    masses = {n: {"0": 0.6, "2": 0.3, "4": 1.0}[n[0]] for n in trainable(model)}
    dense = Dense(model, x, mass=masses)
    found = step(model, x, loss, opt)
    solved = dense.solve(gradients_of(model))
    assert distance(found, {n: (0.05 if n[0] == "0" else 0.2) * d for n, d in solved.items()}) < 1e-12


def test_the_mass_of_a_layer_that_joins():
    model, _, _, opt = half_frozen(mass=[0.3, 0.4])
    with pytest.raises(
        ValueError, match="mass was given as a list for the layers there were; write the mass of '0' into"
    ):
        opt.add_param_group({"layers": ["0"]})
    for mass, expected in ((0.3, 0.3), ({"2": 0.4}, {}), (SecondMomentMass(), SecondMomentMass())):
        model, _, _, opt = half_frozen(mass=mass)
        opt.add_param_group({"params": list(model[0].parameters())})
        assert opt.param_groups[1]["mass"] == expected


def test_a_bias_that_became_trainable_joins_with_its_own_rate():
    """One layer, one metric block, two groups."""
    model, x, loss = problem()
    model[2].bias.requires_grad_(False)
    opt = Woodbury(model, 0.2)
    model[2].bias.requires_grad_(True)
    opt.add_param_group({"params": [model[2].bias], "lr": 0.4})
    dense = Dense(model, x)
    found = step(model, x, loss, opt)
    solved = dense.solve(gradients_of(model))
    assert distance(found, {n: (0.4 if n == "2.bias" else 0.2) * d for n, d in solved.items()}) < 1e-12


def test_a_layer_that_joins_takes_the_damping_of_a_schedule_over():
    model, x, loss = problem()
    model[0].requires_grad_(False)
    opt = Woodbury(model, 0.2, damping=lambda t: 1.0 + t)
    step(model, x, loss, opt)
    model[0].requires_grad_(True)
    opt.add_param_group({"layers": ["0"]})
    assert [group["steps"] for group in opt.param_groups] == [1, 1]
    dense = Dense(model, x, mass=2.0)
    found = step(model, x, loss, opt)
    assert distance(found, {n: 0.2 * d for n, d in dense.solve(gradients_of(model)).items()}) < 1e-12


BAD_ADDITIONS = {
    "stranger": (lambda m: {"params": [nn.Parameter(torch.zeros(1))]}, ValueError, "one that is not a parameter of it"),
    "there already": (lambda m: {"params": [m[2].weight]}, ValueError, "more than one parameter group"),
    "layer there already": (lambda m: {"layers": ["2"]}, ValueError, "'2' matches no trainable layer"),
    "key": (lambda m: {"params": [m[0].weight], "momentun": 0.1}, ValueError, "did you mean 'momentum'"),
    "value": (
        lambda m: {"params": [m[0].weight], "momentum": 2.0},
        ValueError,
        r"momentum must be in \[0, 1\), got 2\.0",
    ),
    "mass": (lambda m: {"params": [m[0].weight], "mass": -2.0}, ValueError, r"got -2\.0"),
    "no dict": (lambda m: [m[0].weight], TypeError, "must be a dict"),
}


@pytest.mark.parametrize("case", BAD_ADDITIONS)
def test_groups_that_cannot_join(case):
    make, error, message = BAD_ADDITIONS[case]
    model, _, _, opt = half_frozen()
    with pytest.raises(error, match=message):
        opt.add_param_group(make(model))
    assert len(opt.param_groups) == 1


def test_an_unfrozen_layer_without_a_group_is_named():
    model, x, loss, opt = half_frozen()
    with pytest.raises(
        ValueError, match=r"'0\.weight' became trainable after Woodbury was made; add it, add_param_group"
    ):
        step(model, x, loss, opt)


def test_copies_keep_groups_and_masses():
    model, x, loss = problem()
    opt = Woodbury(model, 0.2, mass=0.5, output_metric="cross_entropy", groups=[{"layers": ["2"], "mass": 0.1}])
    step(model, x, loss, opt)
    twin, second = copy.deepcopy((model, opt))
    assert second.model is twin
    a, b = step(model, x, loss, opt), step(twin, x, loss, second)
    assert all(torch.equal(a[n], b[n]) for n in a)
    second.close()
    assert sum(hook._passes() is not None for hook in twin._forward_hooks.values()) == 0
