"""Masses by number, list, layer and parameter; every bad one by its message."""

import numpy as np
import pytest
import torch

from nt_kernel.mass import resolve_mass

LAYERS = {"0": ("0.weight", "0.bias"), "blocks.1": ("blocks.1.weight",)}

GOOD = {
    "number": (2, {"0.weight": 2.0, "0.bias": 2.0, "blocks.1.weight": 2.0}),
    "numpy number": (np.float64(2), {"0.weight": 2.0, "0.bias": 2.0, "blocks.1.weight": 2.0}),
    "tensor, one per layer": (torch.tensor([1.0, 0.5]), {"0.weight": 1.0, "0.bias": 1.0, "blocks.1.weight": 0.5}),
    "scalar tensor": (torch.tensor(0.5), {"0.weight": 0.5, "0.bias": 0.5, "blocks.1.weight": 0.5}),
    "tuple": ((1.0, 0.5), {"0.weight": 1.0, "0.bias": 1.0, "blocks.1.weight": 0.5}),
    "parameter beats layer": ({"0.bias": 3.0, "0": 2.0}, {"0.weight": 2.0, "0.bias": 3.0, "blocks.1.weight": 1.0}),
    "empty": ({}, {"0.weight": 1.0, "0.bias": 1.0, "blocks.1.weight": 1.0}),
}
BAD = {
    "zero": (0.0, ValueError, r"mass must be positive and finite, got 0\.0"),
    "negative": (-1, ValueError, "must be positive and finite, got -1"),
    "nan": (float("nan"), ValueError, "must be positive and finite, got nan"),
    "inf": (float("inf"), ValueError, "must be positive and finite, got inf"),
    "one of a list": ([1.0, -2.0], ValueError, "mass of 'blocks.1' must be positive and finite, got -2"),
    "one of a dict": ({"0.bias": float("nan")}, ValueError, r"mass of '0\.bias' must be positive"),
    "wrong length": ([1.0, 2.0, 3.0], ValueError, r"mass has 3 entries, the model has 2 layers \(0, blocks\.1\)"),
    "unknown layer": (
        {"block.1": 1.0},
        ValueError,
        r"'block\.1', which is no layer or parameter.*did you mean 'blocks\.1'\?",
    ),
    "unknown parameter": ({"0.wieght": 1.0}, ValueError, r"did you mean '0\.weight'\?"),
    "nothing like it": (
        {"zzz": 1.0},
        ValueError,
        "mass names 'zzz', which is no layer or parameter of this model; its layers are '0', 'blocks.1'$",
    ),
    "a name": ("0", TypeError, "mass must be a number, a list with one number per layer or a dict by name, got '0'"),
    "nothing": (None, TypeError, "got None"),
    "truth": (True, TypeError, "must be one number, got True"),
    "a list inside": ([1.0, [2.0]], TypeError, r"mass of 'blocks\.1' must be one number, got \[2\.0\]"),
    "a tensor inside": ({"0": torch.ones(2)}, TypeError, "mass of '0' must be one number"),
}


@pytest.mark.parametrize("case", GOOD)
def test_good(case):
    mass, expected = GOOD[case]
    assert resolve_mass(mass, LAYERS) == expected


@pytest.mark.parametrize("case", BAD)
def test_bad(case):
    mass, error, message = BAD[case]
    with pytest.raises(error, match=message):
        resolve_mass(mass, LAYERS)
