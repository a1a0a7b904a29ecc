"""Hyperparameters that cannot work, for every entry of the table: at construction, by name and by what came."""

import re

import pytest

from tests.optim.contract import TABLE, network, values

CASES = [(entry, key, value) for entry in TABLE for key, bad in entry.refuses.items() for value in bad]
WORDS = {"lr": "lr|learning rate"}


@pytest.mark.parametrize(("entry", "key", "value"), CASES, ids=[f"{e.name}-{k}-{v!r}" for e, k, v in CASES])
def test_a_bad_hyperparameter_is_named_with_its_value(entry, key, value):
    model = network()
    before = values(model)
    with pytest.raises((ValueError, TypeError)) as refusal:
        entry(model, **{key: value})
    text = str(refusal.value)
    words = WORDS.get(key, f"{key}|{key.replace('_', ' ')}")
    assert re.search(rf"\b({words})\b", text), text
    assert re.search(rf"{re.escape(repr(value))}(?!\w)", text) or str(value) in text, text
    assert all(p.equal(before[n]) for n, p in values(model).items())
    assert not any(m._forward_hooks for m in model.modules())


GROUPED = [
    case for case in CASES if case[1] in ("lr", "mass", "momentum", "weight_decay") and "model" in case[0].traits
]


@pytest.mark.parametrize(("entry", "key", "value"), GROUPED, ids=[f"{e.name}-{k}-{v!r}" for e, k, v in GROUPED])
def test_a_bad_hyperparameter_of_a_group_too(entry, key, value):
    with pytest.raises((ValueError, TypeError)) as refusal:
        entry(network(), groups=[{"layers": ["2"], key: value}])
    text = str(refusal.value)
    assert key in text
    assert str(value) in text


BAD_GROUPS = {
    "nothing matches": ([{"layers": ["7"]}], r"'7'"),
    "a pattern that nearly matches": ([{"layers": ["0", "wieght*"]}], r"'wieght\*'"),
    "a layer twice": ([{"layers": ["0"]}, {"layers": ["*"]}], r"'0'"),
    "an unknown key": ([{"layers": ["0"], "momentun": 0.9}], r"'momentun'.*'momentum'"),
    "no layers": ([{"lr": 0.1}], "layers"),
    "layers as one string": ([{"layers": "0"}], "layers"),
    "a dict alone": ({"layers": ["0"]}, "groups"),
}
GROUPERS = [entry for entry in TABLE if entry.name == "Woodbury"]


@pytest.mark.parametrize("case", BAD_GROUPS)
@pytest.mark.parametrize("entry", GROUPERS, ids=[entry.name for entry in GROUPERS])
def test_bad_groups(entry, case):
    groups, message = BAD_GROUPS[case]
    model = network()
    with pytest.raises((ValueError, TypeError), match=message):
        entry(model, groups=groups)
    assert not any(m._forward_hooks for m in model.modules())


def test_nesterov_needs_momentum_without_dampening():
    """As torch.optim.SGD."""
    for name in ("SGD", "Woodbury"):
        entry = next(entry for entry in TABLE if entry.name == name)
        for options in ({"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}):
            with pytest.raises(ValueError, match=r"(?i)nesterov.*momentum"):
                entry(network(), **options)
