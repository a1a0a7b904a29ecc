"""What has no per-sample Jacobian is refused by name; what looks alike and has one is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nt_kernel import NumericalError, generalized_ntk, layer_factors
from tests.nt_kernel.cases import F64, Custom, mlp

X = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


def two(forward, **more):
    torch.manual_seed(0)
    return Custom(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2), **more).to(F64)


def centred(self, x):
    h = self.a(x)
    return self.b(torch.tanh(h - h.mean(0)))


def gated_centred(self, x):
    h = self.a(x)
    return self.b(torch.tanh(h - self.gate * h.mean(0)))


REFUSED = {
    "batch norm in training": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(F64),
        r"layer '1' \(BatchNorm1d\) makes samples interact in training mode.*call model\.eval\(\) first",
    ),
    "dropout in training": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Dropout(0.1))).to(F64),
        r"layer '1\.0' \(Dropout\) draws random masks in training mode.*call model\.eval\(\) first",
    ),
    "batch norm without running statistics": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).to(F64).eval(),
        r"layer '1' \(BatchNorm1d\) keeps no running statistics.*write track_running_stats=True",
    ),
    "minus the batch mean": (lambda: two(centred), "the samples of this model interact"),
    "minus the batch mean, behind a gate that is zero": (
        lambda: two(gated_centred, gate=nn.Parameter(torch.zeros(()))),
        "the samples of this model interact",
    ),
    "the batch mean, seen by a bare parameter": (
        lambda: Custom(lambda s, x: s.scale * (x - x.mean(0)), scale=nn.Parameter(torch.ones(3, dtype=F64))),
        "the samples of this model interact",
    ),
    "cumulative sum over the batch": (  # the first sample does not notice
        lambda: two(lambda s, x: s.b(torch.tanh(s.a(x).cumsum(0)))),
        "interact",
    ),
    "shuffled batch": (lambda: two(lambda s, x: s.b(torch.tanh(s.a(x))).flip(0)), "interact"),
    "functional dropout": (
        lambda: two(lambda s, x: s.b(F.dropout(s.a(x), 0.5, training=True))),
        "is random: two runs",
    ),
    "noise": (lambda: two(lambda s, x: s.b(s.a(x) + torch.randn(4, dtype=F64))), "is random: two runs"),
    "nothing to train": (lambda: two(lambda s, x: s.b(s.a(x))).requires_grad_(False), "no trainable parameters"),
    "a scalar": (lambda: two(lambda s, x: s.b(s.a(x)).sum()), r"returned shape \(\) for 4 samples"),
    "fewer rows": (lambda: two(lambda s, x: s.b(s.a(x))[:2]), r"returned shape \(2, 2\) for 4 samples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    make, message = REFUSED[case]
    model = make()
    for _ in range(2):  # and the refusal is not remembered as a permission
        with pytest.raises(ValueError, match=message):
            generalized_ntk(model, X)


ALLOWED = {
    "dropout of nothing": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0)).to(F64),
    "dropout in eval": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).to(F64).eval(),
    "batch norm in eval": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(F64).eval(),
    "instance norm in training": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2)
    ).to(F64),
    "group norm in training": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)).to(F64),
    "positions centred within the sample": lambda: two(
        lambda s, x: (lambda h: s.b(h - h.mean(-1, keepdim=True)))(s.a(x))
    ),
    "outputs that depend on nothing": lambda: two(lambda s, x: s.b(s.a(x)).detach()),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_not_refused(case):
    layer_factors(ALLOWED[case](), X)


def test_train_mode_is_noticed_after_eval():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).to(F64).eval()
    layer_factors(model, X)
    with pytest.raises(ValueError, match="Dropout"):
        layer_factors(model.train(), X)


@pytest.mark.parametrize("sample", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite(sample, value):
    x = X.clone()
    x[sample, 1] = value
    with pytest.raises(
        ValueError, match=f"x must be finite; it holds NaN or inf in 1 of 4 samples, first in sample {sample}"
    ):
        layer_factors(mlp(3, 4, 2, activation=nn.ReLU).to(F64), x)


def test_parameters_that_are_not_finite():
    model = mlp(3, 4, 2).to(F64)
    model[2].weight.data[1, 1] = float("nan")
    with pytest.raises(NumericalError, match=r"output is not finite at sample 0 \(did training diverge\?\)"):
        layer_factors(model, X)


def test_outputs_that_are_no_tensor():
    model = Custom(lambda s, x: {"y": s.a(x)}, a=nn.Linear(3, 2)).to(F64)
    with pytest.raises(TypeError, match="the model returned dict, not a tensor; pass output=callable"):
        layer_factors(model, X)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(0, 3), torch.tensor(1.0), (torch.zeros(4, 3), torch.zeros(5, 3)), [1.0, 2.0]],
    ids=["empty", "scalar", "unequal", "list"],
)
def test_inputs_without_a_common_first_dimension(x):
    with pytest.raises(ValueError, match="one common first dimension N >= 1"):
        layer_factors(nn.Linear(3, 2), x)


OPTIONS = {
    "scale": ({"scale": "means"}, r"unknown scale 'means'; known are 'mean', 'sum', 'none', .*; did you mean 'mean'\?"),
    "metric": ({"output_metric": "identiti"}, r"unknown output metric 'identiti'.*did you mean 'identity'\?"),
    "blocks": ({"blocks": "layers"}, "blocks must be 'layer' or 'network', got 'layers'"),
    "mass": ({"mass": 0}, "must be positive and finite"),
    "mass by name": ({"mass": {"2.wieght": 1}}, r"did you mean '2\.weight'\?"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(case):
    options, message = OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        generalized_ntk(mlp(3, 4, 2).to(F64), X, **options)
