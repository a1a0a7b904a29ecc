import numpy as np
import pytest
import torch
from torch import nn

from studies.data.models import ACTIVATIONS, fully_connected
from studies.definition.training import Model


def test_shape_and_scale_of_the_initialisation():
    model = fully_connected([64, 400, 10], "tanh", np.random.SeedSequence(1))
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear]
    for layer in (model[0], model[2]):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.05)
        assert layer.weight.mean().item() == pytest.approx(0, abs=0.1 * layer.in_features**-0.5)
        assert not layer.bias.any()
        assert layer.weight.requires_grad


def test_the_same_stream_gives_the_same_model_and_another_another():
    one, two, other = (fully_connected([4, 5, 2], "tanh", np.random.SeedSequence(seed))[0].weight for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_without_hidden_layers_the_model_is_linear():
    assert [type(module) for module in fully_connected([4, 2], "tanh", np.random.SeedSequence(0))] == [nn.Linear]


def test_every_activation_of_the_config_is_there():
    assert set(ACTIVATIONS) == set(Model.model_fields["activation"].annotation.__args__)
    assert all(hasattr(nn, name) for name in ACTIVATIONS.values())
